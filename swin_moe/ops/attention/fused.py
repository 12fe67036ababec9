"""Window attention of a whole map as one operator: from queries, keys and values (B, H, W, 3C) to (B, H, W, C).

Shift, padding, partition, position bias, mask, softmax and reverse happen inside; backward computes the weights again,
so nothing of the size of a score matrix is kept. Compiled kernels are in csrc/; where a device has none the operator
runs its reference (reference.py), so traced graphs are the same everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swin_moe.ops import extension
from swin_moe.ops.attention.geometry import MASKED, Pair
from swin_moe.ops.attention.reference import AttentionNumbers, attend_map, attend_map_backward
from swin_moe.ops.transforms import call_operator

_ARGUMENTS = (
    "Tensor qkv, Tensor bias_table, Tensor? logit_scale, Tensor? pad_qkv, int num_heads, int window_h, int window_w, "
    "int shift_h, int shift_w, float scale, float mask_value"
)
SCHEMAS = {
    "window_attention": f"window_attention({_ARGUMENTS}) -> Tensor",
    "window_attention_and_sums": f"window_attention_and_sums({_ARGUMENTS}) -> (Tensor, Tensor)",
    "window_attention_backward": (
        f"window_attention_backward(Tensor grad_out, {_ARGUMENTS}, Tensor? out=None, Tensor? log_sums=None) -> "
        "(Tensor, Tensor, Tensor, Tensor)"
    ),
}
# Limits of the compiled kernels, csrc/window/window_geometry.h.
HEAD_DIMS = (8, 64)
MAX_WINDOW_TOKENS = 1024
# Of the CUDA kernels whose backward reads what the forward left,
# csrc/cuda/window/backward/window_backward_variants.cuh.
_READS_SUMS = {"head_dims": (32,), "windows": ((12, 12), (16, 16)), "dtypes": (torch.bfloat16, torch.float16)}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def fused_window_attention(
    qkv_BHWC: Tensor,
    bias_table: Tensor,
    *,
    num_heads: int,
    window: Pair,
    shift: Pair = (0, 0),
    scale: float = 1.0,
    logit_scale: Tensor | None = None,
    pad_qkv: Tensor | None = None,
    mask_value: float = MASKED,
) -> Tensor:
    """Returns the attended values (B, H, W, C), contiguous, in the dtype of qkv.

    Args:
        qkv_BHWC: (B, H, W, 3C), channel = part * C + head * D + i. Any H and W: the map is padded at the bottom and
            right to whole windows, padded tokens are attended, and their outputs dropped.
        bias_table: ((2h - 1) * (2w - 1), heads), float32 or the dtype of qkv.
        window, shift: (height, width) in tokens; 0 <= shift < window.
        scale: Factor on dot-product scores; unused with logit_scale.
        logit_scale: (heads,) factor on cosine scores, already clamped and exponentiated; None = dot-product scores.
        pad_qkv: (3C,), what a padded token has in qkv, in its dtype; None = zeros.
        mask_value: Added to scores across the seam of the shift.
    """
    qkv = qkv_BHWC.contiguous()
    arguments = (qkv, bias_table, logit_scale, pad_qkv, num_heads, *window, *shift, scale, mask_value)
    head_dim = qkv.shape[3] // 3 // num_heads
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4])
    if differentiated and _backward_reads_sums(qkv.device.type, qkv.dtype, head_dim, window):
        return call_operator(torch.ops.swin_moe.window_attention_and_sums, _differentiate, _save, *arguments)[0]
    return call_operator(torch.ops.swin_moe.window_attention, _differentiate, _save, *arguments)


def _backward_reads_sums(device_type: str, dtype: torch.dtype, head_dim: int, window: Pair) -> bool:
    """Returns whether a backward kernel reads the row sums of scores, so that they are worth keeping."""
    if device_type != "cuda" or "cuda" not in extension.COMPILED or dtype not in _READS_SUMS["dtypes"]:
        return False
    return head_dim in _READS_SUMS["head_dims"] and tuple(window) in _READS_SUMS["windows"]


def unsupported(
    *, device_type: str, dtype: torch.dtype, head_dim: int, window: Pair, table_dtype: torch.dtype | None = None
) -> str | None:
    """Returns why the compiled kernels do not compute a case, one clause, or None where they do.

    Args:
        dtype: Of queries, keys and values, as autocast makes them.
        table_dtype: Of the bias table and the factor on cosine scores; None = not asked.
    """
    if device_type not in extension.COMPILED:
        return f"no compiled kernels: {extension.why_not(device_type)}"
    allowed = DTYPES[device_type]
    if dtype not in allowed:
        return f"{_name(dtype)} is none of {', '.join(map(_name, allowed))} on {device_type}"
    if table_dtype not in (None, dtype, torch.float32):
        return f"the position bias is {_name(table_dtype)}, neither float32 nor {_name(dtype)}"
    return unsupported_shape(head_dim=head_dim, window=window)


def unsupported_shape(*, head_dim: int, window: Pair) -> str | None:
    """Returns what of a shape no compiled kernel computes, one clause, or None."""
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"{head_dim} channels a head are not in [{HEAD_DIMS[0]}, {HEAD_DIMS[1]}]"
    if window[0] * window[1] > MAX_WINDOW_TOKENS:
        return f"a window of {window[0]} x {window[1]} has more than {MAX_WINDOW_TOKENS} tokens"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fake(qkv: Tensor, bias_table: Tensor, *_: Any) -> Tensor:
    batch, height, width, channels = qkv.shape
    return qkv.new_empty((batch, height, width, channels // 3))


def _attend(*arguments: Any) -> Tensor:
    """Returns what the operator does, by the reference."""
    return attend_map(*arguments[:4], numbers=AttentionNumbers(*arguments[4:]))


def _attend_and_sum(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns the attended values (B, H, W, C), and (windows, heads, tokens) float32 for the backward of the device:
    zeros here, since the reference's backward does not read them."""
    qkv, numbers = arguments[0], AttentionNumbers(*arguments[4:])
    sums = qkv.new_zeros(_sums_shape(qkv, numbers.num_heads, *numbers.window), dtype=torch.float32)
    return _attend(*arguments), sums


def _attend_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Returns the gradients by the reference, which does not read what the forward left, the last two arguments."""
    numbers = AttentionNumbers(*arguments[5 : 5 + len(AttentionNumbers._fields)])
    return attend_map_backward(*arguments[:5], numbers=numbers)


def _sums_shape(qkv: Tensor, num_heads: int, window_h: int, window_w: int) -> tuple[int, int, int]:
    batch, height, width, _ = qkv.shape
    windows = -(-height // window_h) * -(-width // window_w)
    return batch * windows, num_heads, window_h * window_w


def _fake_and_sum(qkv: Tensor, bias_table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(qkv, bias_table), qkv.new_empty(_sums_shape(qkv, *rest[2:5]), dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor, qkv: Tensor, bias_table: Tensor, logit_scale: Tensor | None, pad_qkv: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    tensors = (qkv, bias_table, logit_scale, pad_qkv)
    return tuple(qkv.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


def _save(ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
    left = output if isinstance(output, tuple) else ()  # for a backward that reads what the forward left
    ctx.save_for_backward(*inputs[:4], *left)
    ctx.numbers = inputs[4:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * (4 + len(ctx.numbers))
    saved = ctx.saved_tensors  # once: with recomputation it cannot be asked again
    inputs, left = saved[:4], saved[4:]
    grads = torch.ops.swin_moe.window_attention_backward(grad_out.contiguous(), *inputs, *ctx.numbers, *left)
    needed = (grad if needs else None for grad, needs in zip(grads, ctx.needs_input_grad[:4]))
    return *needed, *(None for _ in ctx.numbers)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("fused window attention has no second derivatives; model.attention=reference has")


def _register(name: str, kernel: Callable, fake: Callable, differentiate: Callable, save: Callable | None) -> None:
    library, qualified = extension.define(SCHEMAS[name]), f"{extension.NAMESPACE}::{name}"
    # A kernel of a device type takes precedence over this one, which serves the rest.
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(qualified, differentiate, setup_context=save, lib=library)


_register("window_attention", _attend, _fake, _differentiate, _save)
_register("window_attention_and_sums", _attend_and_sum, _fake_and_sum, _differentiate, _save)
_register("window_attention_backward", _attend_backward, _fake_backward, _refuse_second_derivative, None)
