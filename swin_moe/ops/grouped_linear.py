"""One linear layer per expert over ragged runs of rows: a custom operator, so that torch.compile sees no row counts.

Shape legend: N rows sorted by expert (rows beyond the counts belong to none), E experts, I and O input and output
channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.ops import extension, row_products
from swin_moe.ops.bias_gelu import add_expert_bias_, expert_bias_gradient
from swin_moe.ops.linear import packed_product, serves, weight_gradient
from swin_moe.ops.reused_memory import empty_like_reused
from swin_moe.ops.transforms import call_operator

_ALIGNED = 8  # grouped_mm wants row strides of 16 bytes

SCHEMAS = {
    "grouped_linear": "grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor parts, bool grouped) -> Tensor",
    "grouped_linear_backward": (
        "grouped_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor parts, bool grouped, bool[] needs) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    *,
    grouped: bool | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """Returns (N, O): each run of rows times its expert's matrix plus its bias; rows that belong to none hold nothing.

    Every expert has a gradient, zeros if it got no rows.

    Args:
        x: (N, I), rows sorted by expert.
        weight: (E, I, O), may be a transposed view. Of another dtype than x it is converted, in the loop one
            expert's at a time: a copy of all would go out to memory and come back, and be kept for backward.
        bias: (E, O), added in float32 by a grouped product and rounded to the dtype of x elsewhere; None = none.
        counts: (E,) int64, rows of each expert; their sum is at most N. On the device of x, the host is not asked for
            them where the product is grouped; elsewhere it is.
        grouped: One grouped product instead of a loop over experts; None = `use_grouped`.
        ends: What `row_ends` makes of the counts, for layers that share them; None = made here where it is needed.
    """
    if grouped is None:
        grouped = x.shape[0] > 0 and use_grouped(x.device, x.dtype, *weight.shape[1:])
    if not grouped:
        bias = None if bias is None else bias.to(x.dtype)
        return call_operator(_operator, _differentiate, _save, x, weight, bias, counts, False)
    ends = row_ends(counts, x) if ends is None else ends
    return call_operator(_operator, _differentiate, _save, x, weight.to(x.dtype), bias, ends, True)


def row_ends(counts: Tensor, x: Tensor) -> Tensor:
    """Returns (E,) int32, where each expert's rows end, on the device of x."""
    return counts.to(x.device, non_blocking=True).cumsum(0).to(torch.int32)


def use_grouped(device: torch.device, dtype: torch.dtype, num_inputs: int, num_outputs: int) -> bool:
    """Returns whether one grouped product serves: bfloat16 on CUDA with aligned rows.

    On the CPU grouped_mm is a loop itself and takes the same time (75 ms forward and backward at N = 4096, I = 192, O =
    768, E = 32, one thread); other dtypes it does not know on CUDA.
    """
    aligned = num_inputs % _ALIGNED == 0 and num_outputs % _ALIGNED == 0
    return device.type == "cuda" and dtype == torch.bfloat16 and aligned


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Tensor, grouped: bool) -> Tensor:
    """Returns what grouped_linear does. parts: (E,), the int64 counts, or for a grouped product the int32 ends."""
    if grouped:
        y = F.grouped_mm(x, weight, offs=parts)
        if bias is not None:
            add_expert_bias_(y, bias, parts)
        return y
    if _is_few(x, weight):
        return row_products.grouped_rows(x, weight, bias, parts)
    y = x.new_empty((x.shape[0], weight.shape[2]))
    runs, rest = _runs(parts, x, y)
    converted = _converter(weight, x.dtype)
    # A loop over w[e] instead of unbind would make backward O(E^2) (361 against 120 ms, E = 32).
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    for (x_e, y_e), w_e, b_e in zip(runs, weight.unbind(0), biases):
        if not len(x_e):
            continue
        w_e = converted(w_e)
        if serves(x_e, w_e):
            y_e.copy_(packed_product(x_e, w_e.t(), b_e))
        elif b_e is None:
            torch.mm(x_e, w_e, out=y_e)
        else:
            torch.addmm(b_e, x_e, w_e, out=y_e)
    rest[1].zero_()
    return y


def _is_few(x: Tensor, weight: Tensor) -> bool:
    """Returns whether the kernels for few rows take all products in one call; by the mean of the experts."""
    return row_products.takes(x, weight) and row_products.is_few(x.shape[0], x.dtype, weight.shape[0])


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Tensor, grouped: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, parts: Tensor, grouped: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias; an empty tensor for what is not needed."""
    if grouped:
        return _grouped_gradients(grad_y, x, weight, parts, needs)
    grad_x, grad_weight, grad_bias = _empty_gradients(grad_y, x, weight, needs, empty_like=empty_like_reused)
    if _is_few(x, weight):
        found = grad_x, grad_weight, grad_bias
        row_products.grouped_rows_backward(
            grad_y, x, weight, parts, [grad if needed else None for grad, needed in zip(found, needs)]
        )
        return found
    runs, rest = _runs(parts, x, grad_y, grad_x if needs[0] else x)
    converted = _converter(weight, x.dtype)
    for e, (x_e, g_e, grad_x_e) in enumerate(runs):
        packed = serves(x_e, weight[e])
        if needs[0] and len(x_e):
            w_e = converted(weight[e])
            grad_x_e.copy_(packed_product(g_e, w_e)) if packed else torch.mm(g_e, w_e.t(), out=grad_x_e)
        if needs[1]:
            _put_weight_gradient(grad_weight[e], x_e, g_e, packed=packed)
        if needs[2]:
            torch.sum(g_e, dim=0, out=grad_bias[e])
    if needs[0]:
        rest[2].zero_()
    return grad_x, grad_weight, grad_bias


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, parts: Tensor, grouped: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = _empty_gradients(grad_y, x, weight, needs)
    if grouped and needs[2]:  # summed in float32, and left so
        grad_bias = grad_bias.to(torch.promote_types(grad_y.dtype, torch.float32))
    return grad_x, grad_weight, grad_bias


def _grouped_gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in needs)
    if needs[0]:
        grad_x = F.grouped_mm(grad_y, weight.transpose(1, 2), offs=ends)
    if needs[1]:
        # Whichever of the two products lies in memory as the weight does: neither is copied.
        if weight.is_contiguous():
            grad_weight = F.grouped_mm(x.t(), grad_y, offs=ends)
        else:
            grad_weight = F.grouped_mm(grad_y.t(), x, offs=ends).transpose(1, 2)
        grad_weight = _as_laid_out(_zeroed_where_empty(grad_weight, ends), weight)
    if needs[2]:
        grad_bias = expert_bias_gradient(grad_y, ends)
    return grad_x, grad_weight, grad_bias


def _zeroed_where_empty(grad: Tensor, ends: Tensor) -> Tensor:
    """Returns gradients (E, ...), those of experts without rows zeroed where the device's product leaves them unset.

    On compute capability 10.x it does (pytorch/pytorch issue 172439); elsewhere a pass over them would buy nothing.
    """
    if not _leaves_empty_unset(grad.device):
        return grad
    empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return grad.masked_fill_(empty.view(-1, *(1,) * (grad.dim() - 1)), 0)


def _leaves_empty_unset(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, parts, ctx.grouped = inputs
    ctx.save_for_backward(x, weight, parts)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, parts = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.swin_moe.grouped_linear_backward(grad_y.contiguous(), x, weight, parts, ctx.grouped, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs)), None, None


def _register() -> None:
    # Not torch.library.custom_op: its kernels import torch._dynamo at their first call, which takes seconds and holds
    # process groups for good.
    forms: dict[str, tuple[Callable, Callable]] = {
        "grouped_linear": (_forward, _fake_forward),
        "grouped_linear_backward": (_backward, _fake_backward),
    }
    for name, (kernel, fake) in forms.items():
        library = extension.define(SCHEMAS[name])
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{extension.NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_autograd("swin_moe::grouped_linear", _differentiate, setup_context=_save, lib=library)


_register()
_operator = torch.ops.swin_moe.grouped_linear


def _empty_gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: list[bool],
    *,
    empty_like: Callable[[Tensor], Tensor] = torch.empty_like,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (grad_x, grad_weight, grad_bias) to be filled. A weight gradient lies in memory as the weight does: fc1
    comes transposed, and its gradient must not be copied when it is accumulated."""
    none = x.new_empty(0)
    grad_bias = grad_y.new_empty((weight.shape[0], grad_y.shape[1])) if needs[2] else none.clone()
    return (
        torch.empty_like(x) if needs[0] else none,
        empty_like(weight) if needs[1] else none.clone(),
        grad_bias,
    )


def _converter(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Returns what gives one expert's matrix in a dtype: a copy that the next call overwrites, or the matrix itself."""
    if weight.dtype == dtype or not len(weight):
        return lambda matrix: matrix
    return torch.empty_like(weight[0], dtype=dtype).copy_


def _put_weight_gradient(out: Tensor, x: Tensor, grad: Tensor, *, packed: bool) -> None:
    """Writes x.T @ grad into out (I, O), in the order in which it lies in memory."""
    if not len(x):
        out.zero_()
    elif out.dtype != x.dtype:
        out.copy_(torch.mm(x.t(), grad, out=torch.empty_like(out, dtype=x.dtype)))
    elif not packed:
        torch.mm(x.t(), grad, out=out)
    elif out.is_contiguous():
        out.copy_(weight_gradient(x, grad))
    else:
        out.t().copy_(weight_gradient(grad, x))


def _as_laid_out(grad: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient with the strides of the weight, which is what the fake operator promises."""
    return grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)


def _runs(counts: Tensor, *tensors: Tensor) -> tuple[list[tuple[Tensor, ...]], list[Tensor]]:
    """Returns per expert the rows of each tensor, and the rows that belong to none."""
    sizes = counts.tolist()
    sizes.append(len(tensors[0]) - sum(sizes))
    parts = [tensor.split(sizes) for tensor in tensors]
    return list(zip(*(part[:-1] for part in parts))), [part[-1] for part in parts]
