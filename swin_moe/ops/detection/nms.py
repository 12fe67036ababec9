"""Non-maximum suppression: of boxes that overlap, the one with the largest score stays.

Compiled kernels are in csrc/detection/nms.cpp and csrc/cuda/detection/nms.cu; elsewhere the operator runs the plain
form of this file.

Shape legend: N boxes, K that stay.
"""

import torch
from torch import Tensor

from swin_moe.ops import extension

SCHEMA = "nms(Tensor boxes, Tensor scores, Tensor? groups, float threshold) -> Tensor"


def nms(boxes_N4: Tensor, scores_N: Tensor, threshold: float, groups_N: Tensor | None = None) -> Tensor:
    """Returns (K,) int64, the boxes that stay by falling score, those of equal score in input order.

    A box goes where one that stays before it overlaps it by more than the threshold. A box without area, or with a
    coordinate that is no number, overlaps nothing and stays. Overlaps are float64 where a tensor is, else float32.

    Args:
        boxes: x1, y1, x2, y2.
        groups: (N,) int64; boxes of different groups never meet. None = all meet.

    Raises:
        ValueError: A shape or dtype that is not allowed.
    """
    boxes_N4, scores_N = as_float(boxes_N4, scores_N)
    return torch.ops.swin_moe.nms(boxes_N4, scores_N, groups_N, threshold)


def as_float(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both, without gradients, in float64 where one of them is and in float32 otherwise."""
    dtype = torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32
    return boxes.detach().to(dtype), scores.detach().to(dtype)


def overlaps(boxes_N4: Tensor) -> Tensor:
    """Returns (N, N) intersection over union of boxes x1, y1, x2, y2; boxes without area overlap nothing."""
    low = torch.maximum(boxes_N4[:, None, :2], boxes_N4[None, :, :2])
    high = torch.minimum(boxes_N4[:, None, 2:], boxes_N4[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    area = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(dim=1)
    union = area[:, None] + area[None] - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))


def check_boxes(name: str, boxes: Tensor, scores: Tensor, groups: Tensor | None) -> None:
    """Raises ValueError unless boxes are (N, 4), and scores and groups (N,)."""
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: boxes must be (N, 4), got {tuple(boxes.shape)}")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"{name}: scores must be ({len(boxes)},), got {tuple(scores.shape)}")
    if groups is not None and (groups.shape != boxes.shape[:1] or groups.dtype != torch.int64):
        raise ValueError(f"{name}: groups must be ({len(boxes)},) of int64, got {tuple(groups.shape)}, {groups.dtype}")


def _nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, threshold: float) -> Tensor:
    check_boxes("nms", boxes, scores, groups)
    order = scores.argsort(descending=True, stable=True)
    stays = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    sorted_groups = torch.zeros_like(order) if groups is None else groups[order]
    for group in sorted_groups.unique():
        rows = (sorted_groups == group).nonzero().flatten()
        stays[rows] = _greedy(overlaps(boxes[order[rows]]) > threshold)
    return order[stays]


def _greedy(meets_NN: Tensor) -> Tensor:
    """Returns (N,) bool, who stays of boxes in falling order; meets: who would suppress whom."""
    meets = meets_NN.cpu()
    stays = torch.ones(len(meets), dtype=torch.bool)
    for row in range(len(meets)):
        if stays[row]:
            stays[row + 1 :] &= ~meets[row, row + 1 :]
    return stays.to(meets_NN.device)


def _fake(boxes: Tensor, scores: Tensor, groups: Tensor | None, threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


extension.register(SCHEMA, _nms, _fake)
