"""The obvious forms of the detection operators, box by box and sample by sample, and random cases for them."""

import math

import numpy as np
import torch
from torch import Tensor


def overlap(a: np.ndarray, b: np.ndarray) -> np.floating:
    """Returns the intersection over union of two boxes, 0 without area or with what is no number."""
    zero = a.dtype.type(0)
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, zero) * max(height, zero)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else zero


def nms(boxes: Tensor, scores: Tensor, threshold: float, groups: Tensor | None) -> list[int]:
    """Returns the rows that stay."""
    rows = boxes.numpy()
    kept: list[int] = []
    limit = rows.dtype.type(threshold)
    for row in sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i)):
        rivals = [k for k in kept if groups is None or groups[k] == groups[row]]
        if all(overlap(rows[k], rows[row]) <= limit for k in rivals):
            kept.append(row)
    return kept


def soft_nms(
    boxes: Tensor, scores: Tensor, threshold: float, groups: Tensor | None, gaussian: bool, sigma: float, least: float
) -> list[tuple[int, float]]:
    """Returns the rows that stay and their scores, by falling score; in the dtype of the boxes."""
    rows, kind = boxes.numpy(), boxes.numpy().dtype.type
    left = {row: kind(score) for row, score in enumerate(scores.tolist()) if score >= least}
    found = []
    while left:
        best = max(left, key=lambda row: (left[row], -row))
        found.append((best, float(left.pop(best))))
        for row in list(left):
            if groups is None or groups[row] == groups[best]:
                shared = overlap(rows[best], rows[row])
                if gaussian:
                    left[row] *= kind(math.exp(-(float(shared) ** 2) / sigma))
                elif shared > kind(threshold):
                    left[row] *= kind(1) - shared
                if left[row] < least:
                    del left[row]
    return found


def roi_align(features: Tensor, rois: Tensor, size: int, scale: float, sampling: int, aligned: bool) -> np.ndarray:
    """Returns (R, C, S, S) in float64, sample by sample; places in the dtype of the boxes."""
    maps, kind = features.double().numpy(), rois.numpy().dtype.type
    out = np.zeros((len(rois), maps.shape[1], size, size))
    for r, roi in enumerate(rois.numpy()):
        offset = kind(0.5 if aligned else 0)
        low = [roi[2] * kind(scale) - offset, roi[1] * kind(scale) - offset]  # y, x
        side = [roi[4] * kind(scale) - offset - low[0], roi[3] * kind(scale) - offset - low[1]]
        side = side if aligned else [max(one, kind(1)) for one in side]
        bins = [one / kind(size) for one in side]
        counts = [sampling or max(math.ceil(one), 0) for one in bins]
        for i, j in np.ndindex(size, size):
            for k, n in np.ndindex(*counts):
                y = low[0] + kind(i) * bins[0] + (kind(k) + kind(0.5)) * bins[0] / kind(counts[0])
                x = low[1] + kind(j) * bins[1] + (kind(n) + kind(0.5)) * bins[1] / kind(counts[1])
                out[r, :, i, j] += _sample(maps[int(roi[0])], float(y), float(x))
        out[r] /= max(counts[0] * counts[1], 1)
    return out


def _sample(cells: np.ndarray, y: float, x: float) -> np.ndarray | float:
    height, width = cells.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, along = y - top, x - left
    upper = (1 - along) * cells[:, top, left] + along * cells[:, top, right]
    lower = (1 - along) * cells[:, below, left] + along * cells[:, below, right]
    return (1 - down) * upper + down * lower


def random_boxes(seed: int, dtype: torch.dtype, *, extent: float = 100.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns boxes, scores and groups of a random case: none, equal ones, without area, turned over, far, huge."""
    g = torch.Generator().manual_seed(seed)
    count = int(torch.randint(0, 30, (), generator=g)) if seed % 10 else seed % 3
    centre = torch.rand(count, 2, generator=g, dtype=dtype) * extent
    side = torch.rand(count, 2, generator=g, dtype=dtype) * extent / 2
    kind = torch.randint(0, 12, (count, 1), generator=g)
    side = torch.where(kind == 0, torch.zeros_like(side), side)
    side = torch.where(kind == 1, -side, side)
    side = torch.where(kind == 2, side * 1e4, side)
    centre = torch.where(kind == 3, centre - 3 * extent, centre)
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
    if seed % 3 == 0:
        boxes = boxes.round()  # overlaps that are fractions of whole numbers, and equal boxes
    if count > 4:
        boxes[1] = boxes[0]
    scores = torch.rand(count, generator=g, dtype=dtype)
    scores = (scores * 4).round() / 4 if seed % 2 else scores  # many equal ones
    groups = torch.randint(-1, 3, (count,), generator=g) if seed % 4 < 2 else None
    return boxes, scores, groups
