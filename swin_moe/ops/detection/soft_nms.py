"""Soft non-maximum suppression: boxes lose score to better ones that they overlap (arXiv:1704.04503).

Compiled kernels are in csrc/detection/soft_nms.cpp and csrc/cuda/detection/soft_nms.cu; elsewhere the operator runs the
plain form of this file. The operator gives every box its new score; which boxes stay, and in what order, follows from
these.

Shape legend: N boxes, K that stay.
"""

from typing import Literal

import torch
from torch import Tensor

from swin_moe.ops import extension
from swin_moe.ops.detection.nms import as_float, check_boxes, overlaps

SCHEMA = (
    "soft_nms(Tensor boxes, Tensor scores, Tensor? groups, float threshold, float sigma, bool gaussian, "
    "float min_score) -> Tensor"
)


def soft_nms(
    boxes_N4: Tensor,
    scores_N: Tensor,
    threshold: float,
    groups_N: Tensor | None = None,
    *,
    method: Literal["linear", "gaussian"] = "linear",
    sigma: float = 0.5,
    min_score: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Returns (K,) int64, boxes by falling new score (equal ones in input order), and (K,) their new scores.

    Args:
        boxes: x1, y1, x2, y2.
        threshold: Overlap beyond which a box loses score with the linear method, times 1 - overlap.
        groups: (N,) int64; boxes of different groups never meet. None = all meet.
        sigma: Of the gaussian method, by which every box loses score, times exp(-overlap^2 / sigma).
        min_score: Boxes below it go, and those whose score is no number.

    Raises:
        ValueError: A method, shape or dtype that is not allowed.
    """
    if method not in ("linear", "gaussian"):
        raise ValueError(f"soft_nms: method must be linear or gaussian, got {method!r}")
    boxes, scores = as_float(boxes_N4, scores_N)
    new = torch.ops.swin_moe.soft_nms(boxes, scores, groups_N, threshold, sigma, method == "gaussian", min_score)
    order = new.argsort(descending=True, stable=True)
    order = order[new[order] > -torch.inf]
    return order, new[order]


def _soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    threshold: float,
    sigma: float,
    gaussian: bool,
    min_score: float,
) -> Tensor:
    check_boxes("soft_nms", boxes, scores, groups)
    if gaussian and sigma <= 0:
        raise ValueError(f"soft_nms: sigma must be above 0, got {sigma}")
    overlap = overlaps(boxes)
    if groups is not None:
        overlap = overlap * (groups[:, None] == groups[None])
    decay = (-(overlap * overlap) / sigma).exp()
    if not gaussian:
        decay = torch.where(overlap > threshold, 1 - overlap, torch.ones_like(overlap))
    final = torch.full_like(scores, -torch.inf)
    left = torch.where(scores >= min_score, scores, final)
    for _ in range(len(left)):
        best = (left == left.max()).nonzero()[0, 0]  # the first: argmax promises none of equal ones
        if left[best] == -torch.inf:
            break
        final[best] = left[best]
        left = left * decay[best]
        left[best] = -torch.inf
        left = torch.where(left >= min_score, left, -torch.inf)
    return final


def _fake(boxes: Tensor, scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.shape)


extension.register(SCHEMA, _soft_nms, _fake)
