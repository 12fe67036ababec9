"""Rows of gpu_smoke.py for the operators of detectors."""

from functools import partial

import torch
from smoke_problem import DTYPES, Case, Problem, draw
from torch import Tensor

from swin_moe.ops.detection import nms as suppression
from swin_moe.ops.detection import roi_align as align
from swin_moe.ops.detection.deform_conv import _columns
from swin_moe.ops.detection.soft_nms import _soft_nms

SIZES = {"small": (60, 5), "medium": (1000, 64), "large": (4000, 256)}  # boxes, channels


def boxes(device: torch.device, count: int) -> Tensor:
    """Returns boxes of up to 60 pixels a side, in an image of 240 x 320."""
    g = torch.Generator().manual_seed(5)
    low = torch.rand(count, 2, generator=g) * torch.tensor([300.0, 220.0])
    return torch.cat([low, low + torch.rand(count, 2, generator=g) * 60], dim=1).to(device)


def features_of_boxes(dtype: torch.dtype, sampling: int, aligned: bool, device: torch.device, size: str) -> Problem:
    """Returns 7 x 7 bins of boxes of two images at stride 4."""
    count, channels = SIZES[size]
    count = min(count, 500)
    image = (torch.arange(count, device=device) % 2)[:, None]
    rois = torch.cat([image, boxes(device, count)], dim=1)
    numbers = (7, 0.25, sampling, aligned)

    def plain(features: Tensor) -> Tensor:
        # Places are those of float32 also in float64, whose rounding decides how many samples there are.
        x = features.float() if features.dtype != torch.float64 else features
        image = rois[:, 0].long()
        y, across = (m.to(x.dtype) for m in align._matrices(rois, x.shape[2:], *numbers))
        parts = [torch.einsum("th,chw,sw->cts", y[r], x[image[r]], across[r]) for r in range(count)]
        return torch.stack(parts).to(features.dtype)

    features = draw(device, dtype, 2, channels, 60, 80)
    return Problem({"features": features}, lambda x: align.roi_align(x, rois, *numbers), plain)


def suppressed(soft: bool, device: torch.device, size: str) -> Problem:
    """Returns which of many boxes stay, or what scores they keep, on the device and on the CPU."""
    count = SIZES[size][0]
    scores = torch.rand(count, generator=torch.Generator().manual_seed(6)).to(device)
    groups = (torch.arange(count) % 3).to(device)

    def ours(given: Tensor) -> Tensor:
        if soft:
            found = torch.ops.swin_moe.soft_nms(given, scores, groups, 0.3, 0.5, False, 0.05)
            return found.clamp(min=-1.0)
        stays = torch.zeros(count, device=device)
        return stays.index_fill_(0, suppression.nms(given, scores, 0.5, groups), 1.0)

    def plain(given: Tensor) -> Tensor:
        there = given.cpu(), scores.cpu(), groups.cpu()
        if soft:
            return _soft_nms(*there, 0.3, 0.5, False, 0.05).clamp(min=-1.0).to(device)
        return torch.zeros(count).index_fill_(0, suppression._nms(*there, 0.5), 1.0).to(device)

    return Problem({"boxes": boxes(device, count)}, ours, plain, gradients=False, tolerance=1e-6 if soft else 0.0)


def deformed(device: torch.device, size: str) -> Problem:
    """Returns the columns of a deformable convolution with a mask."""
    channels = 2 * SIZES[size][1]
    tensors = {
        "x": draw(device, torch.float32, 2, channels, 20, 24),
        "offsets": draw(device, torch.float32, 2, 36, 20, 24, seed=1),
        "mask": draw(device, torch.float32, 2, 18, 20, 24, seed=2),
    }
    numbers = (3, 3, 1, 1, 1, 1, 1, 1)
    return Problem(
        tensors, lambda *t: torch.ops.swin_moe.deform_columns(*t, *numbers), lambda *t: _columns(*t, *numbers)
    )


def cases() -> list[Case]:
    """Returns the rows of every operator of detectors."""
    rows = [
        Case(
            f"roi_align, {name}, sampling {sampling}, {'aligned' if aligned else 'not aligned'}",
            partial(features_of_boxes, dtype, sampling, aligned),
        )
        for name, dtype in DTYPES.items()
        for sampling, aligned in ((0, True), (2, False))
    ]
    rows += [Case("nms", partial(suppressed, False)), Case("soft_nms", partial(suppressed, True))]
    return [*rows, Case("deform_columns", deformed)]
