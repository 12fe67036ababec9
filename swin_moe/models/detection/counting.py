"""Multiply-accumulates of what stands beside a detector's backbone, as the published tables count them.

The official count (mmdetection 2.11.0, `forward_dummy`) sends 1,000 boxes through every box head and 100 through every
mask head; swin_moe/models/dense/counting.py says what it sees of a layer. ReLU after the proposal network's
convolution, and batch norm over ranks, count nothing there.
"""

import math
from collections.abc import Sequence

from swin_moe.models.dense import FPN
from swin_moe.models.dense.counting import Size, conv_module, convolution
from swin_moe.models.detection.heads.box_head import BoxHead
from swin_moe.models.detection.heads.htc import SemanticHead
from swin_moe.models.detection.heads.mask_head import MaskHead
from swin_moe.models.detection.heads.roi_head import RoIHead
from swin_moe.models.detection.heads.rpn import RegionProposals

BOXES, MASKS = 1000, 100


def beside_backbone(neck: FPN, rpn: RegionProposals, roi: RoIHead, maps: Sequence[Size]) -> int:
    """Returns the count for one image, whose backbone's maps have these sizes, finest first."""
    sizes = list(maps)
    while len(sizes) < neck.levels:
        sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
    total = sum(conv_module(conv, size) for conv, size in zip(neck.lateral_convs, sizes))
    total += sum(conv_module(conv, size) for conv, size in zip(neck.fpn_convs, sizes))
    total += sum(convolution(conv, size) for size in sizes for conv in (rpn.rpn_conv, rpn.rpn_cls, rpn.rpn_reg))
    if roi.spec.semantic is not None:
        total += _semantic_head(roi.semantic_head, sizes[roi.spec.semantic.level])
    total += BOXES * sum(map(_box_head, roi.box_heads))
    return total + MASKS * sum(map(_mask_head, roi.mask_heads))


def _box_head(head: BoxHead) -> int:
    bins = (head.spec.size, head.spec.size)
    total = sum(conv_module(conv, bins) for conv in head.shared_convs) if head.spec.convs else 0
    total += sum(fc.weight.numel() + fc.out_features for fc in head.shared_fcs)
    return total + head.fc_cls.weight.numel() + head.fc_reg.weight.numel()


def _mask_head(head: MaskHead) -> int:
    bins, channels = head.spec.size, head.upsample.out_channels
    pixels = (2 * bins, 2 * bins)
    total = sum(conv_module(conv, (bins, bins)) for conv in head.convs)
    if head.conv_res is not None:
        total += conv_module(head.conv_res, (bins, bins))
    total += bins**2 * head.upsample.weight.numel() + math.prod(pixels) * channels * 2  # its bias, and ReLU
    return total + convolution(head.conv_logits, pixels)


def _semantic_head(head: SemanticHead, size: Size) -> int:
    modules = (*head.lateral_convs, *head.convs, head.conv_embedding)
    return sum(conv_module(conv, size) for conv in modules) + convolution(head.conv_logits, size)
