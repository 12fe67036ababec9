"""What every cell learns: which object, from near its middle or from the first set of points, and which corners.

Facts: arXiv:2007.08508, arXiv:1912.02424 (ATSS), arXiv:1808.01244 (bumps); SwinTransformer/
Swin-Transformer-Object-Detection, mmdet/core/bbox/assigners (point_assigner_v2.py, atss_assigner.py,
point_hm_assigner.py).

Shape legend: N cells of all levels, G objects of one image, K classes, H x W cells of the finest level.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.models.detection.boxes import areas, intersection_over_union

_SMALLEST_SIDE = 1e-6  # that sides are divided by at least
_INSIDE = 0.01  # pixels that a middle lies within a box at least


def _middles(boxes_N4: Tensor) -> Tensor:
    return (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2


def _best_object(value_GN: Tensor, candidate_GN: Tensor) -> Tensor:
    """Returns (N,) int64: 1 + the candidates' object of the largest value, the first of equals; 0 = none's."""
    if not len(value_GN):
        return value_GN.new_zeros(value_GN.shape[1], dtype=torch.int64)
    value_GN = value_GN.masked_fill(~candidate_GN, -torch.inf)
    return torch.where(candidate_GN.any(dim=0), value_GN.argmax(dim=0) + 1, 0)


def by_middle(
    cells_N2: Tensor,
    level_N: Tensor,
    usable_N: Tensor,
    boxes_G4: Tensor,
    *,
    smallest: float,
    levels: int,
    middle_G2: Tensor | None = None,
) -> Tensor:
    """Returns (N,) int64, 1 + the object or 0: an object has the usable cell of its level that is nearest to its
    middle, in its sides; a cell that is so to several has the nearest.

    Args:
        smallest: Side of an object that begins with the first level, pixels; one of twice that has the next.
        middle: Of the objects' masks; None = of their boxes.
    """
    middle_G2 = _middles(boxes_G4) if middle_G2 is None else middle_G2
    side_G2 = (boxes_G4[:, 2:] - boxes_G4[:, :2]).clamp(min=_SMALLEST_SIDE)
    wanted_G = ((side_G2 / smallest).log2().sum(dim=1) / 2).trunc().clamp(0, levels - 1)
    distance_GN = ((cells_N2 - middle_G2[:, None]) / side_G2[:, None]).norm(dim=2)
    own_GN = (level_N == wanted_G[:, None]) & usable_N
    nearest_G1 = distance_GN.masked_fill(~own_GN, torch.inf).argmin(dim=1, keepdim=True)
    candidate_GN = torch.zeros_like(own_GN).scatter(1, nearest_G1, True) & own_GN
    return _best_object(-distance_GN, candidate_GN)


def by_overlap(
    found_N4: Tensor,
    level_N: Tensor,
    usable_N: Tensor,
    boxes_G4: Tensor,
    *,
    nearest: int,
    levels: int,
    middle_G2: Tensor | None = None,
) -> Tensor:
    """Returns (N,) int64, 1 + the object or 0. Candidates of an object are the usable boxes whose middles are nearest
    to its own, `nearest` of each level; it has those that overlap it at least as much as the mean of all candidates and
    a standard deviation more, with their middle inside. A box of several objects has that of the largest overlap.

    middle: Of the objects' masks; None = of their boxes.
    """
    overlap_GN = intersection_over_union(boxes_G4, found_N4)
    middle_N2 = _middles(found_N4)
    distance_GN = (middle_N2 - (_middles(boxes_G4) if middle_G2 is None else middle_G2)[:, None]).norm(dim=2)
    candidate_GN = torch.zeros_like(overlap_GN, dtype=torch.bool)
    for level in range(levels):
        rows = ((level_N == level) & usable_N).nonzero().flatten()
        order = distance_GN[:, rows].argsort(dim=1, stable=True)[:, :nearest]
        candidate_GN.scatter_(1, rows[order], True)
    count_G1 = candidate_GN.sum(dim=1, keepdim=True)
    mean_G1 = (overlap_GN * candidate_GN).sum(dim=1, keepdim=True) / count_G1.clamp(min=1)
    square_G1 = ((overlap_GN - mean_G1).square() * candidate_GN).sum(dim=1, keepdim=True)
    least_G1 = mean_G1 + (square_G1 / (count_G1 - 1).clamp(min=1)).sqrt()
    low, high = middle_N2 - boxes_G4[:, None, :2], boxes_G4[:, None, 2:] - middle_N2
    within_GN = torch.cat([low, high], dim=2).amin(dim=2) > _INSIDE
    return _best_object(overlap_GN, candidate_GN & (overlap_GN >= least_G1) & within_GN)


class Corners(NamedTuple):
    """One corner of every object, as all levels see it."""

    bump: Tensor  # (N,) in [0, 1]; 1 = the corner's own cell
    step: Tensor  # (N, 2), x and y from an own cell to its corner, in strides


def bump_radius(boxes_G4: Tensor, overlap: float) -> Tensor:
    """Returns (G,) pixels: how far the corners of a box may move, in the worst way, for an overlap of this much."""
    sides, area = (boxes_G4[:, 2:] - boxes_G4[:, :2]).sum(dim=1), areas(boxes_G4)

    def root(square: float, shift: Tensor, rest: Tensor, sign: int) -> Tensor:
        return (shift + sign * (shift.square() - 4 * square * rest).clamp(min=0).sqrt()) / (2 * square)

    both = root(1, sides, area * (1 - overlap) / (1 + overlap), -1)  # one corner in, the other out
    smaller = root(4, 2 * sides, area * (1 - overlap), -1)
    larger = root(4 * overlap, -2 * overlap * sides, area * (overlap - 1), 1)
    return torch.stack([both, smaller, larger]).amin(dim=0)


def corners_of(
    cells_N2: Tensor,
    level_N: Tensor,
    stride_N: Tensor,
    usable_N: Tensor,
    corner_G2: Tensor,
    radius_G: Tensor,
    *,
    levels: int,
) -> Corners:
    """Returns the bumps of a corner of all objects on every level: 1 at the usable cell that is nearest to it, and
    falling as a normal distribution within the radius, a sixth of whose 2 r + 1 is its deviation. Of a cell that is
    nearest to several corners the last one counts."""
    if not len(corner_G2):
        return Corners(torch.zeros_like(stride_N), torch.zeros_like(cells_N2))
    distance_GN = (cells_N2 - corner_G2[:, None]).norm(dim=2)
    sigma_G1 = (2 * radius_G[:, None] + 1) / 6
    height_GN = (-distance_GN.square() / (2 * sigma_G1.square())).exp()
    bump_N = height_GN.masked_fill(distance_GN >= radius_G[:, None], 0).amax(dim=0) * usable_N
    own_GN = torch.zeros_like(distance_GN, dtype=torch.bool)
    for level in range(levels):
        on_level_N = (level_N == level) & usable_N
        nearest_G1 = distance_GN.masked_fill(~on_level_N, torch.inf).argmin(dim=1, keepdim=True)
        own_GN |= torch.zeros_like(own_GN).scatter(1, nearest_G1, True) & on_level_N
    number_G1 = torch.arange(1, len(corner_G2) + 1, device=cells_N2.device)[:, None]
    last_N = (own_GN * number_G1).amax(dim=0)
    step_N2 = (corner_G2[last_N - 1] - cells_N2) / stride_N[:, None]
    own_N = last_N > 0
    return Corners(torch.where(own_N, 1.0, bump_N), step_N2 * own_N[:, None])


def weights_inside(
    boxes_G4: Tensor, label_G: Tensor, classes: int, sizes: list[tuple[int, int]], stride: int
) -> Tensor:
    """Returns (N, K): for every cell of every level and every class the weight of the smallest box of that class that
    it lies in, stride^2 / area; 0 = it lies in none.

    Args:
        sizes: (H, W) of every level. stride: Of the first one; the others are looked up in it.
    """
    finest = boxes_G4.new_zeros(classes, *sizes[0])
    area_G = areas(boxes_G4).clamp(min=_SMALLEST_SIDE)
    places = (boxes_G4 / stride).to(torch.int64).tolist()
    for row in area_G.argsort(descending=True, stable=True).tolist():
        left, top, right, bottom = places[row]
        finest[label_G[row], top : bottom + 1, left : right + 1] = stride**2 / area_G[row]
    levels = [F.interpolate(finest[None], size=size, mode="nearest")[0].flatten(1) for size in sizes]
    return torch.cat(levels, dim=1).T
