"""Non-maximum suppression: of boxes that overlap, the one with the largest score stays.

Shape legend: N boxes, K that stay.
"""

import torch
from torch import Tensor


def overlaps(boxes_N4: Tensor) -> Tensor:
    """Returns (N, N) intersection over union of boxes x1, y1, x2, y2; boxes without area overlap nothing."""
    low = torch.maximum(boxes_N4[:, None, :2], boxes_N4[None, :, :2])
    high = torch.minimum(boxes_N4[:, None, 2:], boxes_N4[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    area = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(dim=1)
    union = area[:, None] + area[None] - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))


def nms(boxes_N4: Tensor, scores_N: Tensor, threshold: float, groups_N: Tensor | None = None) -> Tensor:
    """Returns (K,) int64, the boxes that stay by falling score, those of equal score in input order.

    A box goes where one that stays before it overlaps it by more than the threshold.

    groups: (N,) int64; boxes of different groups never meet. None = all meet.
    """
    order = scores_N.argsort(descending=True, stable=True)
    stays = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    groups = torch.zeros_like(order) if groups_N is None else groups_N[order]
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        stays[rows] = _greedy(overlaps(boxes_N4[order[rows]]) > threshold)
    return order[stays]


def _greedy(meets_NN: Tensor) -> Tensor:
    """Returns (N,) bool, who stays of boxes in falling order; meets: who would suppress whom."""
    meets = meets_NN.cpu()
    stays = torch.ones(len(meets), dtype=torch.bool)
    for row in range(len(meets)):
        if stays[row]:
            stays[row + 1 :] &= ~meets[row, row + 1 :]
    return stays.to(meets_NN.device)
