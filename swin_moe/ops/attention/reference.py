"""Window attention of a whole map in the official order of operations: what every compiled kernel is compared with.

Padding, roll, partition, scores, bias, mask, softmax, values, merge, roll, crop (microsoft/Swin-Transformer,
models/swin_transformer.py and swin_transformer_v2.py; padding: SwinTransformer/Swin-Transformer-Object-Detection).
It runs as the kernel of the operator wherever no compiled one is registered.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.ops.attention.geometry import Pair, gather_bias, merge_windows, padded_size, partition_windows, shift_mask
from swin_moe.ops.attention.in_windows import attend_explicitly


class AttentionNumbers(NamedTuple):
    """What the operator takes besides tensors, in the order of its schema (fused.py)."""

    num_heads: int
    window_h: int  # tokens
    window_w: int
    shift_h: int  # tokens, less than the window
    shift_w: int
    scale: float  # on dot-product scores
    mask_value: float  # added to scores across the seam of the shift

    @property
    def window(self) -> Pair:
        """(height, width) in tokens."""
        return self.window_h, self.window_w

    @property
    def shift(self) -> Pair:
        """(height, width) in tokens."""
        return self.shift_h, self.shift_w


def attend_map(
    qkv: Tensor, bias_table: Tensor, logit_scale: Tensor | None, pad_qkv: Tensor | None, *, numbers: AttentionNumbers
) -> Tensor:
    """Returns (B, H, W, C); tensors as the operator's (fused.py). Differentiable by autograd."""
    batch, height, width, channels = qkv.shape
    window, shift = numbers.window, numbers.shift
    full = (padded_size(height, window[0]), padded_size(width, window[1]))
    with without_autocast(qkv.device.type):
        x = _pad(qkv, full, pad_qkv)
        if any(shift):
            x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        bias = gather_bias(bias_table, window)[None]
        if any(shift):
            bias = bias + shift_mask(*full, window, shift, bias.device, bias.dtype, numbers.mask_value)[:, None]
        factor = None if logit_scale is None else logit_scale.view(numbers.num_heads, 1, 1)
        out_WAND = attend_explicitly(partition_windows(x, window), bias, numbers.scale, factor)
        out = out_WAND.transpose(1, 2).reshape(-1, window[0] * window[1], channels // 3)
        x = merge_windows(out, window, batch, *full)
        if any(shift):
            x = torch.roll(x, shifts=shift, dims=(1, 2))
        return x[:, :height, :width].contiguous()


def attend_map_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    *,
    numbers: AttentionNumbers,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of qkv, bias_table, logit_scale and pad_qkv, an empty tensor for what was None.

    The forward is computed again and differentiated by autograd.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, table = _leaf(qkv), _leaf(bias_table)
        factor, padding = (None if t is None else _leaf(t) for t in (logit_scale, pad_qkv))
        out = attend_map(x, table, factor, padding, numbers=numbers)
        given = [x, table, *(leaf for leaf in (factor, padding) if leaf is not None)]
        grads = iter(torch.autograd.grad(out, given, _leaf(grad_out), materialize_grads=True))
        grad_x, grad_table = next(grads).contiguous(), next(grads).contiguous()
        # new_empty: a result of an operator must not be one of its other results.
        grad_factor = qkv.new_empty(0) if factor is None else next(grads).contiguous()
        grad_padding = qkv.new_empty(0) if padding is None else next(grads).contiguous()
        return grad_x, grad_table, grad_factor, grad_padding


def _leaf(x: Tensor) -> Tensor:
    """Returns the same values as a leaf of a new graph; a tensor of inference mode cannot be one and is copied."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _pad(qkv: Tensor, full: tuple[int, int], pad_qkv: Tensor | None) -> Tensor:
    """Returns the map with padded tokens at the bottom and right, zeros or pad_qkv."""
    rows, columns = full[0] - qkv.shape[1], full[1] - qkv.shape[2]
    if not rows and not columns:
        return qkv
    if pad_qkv is None:
        return F.pad(qkv, (0, 0, 0, columns, 0, rows))
    inside = F.pad(qkv.new_ones((*qkv.shape[1:3], 1), dtype=torch.bool), (0, 0, 0, columns, 0, rows))
    return torch.where(inside, F.pad(qkv, (0, 0, 0, columns, 0, rows)), pad_qkv)


def without_autocast(device_type: str) -> torch.autocast | nullcontext:
    """Returns a context in which the dtypes given are the dtypes computed in, as in a compiled kernel."""
    # torch.amp.is_autocast_available would ask the same, which torch 2.11 cannot trace.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
