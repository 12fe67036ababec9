"""Features of boxes, each from the level whose cells suit its size.

Facts: arXiv:1612.03144, equation 1; open-mmlab/mmdetection 2.11.0, single_level_roi_extractor.py.

Shape legend: R boxes, C channels, S bins per side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swin_moe.models.detection.boxes import areas
from swin_moe.ops.detection.roi_align import roi_align


def levels_of(rois_R5: Tensor, *, finest_scale: float, levels: int) -> Tensor:
    """Returns (R,) int64, the level of each box: 0 up to a side of 2 x finest_scale, then one more per doubling."""
    side = areas(rois_R5[:, 1:]).sqrt()
    return (side / finest_scale + 1e-6).log2().floor().clamp(0, levels - 1).to(torch.int64)


def region_features(
    maps: Sequence[Tensor], rois_R5: Tensor, size: int, strides: Sequence[int], *, finest_scale: float
) -> Tensor:
    """Returns (R, C, S, S) with gradients to the maps, of which every one takes part whatever the boxes are.

    maps: (B, C, H_i, W_i), one per stride; rois: image index and box in pixels.
    """
    level_R = levels_of(rois_R5, finest_scale=finest_scale, levels=len(maps))
    rows = [(level_R == level).nonzero().flatten() for level in range(len(maps))]
    parts = [roi_align(x, rois_R5[r], size, 1 / stride) for x, r, stride in zip(maps, rows, strides)]
    return torch.cat(parts)[torch.cat(rows).argsort()]
