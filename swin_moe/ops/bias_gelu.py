"""The bias of each row's expert, GELU and dropout as one operator: one kernel instead of two to eight.

The kernels are CUDA's (csrc/cuda/rows/bias_gelu.cu). The CPU keeps to the product's own bias, GELU and random_dropout,
which are as fast there, but for a dense layer in bfloat16 that is trained (mixed/gelu.py); whoever has the choice asks
`is_fused`. Any other device runs the Python form.

What is kept for backward is the product before its bias, of which the backward makes GELU's slope and the draws again.

Shape legend: N rows sorted by expert (rows beyond `ends` belong to none), E experts, H hidden channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.ops import extension
from swin_moe.ops.linear import is_plain
from swin_moe.ops.mixed import gelu as mixed_gelu
from swin_moe.ops.mixed import linear as mixed_linear
from swin_moe.ops.random_draws import NO_DRAW, UnitDraw, unit_factors
from swin_moe.ops.transforms import call_operator

_DRAW = "Tensor? words, Tensor? rows, int layer, int purpose, int site, float drop, float scale"
SCHEMAS = {
    "bias_gelu": f"bias_gelu(Tensor x, Tensor bias, Tensor? ends, {_DRAW}) -> Tensor",
    "bias_gelu_backward": (
        f"bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor? ends, {_DRAW}) -> (Tensor, Tensor)"
    ),
    "add_expert_bias_": "add_expert_bias_(Tensor(a!) y, Tensor bias, Tensor ends) -> ()",
    "expert_bias_gradient": "expert_bias_gradient(Tensor grad, Tensor ends) -> Tensor",
}
_ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)


def bias_gelu(x: Tensor, bias: Tensor, *, ends: Tensor | None, draw: UnitDraw | None) -> Tensor:
    """Returns (N, H), gelu(x + bias of the row's expert) with units dropped; zeros in rows that belong to none.

    Sums are float32, and the gradient of the bias adds rows in a fixed order. First derivatives only.

    Args:
        x: (N, H), on CUDA float32, bfloat16 or float16.
        bias: (E, H), on CUDA float32.
        ends: (E,) int32, where each expert's rows end; None = all have as many.
        draw: None = no unit is dropped.
    """
    operands = NO_DRAW if draw is None else draw.operands()
    return call_operator(torch.ops.swin_moe.bias_gelu, _differentiate, _save, x, bias, ends, *operands)


def hidden_layer(layer: nn.Module, x: Tensor, draw: UnitDraw | None) -> Tensor:
    """Returns gelu(layer(x)) with units dropped: all but the product in one kernel where there is one."""
    if not (isinstance(layer, nn.Linear) and is_plain(layer) and layer.bias is not None):
        hidden = F.gelu(layer(x))
    elif is_fused(x):
        product = F.linear(x, layer.weight)
        rows = product.reshape(-1, product.shape[-1])
        return bias_gelu(rows, layer.bias.float()[None], ends=None, draw=draw).view(product.shape)
    elif mixed_gelu.compiled() and mixed_linear.serves(x, layer.weight):
        hidden = mixed_gelu.mixed_gelu(mixed_linear.mixed_linear(x, layer.weight, None), layer.bias)
    else:
        hidden = F.gelu(layer(x))
    return hidden if draw is None else draw.apply(hidden)


def add_expert_bias_(y: Tensor, bias: Tensor, ends: Tensor) -> None:
    """Adds the bias (E, H) of each row's expert to y (N, H) in float32; rows that belong to none are left alone."""
    torch.ops.swin_moe.add_expert_bias_(y, bias.float(), ends)


def expert_bias_gradient(grad: Tensor, ends: Tensor) -> Tensor:
    """Returns (E, H), the sums of each expert's rows of grad (N, H), in at least float32 and in a fixed order."""
    return torch.ops.swin_moe.expert_bias_gradient(grad, ends)


def is_fused(x: Tensor) -> bool:
    """Returns whether the kernels take the product of x and a matrix; false on the CPU, which has none."""
    if not extension.kernels_take(x, _COMPILED):
        return False
    kind = x.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype) in _ELEMENTS


def _experts_of(rows: Tensor, num_experts: int, ends: Tensor | None) -> Tensor:
    """Returns (N,) int64, the expert of each row; E for rows that belong to none."""
    number = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
    if ends is None:
        return number.long() // max(len(rows) // max(num_experts, 1), 1)
    return torch.searchsorted(ends, number, right=True)


def _biases(x: Tensor, bias: Tensor, expert: Tensor) -> Tensor:
    """Returns (N, H), the bias of each row in the dtype of sums; of a row of none, zeros."""
    wide = bias.to(torch.promote_types(x.dtype, torch.float32))
    return torch.cat([wide, wide.new_zeros((1, wide.shape[1]))]).index_select(0, expert)


def _sums_by_expert(rows: Tensor, expert: Tensor, num_experts: int) -> Tensor:
    """Returns (E, H). A product with a mask: index_add_ would add in any order on a device."""
    mask = expert == torch.arange(num_experts, device=rows.device)[:, None]
    return mask.to(rows.dtype) @ rows.masked_fill((expert == num_experts)[:, None], 0)


def _factor(
    x: Tensor, words: Tensor | None, rows: Tensor | None, layer: int, purpose: int, site: int, drop: float, scale: float
) -> Tensor | float:
    if words is None:
        return 1.0
    assert rows is not None, "units are dropped by the numbers of rows"
    return unit_factors(x, words, layer, purpose, site, rows, drop, scale)


def _forward(x: Tensor, bias: Tensor, ends: Tensor | None, *draw: Any) -> Tensor:
    expert = _experts_of(x, len(bias), ends)
    hidden = F.gelu(x + _biases(x, bias, expert)) * _factor(x, *draw)
    return hidden.masked_fill_((expert == len(bias))[:, None], 0).to(x.dtype)


def _backward(grad: Tensor, x: Tensor, bias: Tensor, ends: Tensor | None, *draw: Any) -> tuple[Tensor, Tensor]:
    expert = _experts_of(x, len(bias), ends)
    sums = x + _biases(x, bias, expert)
    given = torch.ops.aten.gelu_backward((grad * _factor(x, *draw)).to(sums.dtype), sums)
    given.masked_fill_((expert == len(bias))[:, None], 0)
    return given.to(x.dtype, copy=True), _sums_by_expert(given, expert, len(bias)).to(bias.dtype)


def _add_expert_bias(y: Tensor, bias: Tensor, ends: Tensor) -> None:
    expert = _experts_of(y, len(bias), ends)
    y.add_(_biases(y, bias, expert))


def _expert_bias_gradient(grad: Tensor, ends: Tensor) -> Tensor:
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return _sums_by_expert(wide, _experts_of(grad, len(ends), ends), len(ends))


def _fake_forward(x: Tensor, bias: Tensor, ends: Tensor | None, *draw: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor, ends: Tensor | None, *draw: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _fake_gradient(grad: Tensor, ends: Tensor) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty((len(ends), grad.shape[1]), dtype=dtype)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, ends, words, rows, *ctx.numbers = inputs
    ctx.save_for_backward(x, bias, ends, words, rows)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, ends, words, rows = ctx.saved_tensors
    verb = torch.ops.swin_moe.bias_gelu_backward
    grad_x, grad_bias = verb(grad.contiguous(), x, bias, ends, words, rows, *ctx.numbers)
    return grad_x, grad_bias, *(None,) * 8


for _name, _kernel, _fake in (
    ("bias_gelu", _forward, _fake_forward),
    ("bias_gelu_backward", _backward, _fake_backward),
    ("add_expert_bias_", _add_expert_bias, lambda y, bias, ends: None),
    ("expert_bias_gradient", _expert_bias_gradient, _fake_gradient),
):
    _library = extension.register(SCHEMAS[_name], _kernel, _fake)
torch.library.register_autograd(f"{extension.NAMESPACE}::bias_gelu", _differentiate, setup_context=_save, lib=_library)
# Asked once all exist: where there is no CUDA build, only Python has defined them.
_COMPILED = extension.compiled_for(*SCHEMAS)
