"""The residual sum of bfloat16 maps with drop path: torch.addcmul's bits, in memory that is kept from step to step.

Shape legend: B images.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops import extension
from swin_moe.ops.extension import is_ordinary

SCHEMAS = {
    "mixed_residual": "mixed_residual(Tensor x, Tensor branch, Tensor? factor) -> Tensor",
    "scaled_images": "scaled_images(Tensor x, Tensor factor) -> Tensor",
}


def mixed_residual(x: Tensor, branch: Tensor, factor_B: Tensor | None) -> Tensor:
    """Returns x + factor * branch, (B, ...) bfloat16, rounded once; first derivatives only, none for the factor.

    Args:
        x, branch: (B, ...) bfloat16. factor_B: (B,), rounded to bfloat16; None = 1.
    """
    return _MixedResidual.apply(x, branch, None if factor_B is None else factor_B.to(branch.dtype))


def serves(x: Tensor, branch: Tensor) -> bool:
    """Returns whether the kernels add these maps for a step that is differentiated."""
    if torch.compiler.is_compiling() or "cpu" not in _COMPILED or not torch.is_grad_enabled():
        return False
    if x.dtype != torch.bfloat16 or branch.dtype != torch.bfloat16 or x.shape != branch.shape:
        return False
    if x.device.type != "cpu" or branch.device.type != "cpu" or not (x.requires_grad or branch.requires_grad):
        return False
    return is_ordinary(x) and is_ordinary(branch)


class _MixedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(factor)
        return torch.ops.swin_moe.mixed_residual(x, branch, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        if factor is None or not ctx.needs_input_grad[1]:
            return grad, grad, None
        return grad, torch.ops.swin_moe.scaled_images(grad, factor), None


def _images(factor: Tensor, x: Tensor) -> Tensor:
    return factor.view(-1, *(1,) * (x.dim() - 1))


def _forward(x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    return x + branch if factor is None else torch.addcmul(x, branch, _images(factor, x))


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    return x * _images(factor, x)


def _fake(x: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


for _name, _kernel in (("mixed_residual", _forward), ("scaled_images", _scaled)):
    extension.register(SCHEMAS[_name], _kernel, _fake)
_COMPILED = extension.compiled_for(*SCHEMAS)
