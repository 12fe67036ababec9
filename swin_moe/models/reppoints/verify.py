"""Corners of boxes, moved to where a corner is verified.

Facts: arXiv:2007.08508, section 3.3; SwinTransformer/Swin-Transformer-Object-Detection, mmdet/models/dense_heads/
reppoints_v2_head.py: boxes of the second and third level look at the first one's corners, those of coarser levels at
the second one's, and those of the first at none.

Shape legend: N cells of all levels, R boxes.
"""

import torch
from torch import Tensor

from swin_moe.models.reppoints.head import Said

LOOKS_AT = (None, 0, 0, 1)  # by level; coarser ones as the last


def verified(said: Said, image: int, rows_R: Tensor, boxes_R4: Tensor) -> Tensor:
    """Returns the boxes (R, 4) of an image with each corner where it is most probable among the four cells around it.

    rows: (R,) int64, the cells that the boxes are of.
    """
    boxes_R4 = boxes_R4.clone()
    level_R = said.level[rows_R]
    for level in range(len(said.sizes)):
        finer = LOOKS_AT[min(level, len(LOOKS_AT) - 1)]
        own = (level_R == level).nonzero().flatten()
        if finer is None or not len(own):
            continue
        for side in (0, 1):
            corner = boxes_R4[own, 2 * side : 2 * side + 2]
            boxes_R4[own, 2 * side : 2 * side + 2] = _nearby(said, image, finer, side, corner)
    return boxes_R4


def _nearby(said: Said, image: int, level: int, side: int, corner_R2: Tensor) -> Tensor:
    """Returns (R, 2), the corners that the most probable of the four cells around each has a step to."""
    height, width = said.sizes[level]
    start = sum(h * w for h, w in said.sizes[:level])
    place = slice(start, start + height * width)
    logits, steps = said.corners[image, place, side], said.steps[image, place, 2 * side : 2 * side + 2]
    stride = said.stride[start]
    limits = corner_R2.new_tensor([max(width - 2, 0), max(height - 2, 0)])
    base = torch.minimum((corner_R2 / stride).floor().clamp(min=0), limits).to(torch.int64)
    cells = []
    for down in (0, 1):
        for right in (0, 1):
            x, y = (base[:, 0] + right).clamp(max=width - 1), (base[:, 1] + down).clamp(max=height - 1)
            cells.append(y * width + x)
    around_R4 = torch.stack(cells, dim=1)
    best_R1 = logits[around_R4].argmax(dim=1, keepdim=True)
    chosen_R = around_R4.gather(1, best_R1)[:, 0]
    return said.cells[place][chosen_R] + steps[chosen_R] * stride
