"""Features of boxes by bilinear samples (arXiv:1703.06870, section 3).

Sampling is separable: a box has one matrix of its bins over rows and one over columns of the map.

Shape legend: B images, C channels, H x W of the map, R boxes, S bins per side.
"""

import torch
from torch import Tensor

AT_ONCE = 32  # boxes whose intermediate products are in memory together


def roi_align(
    features: Tensor, rois_R5: Tensor, size: int, scale: float, sampling: int = 0, aligned: bool = True
) -> Tensor:
    """Returns (R, C, S, S), means of each bin's samples, with gradients to the features.

    Args:
        features: (B, C, H, W).
        rois: Image index and box x1, y1, x2, y2 in pixels.
        size: S.
        scale: Cells of the map per pixel.
        sampling: Samples of a bin per axis; 0 = as many as a bin has cells, rounded up.
        aligned: Pixel centres are at half-integers; else as before that was mended, with sides of at least one cell.
    """
    image_R, box_R4 = rois_R5[:, 0].to(torch.int64), rois_R5[:, 1:] * scale - (0.5 if aligned else 0.0)
    low, side = box_R4[:, :2], box_R4[:, 2:] - box_R4[:, :2]
    side = side if aligned else side.clamp(min=1.0)
    x = _axis(low[:, 0], side[:, 0], size, features.shape[3], sampling).to(features.dtype)
    y = _axis(low[:, 1], side[:, 1], size, features.shape[2], sampling).to(features.dtype)
    parts = [features.new_zeros(0, features.shape[1], size, size) + features.sum() * 0]  # takes part without boxes
    for start in range(0, len(rois_R5), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        across = torch.einsum("rchw,rsw->rchs", features[image_R[rows]], x[rows])
        parts.append(torch.einsum("rth,rchs->rcts", y[rows], across))
    return torch.cat(parts)


def _axis(low_R: Tensor, side_R: Tensor, bins: int, cells: int, sampling: int) -> Tensor:
    """Returns (R, S, cells): the weight of every cell of an axis in the mean of every bin."""
    bin_R = side_R / bins
    count_R = torch.full_like(bin_R, sampling) if sampling else bin_R.ceil().clamp(min=0)
    most = int(count_R.amax()) if len(count_R) else 0
    step = torch.arange(most, dtype=low_R.dtype, device=low_R.device)
    number = torch.arange(bins, dtype=low_R.dtype, device=low_R.device)[:, None]
    place = low_R[:, None, None] + number * bin_R[:, None, None]
    place = place + (step + 0.5) * (bin_R / count_R.clamp(min=1))[:, None, None]  # (R, S, samples)
    seen = (place >= -1) & (place <= cells) & (step < count_R[:, None, None])
    place = place.clamp(0, cells - 1)
    first = place.floor().to(torch.int64)
    share = place - first
    weights = low_R.new_zeros(len(low_R), bins, cells)
    weights.scatter_add_(2, first, (1 - share) * seen)
    weights.scatter_add_(2, (first + 1).clamp(max=cells - 1), share * seen)
    return weights / count_R.clamp(min=1)[:, None, None]
