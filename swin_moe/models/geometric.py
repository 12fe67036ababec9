"""Position-bias tables for another window by the geometric rule of SimMIM and BEiT: a spline through growing offsets.

Shape legend: L offsets of a bias table, H heads, S source and T target positions.
"""

import math

import torch
from torch import Tensor


def resize_bias_table_geometric(table_LH: Tensor, window: int) -> Tensor:
    """Returns a bias table for another window, (2 * window - 1) ** 2 x H, by the geometric rule of SimMIM and BEiT.

    The offsets of the source lie at geometrically growing positions that reach as far as the target's whole numbers; in
    between, a bicubic spline through all of them (SciPy's interp2d(kind="cubic"), gone since SciPy 1.14).
    """
    source, target = side_of(table_LH.shape[0]), 2 * window - 1
    if source < 5:
        raise ValueError(f"geometric interpolation needs a window of at least 3, the file's is {(source + 1) // 2}")
    positions = torch.tensor(geometric_positions(source, target), dtype=torch.float64)
    wanted = torch.arange(target, dtype=torch.float64) - target // 2
    weight_TS = spline_matrix(positions, wanted.clamp(positions[0], positions[-1])).to(table_LH.device)
    image_HSS = table_LH.double().t().unflatten(1, (source, source))
    resized_HTT = weight_TS @ image_HSS @ weight_TS.t()
    return resized_HTT.flatten(1).t().contiguous().to(table_LH.dtype)


def geometric_positions(source: int, target: int) -> list[float]:
    """Returns the positions of `source` (odd) offsets: 0, +-1, +-(1 + q), +-(1 + q + q^2), ... up to about target // 2.

    q by bisection in [1.01, 1.5] to 1e-6, the bounds of utils_simmim.py, so that tables equal the official ones.
    """
    half = source // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        reach = (1 - q**half) / (1 - q)
        low, high = (low, q) if reach > target // 2 else (q, high)
    right = [sum(q**power for power in range(count)) for count in range(1, half + 1)]
    return [-x for x in reversed(right)] + [0.0, *right]


def spline_matrix(positions_S: Tensor, wanted_T: Tensor) -> Tensor:
    """Returns (T, S) float64: the cubic not-a-knot spline through values at S rising positions, read at T places.

    Not-a-knot: no jump of the third derivative at the second and last-but-one position, as FITPACK interpolates.
    """
    count = len(positions_S)
    step = positions_S.diff()
    left, right = torch.zeros(2, count, count, dtype=torch.float64)  # left @ second derivatives = right @ values
    for i in range(1, count - 1):
        a, b = step[i - 1], step[i]
        left[i, i - 1 : i + 2] = torch.stack((a, 2 * (a + b), b))
        right[i, i - 1 : i + 2] = 6 * torch.stack((1 / a, -1 / a - 1 / b, 1 / b))
    for row, i in ((0, 1), (count - 1, count - 2)):
        a, b = step[i - 1], step[i]
        left[row, i - 1 : i + 2] = torch.stack((b, -(a + b), a))
    curvature = torch.linalg.solve(left, right)
    cell = (torch.searchsorted(positions_S, wanted_T, right=True) - 1).clamp(0, count - 2)
    width = step[cell]
    b = (wanted_T - positions_S[cell]) / width
    identity = torch.eye(count, dtype=torch.float64)
    linear = (1 - b)[:, None] * identity[cell] + b[:, None] * identity[cell + 1]
    bend_left, bend_right = (((1 - b) ** 3 - (1 - b)), b**3 - b)
    bend = bend_left[:, None] * curvature[cell] + bend_right[:, None] * curvature[cell + 1]
    return linear + bend * (width**2 / 6)[:, None]


def side_of(length: int) -> int:
    """Returns the side of a square of `length` elements; raises ValueError where it is none."""
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"{length} rows are no square, so there is nothing to interpolate over")
    return side
