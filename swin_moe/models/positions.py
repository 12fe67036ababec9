"""Absolute positions of one network as those of another: (1, L, C) of classifiers, (1, C, H, W) of dense backbones.

Shape legend: L = H * W tokens, C channels.
"""

import math

import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def fitted_positions(value: Tensor, want: Tensor, *, old: Grid | None, new: Grid) -> tuple[Tensor, str]:
    """Returns (the embedding in the shape wanted, the rule that changed it; "" where numbers stay as they are).

    Args:
        old: (H, W) of a value (1, L, C); None = a square.
        new: (H, W) of what is wanted.

    Raises:
        ValueError: Other channels, or a length that is not the grid's; one clause.
    """
    image = value
    if value.ndim == 3:
        grid = old or (math.isqrt(value.shape[1]),) * 2
        if math.prod(grid) != value.shape[1]:
            told = f"its image has {grid[0]} x {grid[1]} tokens" if old else "no square, and nothing tells their image"
            raise ValueError(f"{value.shape[1]} positions in the file, {told}")
        image = value.transpose(1, 2).unflatten(2, grid)
    height, width = image.shape[2:]
    rule = "" if (height, width) == new else f"bicubic, {height} x {width} to {new[0]} x {new[1]} tokens"
    resized = F.interpolate(image.float(), size=new, mode="bicubic") if rule else image
    result = resized if want.ndim == 4 else resized.flatten(2).transpose(1, 2)
    if result.shape != want.shape:
        raise ValueError(f"shape {tuple(value.shape)} in the file, {tuple(want.shape)} in the model")
    return result, rule
