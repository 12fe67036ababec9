"""Linear layers on processors where PyTorch's own products leave half of the speed unused.

Products of few rows go to kernels of our own (row_products.py), those of autocast that are differentiated to
mixed/linear.py; what follows is about the others, in float32.

PyTorch hands float32 products to MKL, which runs its AVX2 code on processors of other makers than Intel, also where
they have AVX-512. oneDNN, the other library inside PyTorch, does not: 200 to 230 against 100 GFLOP/s on one core of an
AMD Zen 5. PyTorch calls it for bfloat16 only, so `linear` calls it here, through the operators that PyTorch's own
compiler uses.
"""

import logging
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swin_moe.choice_cache import cpu_field
from swin_moe.ops import extension, row_products
from swin_moe.ops.extension import Ordinary as Ordinary
from swin_moe.ops.extension import is_ordinary as is_ordinary
from swin_moe.ops.mixed import linear as mixed

LOGGER = logging.getLogger("swin_moe")
# A call of oneDNN costs about 90 us, and the weight is packed each time. Two layers D to 4D to D, forward and backward:
# 0.8 times as fast at 128 rows, 0.9 to 1.3 at 256, 1.6 at 512 and 2 from 1500 on.
SMALLEST_MACS = 32_000_000
SMALLEST_ROWS = 256
PATCHES_COMPILED = extension.compiled_for("patch_projection_backward")


class Linear(nn.Linear):
    """nn.Linear by `linear`: the same parameters, names and initial values."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., out_features)."""
        return linear(x, self.weight, self.bias)


def is_untouched(module: nn.Module) -> bool:
    """Returns whether a call of a module is a call of its class's forward: no hooks, no forward of its own."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in module.__dict__


def is_plain(layer: nn.Module) -> TypeGuard[Linear]:
    """Returns whether calling a layer does nothing but `linear` with its weight and bias."""
    return type(layer) is Linear and is_untouched(layer)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns F.linear(x, weight, bias), by our kernels or oneDNN where that is faster; first derivatives only there.

    Args:
        x: (..., I). weight: (O, I). bias: (O,) or None.
    """
    if mixed.serves(x, weight):
        return mixed.mixed_linear(x, weight, bias)
    if serves_few(x, weight):
        return row_products.row_linear(x, weight, bias)
    if not serves(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def steady_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns F.linear(x, weight); by our kernels, where they are, whatever the rows, so that neither it nor a gradient
    depends on the number of threads. First derivatives only there.

    For narrow weights such as a router's, whose products the kernels compute at least as fast as MKL at any rows.
    """
    if _by_rows(x, weight):
        return row_products.row_linear(x, weight, None)
    return F.linear(x, weight)


def patch_projection(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (B, O, H // h, W // w), F.conv2d of patches that do not overlap: its stride is its kernel.

    Gradients of weight and bias are those of a linear layer over the patches, by our kernels where they are: as fast as
    the convolution's, closer to the sums, and the same bits for every number of threads. First derivatives only there.

    Args:
        image: (B, C, H, W). weight: (O, C, h, w). bias: (O,) or None.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        return F.conv2d(image, weight, bias, stride=weight.shape[2:])
    mixed = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if mixed else image.dtype
    served = "cpu" in PATCHES_COMPILED and row_products.takes(image, weight, dtype)
    served = served and dtype in (torch.float32, torch.bfloat16) and (mixed or weight.dtype == dtype)
    if not (served and is_ordinary(image) and is_ordinary(weight)):
        return F.conv2d(image, weight, bias, stride=weight.shape[2:])
    return _PatchProjection.apply(image.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype))


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x @ weight.T + bias by oneDNN; x (..., I) contiguous, weight (O, I) of any strides, no gradients."""
    return torch.ops.swin_moe.packed_product(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Returns (O, I), grad.T @ x, of grad (T, O) and x (T, I), both contiguous.

    By the kernels of row_products.py where they are: a sum over all rows is divided among threads by oneDNN, in as many
    sums as there are threads, and by these into the same ones for every number. No slower either: 1.0 to 2.6 times as
    fast as oneDNN for 1,568 to 25,088 rows (benchmarks/results/2026-11-29-thread-bits.md).
    """
    return torch.ops.swin_moe.packed_weight_gradient(grad, x)


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not weight.is_contiguous():
        weight = weight.contiguous()  # packing it with its strides takes twice as long
    rows = x.numel() // x.shape[-1]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _packed_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    like = grad.new_empty((grad.shape[1], x.shape[1]))  # only its shape is read
    if row_products.takes(grad, x):
        return torch.ops.swin_moe.row_linear_backward(grad, x, like, [False, True, False])[1]
    return torch.ops.aten.mkldnn_linear_backward_weights(grad.to_mkldnn(), x.to_mkldnn(), like, False)[0]


def _register() -> None:
    # Operators, so that whoever watches operators sees one with its sizes, also of tensors without memory, and not the
    # packed factors inside, which have no storage to tell (planner/operators.py).
    for schema, kernel, fake in (
        (
            "packed_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
            _packed_product,
            lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
        ),
        (
            "packed_weight_gradient(Tensor grad, Tensor x) -> Tensor",
            _packed_weight_gradient,
            lambda grad, x: grad.new_empty((grad.shape[1], x.shape[1])),
        ),
    ):
        name, library = schema.partition("(")[0], extension.define(schema)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"swin_moe::{name}", fake, lib=library)


_register()
extension.add_fake(
    "patch_projection_backward",
    lambda grad, image, weight, needs: (
        weight.new_empty(weight.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape[:1] if needs[1] else (0,)),
    ),
)


@cache
def faster_products() -> str | None:
    """Returns why oneDNN computes float32 products faster than MKL on this machine, one clause, or None."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):  # not part of PyTorch's public interface
        LOGGER.warning(
            "oneDNN's products are not used: this torch (%s) has no %s", torch.__version__, " or ".join(names)
        )
        return None
    vendor = cpu_field("vendor_id")
    return None if vendor in ("", "GenuineIntel") else f"MKL uses AVX2 on a processor of {vendor} that has AVX-512"


def serves(x: Tensor, weight: Tensor) -> bool:
    """Returns whether oneDNN computes the products of x (..., I) and a weight, (O, I) or (I, O), and faster."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():  # before anything that would fix the batch of a traced graph
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    if rows < SMALLEST_ROWS or rows * weight.numel() < SMALLEST_MACS:
        return False
    if faster_products() is None:
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled or weight.device.type != "cpu":
        return False
    return is_ordinary(x) and is_ordinary(weight)


def serves_few(x: Tensor, weight: Tensor) -> bool:
    """Returns whether the kernels for few rows compute the product of x (..., I) and a weight (O, I), and faster."""
    # In this order: what is asked of rows would fix the batch of a traced graph.
    return _by_rows(x, weight) and row_products.is_few(x.numel() // max(x.shape[-1], 1), x.dtype)


def _by_rows(x: Tensor, weight: Tensor) -> bool:
    """Returns whether the kernels for few rows can compute the product of x (..., I) and a weight (O, I)."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not row_products.takes(x, weight):
        return False
    return x.dtype == weight.dtype and is_ordinary(x) and is_ordinary(weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return packed_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = packed_product(grad, weight.t())
        flat = grad.view(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(flat, x.view(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(dim=0)
        return grad_x, grad_weight, grad_bias


class _PatchProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(image, weight)
        return F.conv2d(image, weight, bias, stride=weight.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, weight = ctx.saved_tensors
        needs_image, needs_weight, needs_bias = ctx.needs_input_grad
        grad_image = None
        if needs_image:
            patch, mask = list(weight.shape[2:]), [True, False, False]
            arguments = grad, image, weight, None, patch, [0, 0], [1, 1], False, [0, 0], 1, mask
            grad_image = torch.ops.aten.convolution_backward(*arguments)[0]
        needs = [needs_weight, needs_bias]
        found = torch.ops.swin_moe.patch_projection_backward(grad, image, weight, needs)
        return grad_image, *(g if needed else None for g, needed in zip(found, needs))
