"""The residual sum, drop path and LayerNorm of a block as one operator: one kernel instead of two to four.

`residual_norm` serves pre-norm blocks, which normalize the sum, `norm_residual` SwinV2's, which normalize the branch.

The kernels are CUDA's (csrc/cuda/rows/residual_norm.cu); any other device runs the Python form, which is what the
network computes without them.

Shape legend: B images, C channels, N rows (B times the tokens of an image).
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from swin_moe.ops import extension
from swin_moe.ops.layer_norm import LayerNorm
from swin_moe.ops.linear import is_untouched
from swin_moe.ops.mixed import residual as mixed

SCHEMAS = {
    "residual_norm": (
        "residual_norm(Tensor x, Tensor branch, Tensor? factor, Tensor weight, Tensor bias, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "residual_norm_backward": (
        "residual_norm_backward(Tensor? grad_sum, Tensor grad_normed, Tensor sum, Tensor? factor, Tensor weight, "
        "Tensor mean, Tensor rstd, ScalarType branch_dtype) -> (Tensor, Tensor, Tensor)"
    ),
    "norm_residual": (
        "norm_residual(Tensor x, Tensor branch, Tensor? factor, Tensor weight, Tensor bias, float eps) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "norm_residual_backward": (
        "norm_residual_backward(Tensor grad_sum, Tensor branch, Tensor? factor, Tensor weight, Tensor mean, "
        "Tensor rstd) -> (Tensor, Tensor)"
    ),
}
LARGEST_CHANNELS = 1536  # swin_moe::kLargestNormChannels: sums of a block's rows fit the shared memory of any device
_BRANCHES = (torch.float32, torch.bfloat16, torch.float16)


def add_branch(x: Tensor, branch: Tensor, factor_B: Tensor | None) -> Tensor:
    """Returns x + factor * branch, image by image (drop path); None = 1, where nothing is dropped."""
    if mixed.serves(x, branch):
        return mixed.mixed_residual(x, branch, factor_B)
    if factor_B is None:
        return x + branch
    factor = factor_B.to(branch.dtype).view(-1, *(1,) * (x.dim() - 1))
    return torch.addcmul(x, branch, factor) if x.dtype == branch.dtype else x + branch * factor


def residual_norm(
    x: Tensor, branch: Tensor, factor_B: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns (x + factor * branch, LayerNorm of that), each (B, ..., C); first derivatives only, none for the factor.

    Args:
        x: (B, ..., C), float32 or (not on CUDA) float64.
        branch: Of the shape of x; on CUDA float32, bfloat16 or float16.
        factor_B: (B,), rounded to the dtype of branch; None = 1.
        weight: (C,), of the dtype of x. bias: The same.
    """
    total, normed, _, _ = torch.ops.swin_moe.residual_norm(x, branch, factor_B, weight, bias, eps)
    return total, normed


def norm_residual(
    x: Tensor, branch: Tensor, factor_B: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Returns x + factor * LayerNorm(branch), (B, ..., C); first derivatives only, none for the factor.

    Args: As of residual_norm; the branch is normalized in the dtype of x, to which factor_B is rounded.
    """
    return torch.ops.swin_moe.norm_residual(x, branch, factor_B, weight, bias, eps)[0]


def is_fused(norm: nn.Module, x: Tensor, branch: Tensor) -> TypeGuard[nn.LayerNorm]:
    """Returns whether the kernels compute what `norm` would of a sum or branch; false on the CPU, which has none."""
    if not extension.kernels_take(x, _COMPILED):
        return False
    return is_replaceable(norm, x.shape[-1]) and x.dtype == torch.float32 and branch.dtype in _BRANCHES


def is_replaceable(norm: nn.Module, channels: int) -> TypeGuard[nn.LayerNorm]:
    """Returns whether calling a module is LayerNorm of the last dimension with float32 weight and bias."""
    if type(norm) not in (nn.LayerNorm, LayerNorm) or not is_untouched(norm) or norm.normalized_shape != (channels,):
        return False
    if channels > LARGEST_CHANNELS or norm.weight is None or norm.bias is None:
        return False
    return norm.weight.dtype == norm.bias.dtype == torch.float32


def _forward(
    x: Tensor, branch: Tensor, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = add_branch(x, branch, factor).contiguous()
    normed, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
    return total, normed, mean.flatten(), rstd.flatten()


def _backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (*total.shape[:-1], 1)
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.contiguous(), total, weight.shape, mean.view(rows), rstd.view(rows), weight, weight, [True] * 3
    )
    grad = grad if grad_sum is None else grad + grad_sum
    grad_branch = grad.to(branch_dtype, copy=True)
    if factor is not None:
        grad_branch *= factor.to(branch_dtype).view(-1, *(1,) * (grad.dim() - 1))
    return grad, grad_branch, torch.stack([grad_weight, grad_bias])


def _forward_fake(
    x: Tensor, branch: Tensor, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((rows,)), x.new_empty((rows,))


def _backward_fake(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = total.shape
    return total.new_empty(shape), total.new_empty(shape, dtype=branch_dtype), weight.new_empty((2, shape[-1]))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, branch, factor, weight, _, _ = inputs
    total, _, mean, rstd = output
    ctx.branch_dtype = branch.dtype
    ctx.set_materialize_grads(False)  # zeros for mean and rstd would be two kernels
    ctx.save_for_backward(total, factor, weight, mean, rstd)


def _differentiate(ctx: Any, grad_sum: Tensor | None, grad_normed: Tensor | None, *_: None) -> tuple:
    total, factor, weight, mean, rstd = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(total)
    grad_x, grad_branch, parameters = torch.ops.swin_moe.residual_norm_backward(
        grad_sum, grad_normed, total, factor, weight, mean, rstd, ctx.branch_dtype
    )
    return grad_x, grad_branch, None, *parameters.unbind(0), None


def _norm_forward(
    x: Tensor, branch: Tensor, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normed, mean, rstd = torch.native_layer_norm(branch.to(x.dtype).contiguous(), weight.shape, weight, bias, eps)
    return add_branch(x, normed, factor).contiguous(), mean.flatten(), rstd.flatten()


def _norm_backward(
    grad_sum: Tensor, branch: Tensor, factor: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    given = grad_sum if factor is None else grad_sum * factor.view(-1, *(1,) * (branch.dim() - 1))
    rows = (*branch.shape[:-1], 1)
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        given.contiguous(),
        branch.to(given.dtype).contiguous(),
        weight.shape,
        mean.view(rows),
        rstd.view(rows),
        weight,
        weight,
        [True] * 3,
    )
    return grad.to(branch.dtype), torch.stack([grad_weight, grad_bias])


def _norm_forward_fake(
    x: Tensor, branch: Tensor, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), x.new_empty((rows,)), x.new_empty((rows,))


def _norm_backward_fake(
    grad_sum: Tensor, branch: Tensor, factor: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), weight.new_empty((2, branch.shape[-1]))


def _norm_save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, branch, factor, weight, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(branch, factor, weight, *output[1:])


def _norm_differentiate(ctx: Any, grad_sum: Tensor | None, *_: None) -> tuple:
    if grad_sum is None:
        return (None,) * 6
    branch, factor, weight, mean, rstd = ctx.saved_tensors
    grad_branch, parameters = torch.ops.swin_moe.norm_residual_backward(grad_sum, branch, factor, weight, mean, rstd)
    return grad_sum, grad_branch, None, *parameters.unbind(0), None


for _name, _kernel, _fake in (
    ("residual_norm", _forward, _forward_fake),
    ("residual_norm_backward", _backward, _backward_fake),
    ("norm_residual", _norm_forward, _norm_forward_fake),
    ("norm_residual_backward", _norm_backward, _norm_backward_fake),
):
    _library = extension.register(SCHEMAS[_name], _kernel, _fake)
for _name, _gradient, _keep in (
    ("residual_norm", _differentiate, _save),
    ("norm_residual", _norm_differentiate, _norm_save),
):
    torch.library.register_autograd(f"{extension.NAMESPACE}::{_name}", _gradient, setup_context=_keep, lib=_library)
# Asked once both exist: where there is no CUDA build, only Python has defined them.
_COMPILED = extension.compiled_for(*SCHEMAS)
