"""The bias of a hidden layer and exact GELU in bfloat16: the product before its bias is all that is read and kept.

Bias and its gradient are rounded to bfloat16, as autocast rounds them; the sum of product and bias is not. The normal
distribution is a polynomial and a power of two (csrc/cpu/mixed/gelu_rows.h): of all bfloat16 numbers above -6.5 GELU
rounds 0.3 % to the other neighbour (PyTorch's: 1.4 %), its slope is within 1e-5. The backward sums the bias' gradient
while it is at the rows, in float32 and in a fixed order.

Shape legend: H hidden channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops import extension

SCHEMAS = {
    "mixed_gelu": "mixed_gelu(Tensor x, Tensor bias) -> Tensor",
    "mixed_gelu_backward": "mixed_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
}


def mixed_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Returns (..., H) bfloat16, gelu(x + bias); first derivatives only.

    Args:
        x: (..., H) bfloat16. bias: (H,), float32 or bfloat16.
    """
    return _MixedGelu.apply(x, bias)


def compiled() -> bool:
    """Returns whether the CPU has the kernels."""
    return "cpu" in _COMPILED


class _MixedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        rounded = bias.to(x.dtype).float()  # as autocast does, so that copies of weights have the same bits
        ctx.save_for_backward(x, rounded)
        ctx.bias_dtype = bias.dtype
        return torch.ops.swin_moe.mixed_gelu(x, rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_bias = torch.ops.swin_moe.mixed_gelu_backward(grad, *ctx.saved_tensors)
        return grad_x, grad_bias.to(grad_x.dtype).to(ctx.bias_dtype)


def _forward(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x.double() + bias.double()).to(x.dtype)


def _backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    given = torch.ops.aten.gelu_backward(grad.double(), x.double() + bias.double())
    return given.to(x.dtype), given.reshape(-1, given.shape[-1]).sum(0).to(bias.dtype)


def _forward_fake(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


for _name, _kernel, _fake in (
    ("mixed_gelu", _forward, _forward_fake),
    ("mixed_gelu_backward", _backward, _backward_fake),
):
    extension.register(SCHEMAS[_name], _kernel, _fake)
_COMPILED = extension.compiled_for(*SCHEMAS)
