"""Multiply-accumulates of dense networks at any size of image, as the published tables count them.

The counter is mmcv 1.3.0's (mmcv/cnn/utils/flops_counter.py): convolutions count products and biases, linear layers
products alone, LayerNorm two operations an element, ReLU and pooling one; batch norm over ranks, GELU, softmax and
interpolation count nothing. It does not see the two products of attention, which the published numbers add over padded
windows. A MoE block counts as if every token visited one expert.

Shape legend: H x W of a map.
"""

import math
from collections.abc import Sequence

from torch import nn

from swin_moe.config import ModelConfig
from swin_moe.config.variants import VARIANTS
from swin_moe.models.dense.layers import ConvModule

Size = tuple[int, int]


def map_sizes(config: ModelConfig, size: Size) -> list[Size]:
    """Returns the (H, W) of every stage's map of an image of this (height, width)."""
    first = tuple(math.ceil(side / patch) for side, patch in zip(size, config.patch_size))
    return [(math.ceil(first[0] / 2**i), math.ceil(first[1] / 2**i)) for i in range(len(config.depths))]


def convolution(layer: nn.Conv2d, size: Size) -> int:
    """Returns the count of a convolution whose output is of this size."""
    products = math.prod(layer.kernel_size) * layer.in_channels // layer.groups
    return math.prod(size) * layer.out_channels * (products + (layer.bias is not None))


def conv_module(module: ConvModule, size: Size) -> int:
    """Returns the count of a convolution and what follows it: ReLU counts its elements, group norm twice as many, batch
    norm nothing."""
    each = module.activation + 2 * (module.gn is not None)
    return convolution(module.conv, size) + each * math.prod(size) * module.conv.out_channels


def backbone(config: ModelConfig, size: Size, out_indices: Sequence[int]) -> tuple[int, int]:
    """Returns (what the counter sees, the two products of attention) of one image of this (height, width)."""
    sizes = map_sizes(config, size)
    variant, ratio, window = VARIANTS[config.name], config.mlp_ratio, config.window_size
    patches = math.prod(sizes[0]) * config.embed_dim
    seen = patches * (config.in_chans * math.prod(config.patch_size) + 1) + 2 * patches * config.patch_norm
    attention = 0
    for stage, (height, width) in enumerate(sizes):
        dim, tokens = config.embed_dim * 2**stage, height * width
        windows = math.ceil(height / window) * math.ceil(width / window)
        padded = windows * window**2
        for _ in range(config.depths[stage]):
            seen += 2 * 2 * tokens * dim + round(2 * tokens * dim * dim * ratio)
            if variant.mixer == "window":
                seen += 4 * padded * dim * dim
                attention += 2 * windows * window**4 * dim
            else:
                seen += windows * window**4 * dim
        if stage in out_indices:
            seen += 2 * tokens * dim
        if stage < len(sizes) - 1:
            merged = math.ceil(height / 2) * math.ceil(width / 2)
            norm = 2 * dim if variant.merge_norm == "after" else 4 * dim
            seen += merged * (2 * norm + 8 * dim * dim)
    return seen, attention
