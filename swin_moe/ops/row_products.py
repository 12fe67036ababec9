"""Products of few rows by kernels of our own: what a library's product costs beside its arithmetic is left out.

MKL and oneDNN check, choose, pack and hand out work for each product, which takes as long as the product itself where
an expert has some dozens of rows. The kernels (csrc/cpu/row_products.h, AVX-512 with bfloat16) take the matrices of all
experts in one call, read factors where they lie or pack them in the cache, convert float32 weights of a bfloat16
product on the way, and sum in one order: no result depends on the number of threads. The obvious form, and what runs
elsewhere, is F.linear and a product per expert (linear.py, grouped_linear.py).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops import extension
from swin_moe.ops.random_draws import NO_DRAW, UnitDraw
from swin_moe.ops.reused_memory import empty_like_reused

COMPILED = extension.compiled_for("row_linear", "grouped_rows", "expert_rows")
# One thread of a shared AMD Zen 5, 48 to 3072 channels, our kernels over the better of MKL and oneDNN, forward and both
# gradients: float32 1.1 to 1.3 from 16 to 512 rows, 1.0 at 2048; bfloat16 1.1 to 4 up to 196 rows, 1.0 to 1.1 at 512
# and 1024.
MOST_ROWS = 1024
_ELEMENTS = (torch.float32, torch.bfloat16)


@cache
def _has_kernels() -> bool:
    return "cpu" in COMPILED and extension.cpu_capability() == "avx512_bf16"


@cache
def _has_tiles() -> bool:
    """Returns whether the processor multiplies bfloat16 by AMX tiles, which are faster than these kernels."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return tiles is None or tiles()


def takes(x: Tensor, weight: Tensor) -> bool:
    """Returns whether the kernels compute products of x and a weight at all: by dtype, device and processor."""
    if x.device.type != "cpu" or weight.device.type != "cpu" or not _has_kernels():
        return False
    if x.dtype not in _ELEMENTS or weight.dtype not in _ELEMENTS:
        return False
    return x.dtype == torch.float32 or not _has_tiles()


def is_few(rows: int, products: int = 1) -> bool:
    """Returns whether so many rows, dealt out to so many products, are few enough for the kernels to be faster."""
    return 0 < rows <= MOST_ROWS * products


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns F.linear(x, weight, bias) of what the kernels take; first derivatives only.

    Args:
        x: (..., I), weight: (O, I) of any strides. bias: (O,). Each float32 or bfloat16.
    """
    return _RowLinear.apply(x, weight, bias)


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.ops.swin_moe.row_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad)
        grads = torch.ops.swin_moe.row_linear_backward(grad, *ctx.saved_tensors, needs)
        grad_x, grad_weight, grad_bias = (g if needed else None for g, needed in zip(grads, needs))
        return grad_x, grad_weight, grad_bias if grad_bias is None else grad_bias.to(ctx.bias_dtype)


def grouped_rows(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Returns (N, O), see grouped_linear: x (N, I), weight (E, I, O) of any strides, bias (E, O), counts (E,)."""
    return torch.ops.swin_moe.grouped_rows(x, weight, bias, counts)


def grouped_rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor, out: Sequence[Tensor | None]
) -> None:
    """Writes the gradients of x, weight and bias into `out`, those that are not None; grad is (N, O)."""
    torch.ops.swin_moe.grouped_rows_backward(grad, x, weight, counts, *out)


def expert_rows(
    tokens: Tensor,
    counts: Tensor,
    fc1: Tensor,
    bias1: Tensor,
    fc2: Tensor,
    bias2: Tensor,
    draw: UnitDraw | None,
) -> Tensor:
    """Returns (N, D), what each row's expert makes of it: two products, GELU and dropout as one operator.

    Rounds as grouped_linear, GELU and random_dropout one after the other. First derivatives only.

    Args:
        tokens: (N, D), rows sorted by expert. counts: (E,) int64, rows of each; what is left over gets zeros.
        fc1, fc2: (E, H, D), float32 or of the dtype of the tokens. bias1: (E, H). bias2: (E, D).
        draw: Which hidden units are dropped; None = none.
    """
    operands = NO_DRAW if draw is None else draw.operands()
    return _ExpertRows.apply(tokens, fc1, bias1, fc2, bias2, counts, *operands)


class _ExpertRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor, counts: Tensor, *draw: Any
    ) -> Tensor:
        y, product, hidden = torch.ops.swin_moe.expert_rows(x, fc1, bias1, fc2, bias2, counts, *draw)
        ctx.save_for_backward(x, product, hidden, fc1, fc2, counts, *draw[:2])
        ctx.draw = draw[2:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, product, hidden, fc1, fc2, counts, *draw = ctx.saved_tensors
        makers = (
            lambda: torch.empty_like(x),
            lambda: empty_like_reused(fc1),
            lambda: grad.new_empty(fc1.shape[:2]),
            lambda: empty_like_reused(fc2),
            lambda: grad.new_empty((fc2.shape[0], fc2.shape[2])),
        )
        found = [make() if needed else None for make, needed in zip(makers, ctx.needs_input_grad)]
        arguments = grad, x, product, hidden, fc1, fc2, counts, *draw, *ctx.draw
        torch.ops.swin_moe.expert_rows_backward(*arguments, *found)
        return *found, *[None] * 8


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    found = torch.empty_like(x), weight.new_empty(weight.shape), x.new_empty(weight.shape[:1])
    return tuple(g if needed else None for g, needed in zip(found, needs))


def _fake_grouped(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


def _fake_experts(
    x: Tensor, fc1: Tensor, bias1: Tensor | None, fc2: Tensor, bias2: Tensor | None, counts: Tensor, *draw: Any
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = x.new_empty((x.shape[0], fc1.shape[1]))
    return x.new_empty((x.shape[0], fc2.shape[2])), hidden, torch.empty_like(hidden)


extension.add_fake("expert_rows", _fake_experts)
extension.add_fake("expert_rows_backward", lambda *arguments: None)
extension.add_fake("row_linear", _fake_linear)
extension.add_fake("row_linear_backward", _fake_linear_backward)
extension.add_fake("grouped_rows", _fake_grouped)
extension.add_fake("grouped_rows_backward", lambda grad, x, weight, counts, grad_x, grad_weight, grad_bias: None)
