"""Soft non-maximum suppression: boxes lose score to better ones that they overlap (arXiv:1704.04503).

Shape legend: N boxes, K that stay.
"""

from typing import Literal

import torch
from torch import Tensor

from swin_moe.ops.detection.nms import overlaps


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
    """Returns (K,) int64, boxes by falling new score, and (K,) their new scores.

    Args:
        threshold: Overlap beyond which a box loses score with the linear method, times 1 - overlap.
        groups: (N,) int64; boxes of different groups never meet. None = all meet.
        sigma: Of the gaussian method, by which every box loses score, times exp(-overlap^2 / sigma).
        min_score: Boxes below it go.
    """
    overlap = overlaps(boxes_N4)
    if groups_N is not None:
        overlap = overlap * (groups_N[:, None] == groups_N[None])
    decay = (-overlap.square() / sigma).exp()
    if method == "linear":
        decay = torch.where(overlap > threshold, 1 - overlap, torch.ones_like(overlap))
    left, kept, found = scores_N.clone(), [], []
    for _ in range(len(left)):
        best = int(left.argmax())
        if left[best] < min_score:
            break
        kept.append(best)
        found.append(left[best])
        left = left * decay[best]
        left[best] = -torch.inf
    rows = torch.tensor(kept, dtype=torch.int64, device=boxes_N4.device)
    return rows, torch.stack(found) if found else scores_N[:0]
