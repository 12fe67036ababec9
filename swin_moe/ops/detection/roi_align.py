"""Features of boxes by bilinear samples (arXiv:1703.06870, section 3).

Compiled kernels are in csrc/detection/roi_align.cpp and csrc/cuda/detection/roi_align.cu; elsewhere the operators run
the plain form of this file. Sampling is separable: a box has one matrix of its bins over rows and one over columns of
the map.

Shape legend: B images, C channels, H x W of the map, R boxes, S bins per side.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swin_moe.ops import extension
from swin_moe.ops.transforms import call_operator

AT_ONCE = 32  # boxes whose intermediate products are in memory together
MOST_SAMPLES = 1 << 22  # of a bin and axis: whose number float32 holds with its half
SCHEMAS = {
    "roi_align": "roi_align(Tensor features, Tensor rois, int size, float scale, int sampling, bool aligned) -> Tensor",
    "roi_align_backward": (
        "roi_align_backward(Tensor grad, Tensor rois, SymInt batch, SymInt height, SymInt width, float scale, "
        "int sampling, bool aligned) -> Tensor"
    ),
}


def roi_align(
    features: Tensor, rois_R5: Tensor, size: int, scale: float, sampling: int = 0, aligned: bool = True
) -> Tensor:
    """Returns (R, C, S, S), means of each bin's samples, with gradients to the features (not to the boxes).

    Places are computed in float64 for float64 features and in float32 for all others, sums likewise. Samples farther
    than a cell outside the map count as 0; a cell of weight 0 takes no part, whatever it holds. A box with a coordinate
    that is not finite gives not-a-number, and so does on CUDA a box of an image that is not there, which the CPU
    refuses.

    Args:
        features: (B, C, H, W).
        rois: Image index and box x1, y1, x2, y2 in pixels.
        size: S.
        scale: Cells of the map per pixel.
        sampling: Samples of a bin per axis; 0 = as many as a bin has cells, rounded up.
        aligned: Pixel centres are at half-integers; else as before that was mended, with sides of at least one cell.

    Raises:
        ValueError: A shape or number that is not allowed.
        IndexError: A box of an image that is not there (not seen on CUDA).
    """
    rois = rois_R5.detach().to(box_dtype(features))
    operator = torch.ops.swin_moe.roi_align
    return call_operator(operator, _differentiate, _save, features, rois, size, float(scale), sampling, aligned)


def box_dtype(features: Tensor) -> torch.dtype:
    """Returns the dtype in which places on a map of these features are computed."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _check(
    name: str, rois: Tensor, batch: int, map_size: Sequence[int], size: int, scale: float, sampling: int
) -> None:
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"{name}: boxes must be (R, 5), got {tuple(rois.shape)}")
    if min(map_size) <= 0:
        raise ValueError(f"{name}: a map must have at least 1 cell a side, got {map_size[0]} x {map_size[1]}")
    if not (0 < size <= 1 << 12 and 0 <= sampling <= 1 << 12 and scale > 0):
        raise ValueError(
            f"{name}: bins must be 1 to 4096 a side, samples 0 to 4096 and the scale above 0, got {size}, {sampling} "
            f"and {scale}"
        )
    if rois.device.type == "cpu" and not bool(((rois[:, 0] >= 0) & (rois[:, 0] < batch)).all()):
        raise IndexError(f"{name}: a box is of an image that is not there, there are {batch}")


def _matrices(
    rois: Tensor, map_size: Sequence[int], size: int, scale: float, sampling: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Returns (R, S, H) and (R, S, W), the weight of every row and column of the map in the mean of every bin."""
    box_R4 = rois[:, 1:] * scale - (0.5 if aligned else 0.0)
    low, side = box_R4[:, :2], box_R4[:, 2:] - box_R4[:, :2]
    side = side if aligned else side.clamp(min=1.0)
    finite = torch.isfinite(low).all(1) & torch.isfinite(side).all(1)
    low, side = (torch.where(finite[:, None], x, torch.zeros_like(x)) for x in (low, side))
    y = _axis(low[:, 1], side[:, 1], size, map_size[0], sampling)
    x = _axis(low[:, 0], side[:, 0], size, map_size[1], sampling)
    return torch.where(finite[:, None, None], y, torch.nan), x


def _axis(low_R: Tensor, side_R: Tensor, bins: int, cells: int, sampling: int) -> Tensor:
    """Returns (R, S, cells): the weight of every cell of an axis in the mean of every bin."""
    bin_R = side_R / bins
    count_R = torch.full_like(bin_R, sampling) if sampling else bin_R.ceil().clamp(min=0, max=MOST_SAMPLES)
    number = torch.arange(bins, dtype=low_R.dtype, device=low_R.device)
    base_RS = low_R[:, None] + number * bin_R[:, None]
    # Of the samples of a huge box, only those near the map are looked at. Slack: places are rounded.
    per_cell = (count_R.double() / bin_R.double().clamp(min=1e-30))[:, None]
    slack = 4 + 1e-6 * (count_R[:, None].double() + base_RS.double().abs() * per_cell)
    most_R1 = count_R[:, None].double()
    few = (most_R1 <= 64) | (bin_R[:, None] <= 0)
    first_RS = torch.where(few, 0.0, ((-1 - base_RS.double()) * per_cell - slack).floor().clamp(min=0).minimum(most_R1))
    end_RS = ((cells - base_RS.double()) * per_cell + slack).ceil().clamp(min=0).minimum(most_R1)
    span_RS = torch.where(few, most_R1, end_RS) - first_RS
    step = torch.arange(int(span_RS.amax().clamp(min=0)) if len(low_R) else 0, device=low_R.device)
    sample = (first_RS[:, :, None] + step).to(low_R.dtype)  # (R, S, samples)
    place = base_RS[:, :, None] + (sample + 0.5) * bin_R[:, None, None] / count_R.clamp(min=1)[:, None, None]
    seen = (place >= -1) & (place <= cells) & (step < span_RS[:, :, None])
    place = place.clamp(0, cells - 1)
    first = place.floor().to(torch.int64)
    share = place - first
    weights = low_R.new_zeros(len(low_R), bins, cells)
    weights.scatter_add_(2, first, (1 - share) * seen)
    weights.scatter_add_(2, (first + 1).clamp(max=cells - 1), share * seen)
    return weights / count_R.clamp(min=1)[:, None, None]


def _weighted(weights_RSN: Tensor, values: Tensor) -> Tensor:
    """Returns (R, ..., S): sums of values (R, ..., N) by weights; what has weight 0 takes no part, whatever it is."""
    if bool(values.isfinite().all()):
        return torch.einsum("r...n,rsn->r...s", values, weights_RSN)
    weights = weights_RSN.view(len(weights_RSN), *[1] * (values.dim() - 2), *weights_RSN.shape[1:])
    return (weights * values[..., None, :]).where(weights != 0, 0.0).sum(-1)


def _forward(features: Tensor, rois: Tensor, size: int, scale: float, sampling: int, aligned: bool) -> Tensor:
    if features.dim() != 4:
        raise ValueError(f"roi_align: features must be (B, C, H, W), got {tuple(features.shape)}")
    _check("roi_align", rois, len(features), features.shape[2:], size, scale, sampling)
    y, x = _matrices(rois, features.shape[2:], size, scale, sampling, aligned)
    image = rois[:, 0].to(torch.int64)
    parts = [features.new_zeros(0, features.shape[1], size, size)]
    for start in range(0, len(rois), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        across = _weighted(x[rows], features[image[rows]].to(x.dtype))
        parts.append(_weighted(y[rows], across.transpose(2, 3)).transpose(2, 3).to(features.dtype))
    return torch.cat(parts)


def _backward(
    grad: Tensor, rois: Tensor, batch: int, height: int, width: int, scale: float, sampling: int, aligned: bool
) -> Tensor:
    _check("roi_align_backward", rois, batch, (height, width), grad.shape[2], scale, sampling)
    y, x = _matrices(rois, (height, width), grad.shape[2], scale, sampling, aligned)
    y = y.nan_to_num(nan=0.0)
    image = rois[:, 0].to(torch.int64)
    found = x.new_zeros(batch, grad.shape[1], height, width)
    for r in range(len(rois)):
        down = _weighted(x[r : r + 1].transpose(1, 2), grad[r : r + 1].to(x.dtype)).transpose(2, 3)
        found[image[r]] += _weighted(y[r : r + 1].transpose(1, 2), down)[0].transpose(1, 2)
    return found.to(grad.dtype)


def _fake_forward(features: Tensor, rois: Tensor, size: int, *_: object) -> Tensor:
    return features.new_empty((rois.shape[0], features.shape[1], size, size))


def _fake_backward(grad: Tensor, rois: Tensor, batch: int, height: int, width: int, *_: object) -> Tensor:
    return grad.new_empty((batch, grad.shape[1], height, width))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    features, rois, size, *ctx.numbers = inputs
    ctx.save_for_backward(rois)
    ctx.map, ctx.size = (features.shape[0], features.shape[2], features.shape[3]), size


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    found = torch.ops.swin_moe.roi_align_backward(grad, rois, *ctx.map, *ctx.numbers)
    return found, None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, rois, _, _, _, *ctx.numbers = inputs
    ctx.save_for_backward(rois)
    ctx.size = grad.shape[2]


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    return torch.ops.swin_moe.roi_align(grad, rois, ctx.size, *ctx.numbers), *(None,) * 7


for _name, _kernel, _fake, _gradient, _keep in (
    ("roi_align", _forward, _fake_forward, _differentiate, _save),
    ("roi_align_backward", _backward, _fake_backward, _differentiate_backward, _save_backward),
):
    _library = extension.register(SCHEMAS[_name], _kernel, _fake)
    torch.library.register_autograd(f"{extension.NAMESPACE}::{_name}", _gradient, setup_context=_keep, lib=_library)
