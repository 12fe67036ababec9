"""Anchors: boxes of a few shapes around every cell of every level's map.

Facts: open-mmlab/mmdetection 2.11.0, mmdet/core/anchor/anchor_generator.py.

Shape legend: A shapes of a cell, N = H W A anchors of a level.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def base_anchors(stride: int, *, scale: float, ratios: Sequence[float]) -> Tensor:
    """Returns (A, 4) float32, around 0: side stride x scale at ratio 1, of the same area at other ratios.

    ratios: Height over width.
    """
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()
    width, height = stride / root * scale, stride * root * scale
    return torch.stack([-0.5 * width, -0.5 * height, 0.5 * width, 0.5 * height], dim=1)


def grid_anchors(base_A4: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Returns (N, 4): the anchors of a map, row by row, in a row by column, in a cell by shape."""
    rows, columns = (torch.arange(count, device=base_A4.device).to(base_A4) * stride for count in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=2).view(-1, 1, 4)
    return (shift + base_A4).view(-1, 4)


def valid_anchors(height: int, width: int, stride: int, image: tuple[int, int], shapes: int) -> Tensor:
    """Returns (N,) bool: which anchors have their cell on the image (height, width), and not in a batch's padding."""
    rows = torch.arange(height) < math.ceil(image[0] / stride)
    columns = torch.arange(width) < math.ceil(image[1] / stride)
    return (rows[:, None] & columns).flatten().repeat_interleave(shapes)


def inside(anchors_N4: Tensor, image: tuple[int, int], border: float) -> Tensor:
    """Returns (N,) bool: which lie on the image (height, width), or less than `border` pixels beyond its edges."""
    low = (anchors_N4[:, :2] >= -border).all(dim=1)
    return low & (anchors_N4[:, 2] < image[1] + border) & (anchors_N4[:, 3] < image[0] + border)
