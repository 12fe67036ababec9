"""Arithmetic of boxes: overlaps, the code of a box relative to another, clipping.

Facts: open-mmlab/mmdetection 2.11.0, mmdet/core/bbox (iou_calculators, coder/delta_xywh_bbox_coder.py).

Boxes are x1, y1, x2, y2 in pixels, the lower right corner exclusive. Shape legend: N, M boxes, K codes of a box.
"""

import math

import torch
from torch import Tensor

LARGEST_STEP = abs(math.log(16 / 1000))  # of a side's logarithm in one decoding
SMALLEST_AREA = 1e-6  # what areas are divided by at least
_GIOU_AREA = 1e-7


def areas(boxes_N4: Tensor) -> Tensor:
    """Returns (N,) areas, square pixels."""
    return (boxes_N4[..., 2] - boxes_N4[..., 0]) * (boxes_N4[..., 3] - boxes_N4[..., 1])


def _shared(a_N4: Tensor, b_M4: Tensor) -> Tensor:
    """Returns (N, M) areas that two boxes have in common."""
    low = torch.maximum(a_N4[:, None, :2], b_M4[None, :, :2])
    high = torch.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    return (high - low).clamp(min=0).prod(dim=2)


def intersection_over_union(a_N4: Tensor, b_M4: Tensor) -> Tensor:
    """Returns (N, M) in [0, 1]; boxes without area overlap nothing."""
    shared = _shared(a_N4, b_M4)
    union = areas(a_N4)[:, None] + areas(b_M4)[None] - shared
    return shared / union.clamp(min=SMALLEST_AREA)


def intersection_over_first(a_N4: Tensor, b_M4: Tensor) -> Tensor:
    """Returns (N, M): the share of every first box that lies in a second one."""
    return _shared(a_N4, b_M4) / areas(a_N4)[:, None].clamp(min=SMALLEST_AREA)


def _paired(a_N4: Tensor, b_N4: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (N,) areas that both boxes of a pair cover, and that either does."""
    low, high = torch.maximum(a_N4[:, :2], b_N4[:, :2]), torch.minimum(a_N4[:, 2:], b_N4[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    return shared, areas(a_N4) + areas(b_N4) - shared


def paired_iou(a_N4: Tensor, b_N4: Tensor) -> Tensor:
    """Returns (N,) in [0, 1], the overlaps of pairs of boxes."""
    shared, union = _paired(a_N4, b_N4)
    return (shared / union.clamp(min=SMALLEST_AREA)).clamp(max=1)


def generalized_iou(a_N4: Tensor, b_N4: Tensor) -> Tensor:
    """Returns (N,) in (-1, 1] of pairs of boxes (arXiv:1902.09630, equation 1), with gradients."""
    shared, union = _paired(a_N4, b_N4)
    union = union.clamp(min=_GIOU_AREA)
    outer_low, outer_high = torch.minimum(a_N4[:, :2], b_N4[:, :2]), torch.maximum(a_N4[:, 2:], b_N4[:, 2:])
    outer = (outer_high - outer_low).clamp(min=0).prod(dim=1).clamp(min=_GIOU_AREA)
    return shared / union - (outer - union) / outer


def _centres(boxes_N4: Tensor) -> tuple[Tensor, Tensor]:
    """Returns centres and sides, (N, 2) each."""
    return (boxes_N4[:, :2] + boxes_N4[:, 2:]) * 0.5, boxes_N4[:, 2:] - boxes_N4[:, :2]


def encode(boxes_N4: Tensor, targets_N4: Tensor, stds: tuple[float, ...]) -> Tensor:
    """Returns the codes (N, 4) from which `decode` makes the targets: steps of the centre in units of the box's sides
    and logarithms of the sides' ratios, divided by `stds`."""
    (centre, side), (target_centre, target_side) = _centres(boxes_N4), _centres(targets_N4)
    steps = torch.cat([(target_centre - centre) / side, (target_side / side).log()], dim=1)
    return steps / steps.new_tensor(stds)


def decode(boxes_N4: Tensor, codes: Tensor, stds: tuple[float, ...], size: Tensor | None = None) -> Tensor:
    """Returns the boxes (N, 4 K) that K codes of every box stand for.

    Args:
        codes: (N, 4 K); K is the number of classes, or 1.
        size: (N, 2) int64 or (2,), height and width that each box's results are clipped to; None = not clipped.
    """
    codes_NK4 = codes.unflatten(1, (codes.shape[1] // 4, 4)) * codes.new_tensor(stds)
    centre, side = (value[:, None] for value in _centres(boxes_N4))
    half = side * codes_NK4[..., 2:].clamp(-LARGEST_STEP, LARGEST_STEP).exp() * 0.5
    middle = centre + side * codes_NK4[..., :2]
    decoded = torch.cat([middle - half, middle + half], dim=2)
    if size is not None:
        decoded = clip(decoded, size.view(-1, 1, 2))
    return decoded.flatten(1)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Returns boxes (..., 4) within images; size: height and width (..., 2) that broadcast against them."""
    limits = size.flip(-1).repeat_interleave(2, dim=-1)[..., [0, 2, 1, 3]]  # width, height, width, height
    return torch.minimum(boxes.clamp(min=0), limits.to(boxes.dtype))


def rois_of(boxes: list[Tensor]) -> Tensor:
    """Returns (R, 5): image index and box of the boxes of every image, in the images' order."""
    assert boxes, "needs a dtype and device: callers have at least one image or an empty entry"
    return torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)])
