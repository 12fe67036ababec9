"""Convolution that reads at places moved by offsets (arXiv:1703.06211), also modulated by a mask (arXiv:1811.11168).

The operator makes columns, what every tap of the kernel reads; the rest is a product with the weight. Compiled kernels
are in csrc/detection/deform_conv.cpp and csrc/cuda/detection/deform_conv.cu; elsewhere the operator runs the plain form
of this file.

Shape legend: B images, C channels read, O channels made, H x W of the map, h x w of the kernel, K = h * w taps, Y x X
of the result, N = Y * X, G groups of channels that share offsets.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from swin_moe.ops import extension
from swin_moe.ops.transforms import call_operator

Pair = tuple[int, int]
MOST = 32767  # whose products, as that of both sides of a kernel, are a 32-bit number in the compiled kernels
_NUMBERS = (
    "int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
    "int dilation_w"
)
SCHEMAS = {
    "deform_columns": f"deform_columns(Tensor x, Tensor offsets, Tensor? mask, {_NUMBERS}) -> Tensor",
    "deform_columns_backward": (
        f"deform_columns_backward(Tensor grad, Tensor x, Tensor offsets, Tensor? mask, {_NUMBERS}) -> "
        "(Tensor, Tensor, Tensor)"
    ),
}


def deform_conv2d(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> Tensor:
    """Returns (B, O, Y, X), with gradients to every tensor.

    Cells outside the map are 0, whatever its own cells hold. Places, columns and their gradients are float64 for
    float64 maps and float32 for all others; the product is in the dtype of the map.

    Args:
        x: (B, C, H, W).
        offsets: (B, G * K * 2, Y, X), (y, x) of every tap in cells.
        weight: (O, C / groups, h, w); its second size says the groups of the convolution.
        mask: (B, G * K, Y, X), factors of what is read. None = 1.
        bias: (O,).

    Raises:
        ValueError: A shape or number that is not allowed.
    """
    if weight.dim() != 4 or x.dim() != 4 or weight.shape[1] == 0 or x.shape[1] % weight.shape[1]:
        raise ValueError(
            f"deform_conv2d: weight must be (O, C / groups, h, w) for x (B, C, H, W), got {tuple(weight.shape)} and "
            f"{tuple(x.shape)}"
        )
    groups = x.shape[1] // weight.shape[1]
    if len(weight) % groups:
        raise ValueError(f"deform_conv2d: {len(weight)} channels made are no multiple of {groups} groups")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    numbers = (*weight.shape[2:], *_pair(stride), *_pair(padding), *_pair(dilation))
    given = (x.to(wide), offsets.to(wide), None if mask is None else mask.to(wide))
    columns = call_operator(torch.ops.swin_moe.deform_columns, _differentiate, _save, *given, *numbers)
    columns = columns.to(x.dtype).view(len(x), groups, weight[0].numel(), columns.shape[3])
    found = torch.matmul(weight.reshape(groups, len(weight) // groups, weight[0].numel()), columns)
    found = found.reshape(len(x), len(weight), *offsets.shape[2:])
    return found if bias is None else found + bias.to(found.dtype)[:, None, None]


def _check(x: Tensor, offsets: Tensor, mask: Tensor | None, numbers: tuple[int, ...]) -> tuple[int, int]:
    """Returns (Y, X)."""
    kernel, stride, padding, dilation = (numbers[i : i + 2] for i in (0, 2, 4, 6))
    if offsets.dim() != 4:
        raise ValueError(f"deform_columns: offsets must have four dimensions, got {tuple(offsets.shape)}")
    if min(*kernel, *stride, *dilation) <= 0 or min(padding) < 0:
        raise ValueError("deform_columns: kernel, stride and dilation must be above 0 and the padding at least 0")
    if max(numbers) > MOST:
        raise ValueError(
            f"deform_columns: kernel, stride, padding and dilation must be at most {MOST}, got {max(numbers)}"
        )
    sides = zip(x.shape[2:], kernel, stride, padding, dilation)
    out_h, out_w = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
    if min(*x.shape[2:], out_h, out_w) <= 0:
        raise ValueError(f"deform_columns: a map of {x.shape[2]} x {x.shape[3]} is less than the kernel")
    taps = kernel[0] * kernel[1]
    groups = offsets.shape[1] // (2 * taps)
    if not groups or x.shape[1] % groups or offsets.shape != (len(x), 2 * taps * groups, out_h, out_w):
        raise ValueError(
            f"deform_columns: offsets must be ({len(x)}, groups x {2 * taps}, {out_h}, {out_w}) with groups that "
            f"divide {x.shape[1]} channels, got {tuple(offsets.shape)}"
        )
    if mask is not None and mask.shape != (len(x), taps * groups, out_h, out_w):
        raise ValueError(f"deform_columns: the mask must be ({len(x)}, {taps * groups}, {out_h}, {out_w})")
    return out_h, out_w


def _columns(x: Tensor, offsets: Tensor, mask: Tensor | None, *numbers: int) -> Tensor:
    """Returns (B, C, K, N)."""
    out_h, out_w = _check(x, offsets, mask, numbers)
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w = numbers
    batch, channels, height, width = x.shape
    taps = kernel_h * kernel_w
    groups = offsets.shape[1] // (2 * taps)
    tap, row, column = (torch.arange(n, device=x.device) for n in (taps, out_h, out_w))
    moved = offsets.view(batch, groups, taps, 2, out_h, out_w)
    y = (tap // kernel_w * dilation_h - padding_h)[:, None, None] + (row * stride_h)[:, None] + moved[:, :, :, 0]
    x_place = (tap % kernel_w * dilation_w - padding_w)[:, None, None] + column * stride_w + moved[:, :, :, 1]
    cells = x.reshape(batch, groups, channels // groups, height * width)
    seen = (y > -1) & (y < height) & (x_place > -1) & (x_place < width)
    top, left = y.detach().floor(), x_place.detach().floor()
    total = x.new_zeros(batch, groups, channels // groups, taps * out_h * out_w)
    for below in (0, 1):
        for right in (0, 1):
            i, j = top + below, left + right
            inside = seen & (i >= 0) & (i < height) & (j >= 0) & (j < width)
            share_y = y - top if below else 1 - (y - top)
            share_x = x_place - left if right else 1 - (x_place - left)
            share = torch.where(inside, share_y * share_x, torch.zeros_like(y)).flatten(2)[:, :, None]
            place = torch.where(inside, i * width + j, torch.zeros_like(i)).to(torch.int64).flatten(2)[:, :, None]
            held = cells.gather(3, place.expand(-1, -1, channels // groups, -1))
            # Not a product with a share of 0 outside, which is no number where the first cell is infinite.
            total = total + share * held.where(inside.flatten(2)[:, :, None], 0.0)
    if mask is not None:
        total = total * mask.view(batch, groups, 1, taps * out_h * out_w)
    return total.reshape(batch, channels, taps, out_h * out_w)


def _columns_backward(
    grad: Tensor, x: Tensor, offsets: Tensor, mask: Tensor | None, *numbers: int
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, offsets, mask) if t is not None]
        made = _columns(leaves[0], leaves[1], leaves[2] if mask is not None else None, *numbers)
    found = torch.autograd.grad(made, leaves, grad)
    return found[0], found[1], found[2] if mask is not None else x.new_empty(0)


def _fake_columns(x: Tensor, offsets: Tensor, mask: Tensor | None, *numbers: int) -> Tensor:
    taps = numbers[0] * numbers[1]
    return x.new_empty((x.shape[0], x.shape[1], taps, offsets.shape[2] * offsets.shape[3]))


def _fake_backward(
    grad: Tensor, x: Tensor, offsets: Tensor, mask: Tensor | None, *_: int
) -> tuple[Tensor, Tensor, Tensor]:
    of_mask = x.new_empty(0) if mask is None else mask.new_empty(mask.shape)
    return x.new_empty(x.shape), offsets.new_empty(offsets.shape), of_mask


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, offsets, mask, *ctx.numbers = inputs
    ctx.save_for_backward(x, offsets, mask)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets, mask = ctx.saved_tensors
    verb = torch.ops.swin_moe.deform_columns_backward
    grad_x, grad_offsets, grad_mask = verb(grad.contiguous(), x, offsets, mask, *ctx.numbers)
    return grad_x, grad_offsets, None if mask is None else grad_mask, *(None,) * 8


for _name, _kernel, _fake in (
    ("deform_columns", _columns, _fake_columns),
    ("deform_columns_backward", _columns_backward, _fake_backward),
):
    _library = extension.register(SCHEMAS[_name], _kernel, _fake)
torch.library.register_autograd(
    f"{extension.NAMESPACE}::deform_columns", _differentiate, setup_context=_save, lib=_library
)
