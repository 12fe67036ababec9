"""The attention half of a block, (B, H, W, C) -> (B, H, W, C): projection, window attention, output projection.

The paths differ in where they cut the map. `fused` projects the map as it is and leaves shift, padding and windows to
one operator; `reference`, `analytic` and `sdpa` pad, roll and partition first, as the official code does, and attend
windows (in_windows.py). All give the same values.

Shape legend: B images, H x W tokens, C channels, A heads, N tokens of a window, P = (2h - 1) * (2w - 1) relative
positions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.ops.attention.fused import fused_window_attention
from swin_moe.ops.attention.geometry import (
    Pair,
    gather_bias,
    merge_windows,
    padded_size,
    partition_windows,
    shift_mask,
)
from swin_moe.ops.attention.in_windows import attend_windows, clamped_factor
from swin_moe.ops.linear import linear

PATHS = ("fused", "analytic", "sdpa", "reference")


class HalfTensors(NamedTuple):
    """What the half computes with besides the map."""

    qkv_weight: Tensor  # (3C, C)
    qkv_bias: Tensor | None  # (3C,)
    proj_weight: Tensor  # (C, C)
    proj_bias: Tensor | None  # (C,)
    bias_table: Tensor  # (P, A)
    logit_scale: Tensor | None  # (A, 1, 1), log of the factor on cosine scores; None = dot-product scores


class HalfShape(NamedTuple):
    """The numbers of a half."""

    num_heads: int
    window: Pair  # tokens
    shift: Pair  # tokens, less than the window
    scale: float  # on dot-product scores


# The projections to (..., 3C) and of the output, as functions of their input.
Layers = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def attention_half(
    x_BHWC: Tensor, tensors: HalfTensors, shape: HalfShape, path: str, *, layers: Layers | None = None
) -> Tensor:
    """Returns (B, H, W, C) by one of PATHS.

    layers: What is called instead of products with the weights in tensors (layers with hooks); None = nothing.
    """
    if path == "fused":
        return fused_half(x_BHWC, tensors, shape, layers=layers)
    windows, full = cut(x_BHWC, shape)
    project, project_out = layers or _products(tensors)
    qkv = project(windows)
    bias = gather_bias(tensors.bias_table, shape.window)
    out = attend_windows(
        qkv,
        bias,
        seam_mask(full, shape, bias),
        scale=shape.scale,
        logit_scale=tensors.logit_scale,
        implementation=path,
    )
    return join(project_out(out), x_BHWC, full, shape)


def _products(tensors: HalfTensors) -> Layers:
    return (
        lambda x: linear(x, tensors.qkv_weight, tensors.qkv_bias),
        lambda x: linear(x, tensors.proj_weight, tensors.proj_bias),
    )


def fused_half(x_BHWC: Tensor, tensors: HalfTensors, shape: HalfShape, *, layers: Layers | None = None) -> Tensor:
    """Returns (B, H, W, C) through the operator. layers: as attention_half's; with them a map of whole windows."""
    project, project_out = layers or _products(tensors)
    qkv = project(x_BHWC)
    pad = None
    if tensors.qkv_bias is not None and (x_BHWC.shape[1] % shape.window[0] or x_BHWC.shape[2] % shape.window[1]):
        assert layers is None, "only a product with the weight says what a padded token becomes"
        pad = tensors.qkv_bias.to(qkv.dtype)  # a padded token is zero before the projection
    factor = None if tensors.logit_scale is None else clamped_factor(tensors.logit_scale).flatten()
    out = fused_window_attention(
        qkv,
        tensors.bias_table,
        num_heads=shape.num_heads,
        window=shape.window,
        shift=shape.shift,
        scale=shape.scale,
        logit_scale=factor,
        pad_qkv=pad,
    )
    return project_out(out)


def cut(x_BHWC: Tensor, shape: HalfShape) -> tuple[Tensor, Pair]:
    """Returns (the windows (W, N, C) of the padded and rolled map, its padded height and width)."""
    height, width = x_BHWC.shape[1:3]
    full = (padded_size(height, shape.window[0]), padded_size(width, shape.window[1]))
    x = x_BHWC
    if full != (height, width):
        x = F.pad(x, (0, 0, 0, full[1] - width, 0, full[0] - height))
    if any(shape.shift):
        x = torch.roll(x, shifts=(-shape.shift[0], -shape.shift[1]), dims=(1, 2))
    return partition_windows(x, shape.window), full


def seam_mask(full: Pair, shape: HalfShape, bias: Tensor) -> Tensor | None:
    """Returns (M, N, N), the mask of a shifted map in the dtype of the bias, or None."""
    return shift_mask(*full, shape.window, shape.shift, bias.device, bias.dtype) if any(shape.shift) else None


def join(windows: Tensor, x_BHWC: Tensor, full: Pair, shape: HalfShape) -> Tensor:
    """Returns the map (B, H, W, C) that `cut` took apart."""
    x = merge_windows(windows, shape.window, x_BHWC.shape[0], *full)
    if any(shape.shift):
        x = torch.roll(x, shifts=shape.shift, dims=(1, 2))
    return x[:, : x_BHWC.shape[1], : x_BHWC.shape[2]]
