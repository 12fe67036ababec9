"""LayerNorm of bfloat16 rows with float32 weights: numbers are float32 inside, gradients come from one pass over rows.

PyTorch takes 0.6 ns a number forward, and its gradient of x, which leaves out the weights', reads everything again.

Shape legend: N rows (all but the last dimension), C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.ops import extension

SCHEMAS = {
    "mixed_norm": "mixed_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    "mixed_norm_backward": (
        "mixed_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, bool[3] needs) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}
_whole = torch.ops.aten.native_layer_norm_backward


def mixed_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns F.layer_norm of the last dimension, (..., C) bfloat16.

    Args:
        x: (..., C) bfloat16. weight, bias: (C,) float32.
    """
    return _MixedNorm.apply(x, weight, bias, eps)


def compiled() -> bool:
    """Returns whether the CPU has the kernels."""
    return "cpu" in _COMPILED


class _MixedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, mean, rstd = torch.ops.swin_moe.mixed_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # a second derivative is asked for, which PyTorch's backward has
            each = (*x.shape[:-1], 1)
            moments = mean.view(each), rstd.view(each)
            return *_whole(grad.contiguous(), x, weight.shape, *moments, weight, bias, needs), None
        grads = torch.ops.swin_moe.mixed_norm_backward(grad, x, mean, rstd, weight, needs)
        return *(g if needed else None for g, needed in zip(grads, needs)), None


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    mean = wide.mean(-1)
    rstd = (wide - mean[..., None]).square().mean(-1).add(eps).rsqrt()
    return F.layer_norm(wide, weight.shape, weight, bias, eps).to(x.dtype), mean.flatten(), rstd.flatten()


def _backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    rows = tuple(range(x.dim() - 1))
    each = (*x.shape[:-1], 1)
    wide, scale = grad.to(mean.dtype), rstd.view(each)
    normed = (x.to(mean.dtype) - mean.view(each)) * scale
    given = wide * weight
    inner = given - given.mean(-1, keepdim=True) - normed * (given * normed).mean(-1, keepdim=True)
    sums = [(wide * normed).sum(rows) if rows else wide * normed, wide.sum(rows) if rows else wide.clone()]
    found = ((inner * scale).to(x.dtype), *sums)
    return tuple(g if needed else None for g, needed in zip(found, needs))


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), weight.new_empty((rows,)), weight.new_empty((rows,))


def _backward_fake(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    found = x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    return tuple(g if needed else None for g, needed in zip(found, needs))


for _name, _kernel, _fake in (
    ("mixed_norm", _forward, _forward_fake),
    ("mixed_norm_backward", _backward, _backward_fake),
):
    extension.register(SCHEMAS[_name], _kernel, _fake)
_COMPILED = extension.compiled_for(*SCHEMAS)
