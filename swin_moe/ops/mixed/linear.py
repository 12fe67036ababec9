"""Linear layers in bfloat16 with float32 weights or copies of them: PyTorch's products, and what is around them.

Under autocast F.linear writes the bias to all of the product before the product, which reads it again, sums a bias'
gradient by thread, and takes fresh memory for weights in bfloat16, results and gradients in every step, a fault a page.
Here the bias goes through the cache, sums are float32 in a fixed order, and memory is what the last step left. Values
are those of autocast: weights and inputs are rounded as it rounds them, and so are the gradients of weight and bias.

Shape legend: N rows (all but the last dimension), I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops import extension
from swin_moe.ops.extension import is_ordinary

SCHEMAS = {
    "half_weight": "half_weight(Tensor weight) -> Tensor",
    "mixed_linear": "mixed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "mixed_linear_backward": (
        "mixed_linear_backward(Tensor grad, Tensor x, Tensor weight, bool wide, bool[3] needs) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}
HALF = torch.bfloat16
_KEPT = (torch.float32, HALF)  # what weights and inputs may be kept in


def mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (..., O) bfloat16, what F.linear gives under autocast; first derivatives only.

    Args:
        x: (..., I), float32 or bfloat16. weight: (O, I), likewise. bias: (O,), likewise, or None.
    """
    return _MixedLinear.apply(x if x.dtype == HALF else x.to(HALF), weight, bias)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Returns whether autocast gives a product of x (..., I) and weight (O, I) in bfloat16 that is differentiated on
    the CPU, where the kernels are."""
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
        return False
    if torch.get_autocast_dtype("cpu") != HALF or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    if "cpu" not in _COMPILED or x.dtype not in _KEPT or weight.dtype not in _KEPT or weight.dim() != 2:
        return False
    return (x.requires_grad or weight.requires_grad) and is_ordinary(x) and is_ordinary(weight)


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = weight if weight.dtype == HALF else torch.ops.swin_moe.half_weight(weight)
        ctx.save_for_backward(x, half)
        ctx.wide, ctx.bias_dtype = weight.dtype != HALF, None if bias is None else bias.dtype
        return torch.ops.swin_moe.mixed_linear(x, half, None if bias is None else bias.to(HALF))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, half = ctx.saved_tensors
        needs = list(ctx.needs_input_grad)
        found = torch.ops.swin_moe.mixed_linear_backward(grad, x, half, ctx.wide, needs)
        grad_x, grad_weight, grad_bias = (g if needed else None for g, needed in zip(found, needs))
        return grad_x, grad_weight, None if grad_bias is None else grad_bias.to(ctx.bias_dtype)


def _half_weight(weight: Tensor) -> Tensor:
    return weight.to(HALF, copy=True)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().t()
    return (y if bias is None else y + bias.double()).to(HALF)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, wide: bool, needs: list[bool]) -> tuple[Tensor | None, ...]:
    flat, rows = grad.reshape(-1, grad.shape[-1]).double(), x.reshape(-1, x.shape[-1]).double()
    grad_x = (flat @ weight.double()).view(x.shape).to(HALF)
    grad_weight = (flat.t() @ rows).to(HALF)
    found = grad_x, grad_weight.float() if wide else grad_weight, flat.sum(0).to(HALF)
    return tuple(g if needed else None for g, needed in zip(found, needs))


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, wide: bool, needs: list[bool]) -> tuple[Tensor | None, ...]:
    dtype = torch.float32 if wide else HALF
    found = x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=dtype), weight.new_empty((weight.shape[0],))
    return tuple(g if needed else None for g, needed in zip(found, needs))


for _name, _kernel, _fake in (
    ("half_weight", _half_weight, lambda weight: weight.new_empty(weight.shape, dtype=HALF)),
    ("mixed_linear", _forward, _forward_fake),
    ("mixed_linear_backward", _backward, _backward_fake),
):
    extension.register(SCHEMAS[_name], _kernel, _fake)
_COMPILED = extension.compiled_for(*SCHEMAS)
