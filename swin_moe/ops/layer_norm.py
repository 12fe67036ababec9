"""LayerNorm whose gradients of weight and bias are sums in float32 on the CPU too.

PyTorch adds up these gradients in the dtype of the rows there, by thread: in bfloat16, which autocast gives, the
weight's is 8 to 15 % and the bias' 15 to 60 % off at 6,272 to 25,088 rows of 96 channels on one thread, and other
numbers on two. Here they are sums in float32 of runs of 256 rows, which are added up in their order
(csrc/rows/layer_norm.cpp): no bit depends on the threads. What comes out of the norm and the gradient of x are
PyTorch's, but for bfloat16, whose norm and gradients are one pass each over the rows (mixed/norm.py).

Shape legend: N rows (all but the last dimension), C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.ops import extension
from swin_moe.ops.extension import Ordinary, is_ordinary
from swin_moe.ops.mixed import norm as mixed

NAME = "layer_norm_backward"
SCHEMA = (
    f"{NAME}(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor)"
)
_whole = torch.ops.aten.native_layer_norm_backward
_ROWS = (torch.float32, torch.bfloat16, torch.float16)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm by `layer_norm`: the same parameters, names and initial values."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., C)."""
        if len(self.normalized_shape) != 1:
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Returns F.layer_norm of the last dimension; the gradients of weight and bias are summed in float32 on the CPU.

    Args:
        x: (..., C). weight: (C,) or None. bias: (C,) or None.
    """
    if weight is None or bias is None or not serves(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:] if weight is None else weight.shape, weight, bias, eps)
    if x.dtype == torch.bfloat16 and mixed.compiled():
        return mixed.mixed_norm(x, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps)


def serves(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Returns whether the kernel sums the gradients of weight and bias for x (..., C)."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or "cpu" not in _COMPILED or x.dtype not in _ROWS:
        return False
    if not torch.is_grad_enabled() or not (weight.requires_grad or bias.requires_grad):
        return False
    if weight.dtype != torch.float32 or bias.dtype != torch.float32 or weight.shape != x.shape[-1:]:
        return False
    if type(weight) not in Ordinary.types or type(bias) not in Ordinary.types or not is_ordinary(x):
        return False
    return weight.device == bias.device == x.device


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # a second derivative is asked for, which PyTorch's backward has
            return *_whole(grad.contiguous(), x, weight.shape, mean, rstd, weight, bias, needs), None
        grads = torch.ops.swin_moe.layer_norm_backward(grad, x, mean, rstd, weight, bias, needs)
        return *(g if needed else None for g, needed in zip(grads, needs)), None


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of x, weight and bias, None where not needed: what the operator computes, plainly.

    Args:
        grad, x: (..., C), what comes back to the norm and what it was given.
        mean, rstd: (..., 1) of each row, float32 (float64 in float64). weight, bias: (C,), of the same dtype.
    """
    first = [needs[0], False, False]
    grad_x = _whole(grad.contiguous(), x.contiguous(), weight.shape, mean, rstd, weight, bias, first)[0]
    rows = tuple(range(x.dim() - 1))
    wide = grad.to(mean.dtype)
    normed = (x.to(mean.dtype) - mean) * rstd
    sums = [(wide * normed).sum(rows) if rows else wide * normed, wide.sum(rows) if rows else wide.clone()]
    grad_weight, grad_bias = (g if needed else None for g, needed in zip(sums, needs[1:]))
    return grad_x, grad_weight, grad_bias


def _fake(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    found = x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return tuple(g if needed else None for g, needed in zip(found, needs))


extension.register(SCHEMA, layer_norm_backward, _fake)
_COMPILED = extension.compiled_for(NAME)
