"""Losses of detectors: sums over rows. What they are divided by counts the rows of all ranks (tasks/detect.py).

Shape legend: N rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.config.options.detect_options import BoxLoss
from swin_moe.models.detection.boxes import generalized_iou


def smooth_l1(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """Returns element by element |d| - beta / 2, or d^2 / (2 beta) below beta; beta 0 is the absolute error."""
    return F.smooth_l1_loss(predicted, target, reduction="none", beta=beta)


def box_loss(kind: BoxLoss, predicted_N4: Tensor, target_N4: Tensor, *, beta: float = 1.0) -> Tensor:
    """Returns (N,) losses: of codes with l1 and smooth_l1, of boxes with giou (1 - generalized IoU).

    beta: Of smooth_l1.
    """
    if kind == "giou":
        return 1 - generalized_iou(predicted_N4, target_N4)
    return smooth_l1(predicted_N4, target_N4, beta if kind == "smooth_l1" else 0.0).sum(dim=1)


def mask_loss(logits_NHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Returns the sum over rows of the mean binary cross entropy of a mask's pixels, a scalar."""
    pixels = logits_NHW.shape[1] * logits_NHW.shape[2]
    return F.binary_cross_entropy_with_logits(logits_NHW, target_NHW.to(logits_NHW.dtype), reduction="sum") / pixels


def semantic_loss(logits_BKHW: Tensor, label_BHW: Tensor, ignored: int = 255) -> tuple[Tensor, Tensor]:
    """Returns (sum of cross entropies over labelled pixels, their number), scalars."""
    total = F.cross_entropy(logits_BKHW, label_BHW, ignore_index=ignored, reduction="sum")
    return total, (label_BHW != ignored).sum().to(torch.float64)
