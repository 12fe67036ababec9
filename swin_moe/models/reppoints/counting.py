"""Multiply-accumulates of what stands beside the backbone of RepPoints V2, as the published tables count them.

The official counter sees convolutions, ReLU and group norm (two operations an element); it sees neither SiLU nor
pooling by functions nor corner pooling. Of deformed convolutions, which it does not see either, the published number
holds the products.

Shape legend: H x W of a map.
"""

import math
from collections.abc import Sequence

from torch import nn

from swin_moe.models.dense.counting import Size, conv_module, convolution
from swin_moe.models.dense.layers import ConvModule
from swin_moe.models.reppoints.bifpn import BiFPN
from swin_moe.models.reppoints.corners import CornerPool
from swin_moe.models.reppoints.head import DeformedConv, PointHead
from swin_moe.models.reppoints.masks import PointMasks


def neck(bifpn: BiFPN, sizes: Sequence[Size]) -> int:
    """Returns the count for one image, whose levels have these sizes."""
    total = 0
    for one in bifpn.bi_fpn:
        laterals = zip(one.lateral_convs, sizes)
        total += sum(conv_module(conv, size) for conv, size in laterals if isinstance(conv, ConvModule))
        total += sum(conv_module(conv, size) for conv, size in zip(one.lateral_combine_conv, sizes))
        total += sum(conv_module(conv, size) for conv, size in zip(one.out_combine_conv, sizes[1:]))
    return total


def head(head: PointHead, sizes: Sequence[Size]) -> int:
    """Returns the count for one image, the products of deformed convolutions included."""
    return sum(_level(head, size) for size in sizes)


def _level(head: PointHead, size: Size) -> int:
    cells, pools = math.prod(size), (head.hem_tl, head.hem_br)
    total = sum(_corner_pool(pool, size) for pool in pools)
    for name, child in head.named_children():
        if isinstance(child, ConvModule):
            total += conv_module(child, size)
        elif isinstance(child, nn.ModuleList):
            total += sum(conv_module(conv, size) for conv in child if isinstance(conv, ConvModule))
        elif isinstance(child, nn.Conv2d):
            total += convolution(child, size)
        elif isinstance(child, PointMasks):
            continue  # it stands beside what the official counter runs; `branch` counts it
        elif isinstance(child, DeformedConv):
            total += cells * child.weight.numel()
        else:
            assert isinstance(child, CornerPool), f"{name} is not counted"
    return total + 3 * cells * head.spec.channels  # ReLU after the convolutions that points, classes and boxes have


def _corner_pool(pool: CornerPool, size: Size) -> int:
    modules = (pool.p1_conv1, pool.p2_conv1, pool.conv2)
    total = sum(conv_module(conv, size) for conv in modules)
    total += convolution(pool.p_conv1, size) + convolution(pool.conv1, size)
    return total + math.prod(size) * pool.conv1.out_channels * (2 + 2 + 1)  # both norms, and ReLU
