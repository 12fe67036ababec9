"""Products of few rows by kernels of our own: what a library's product costs beside its arithmetic is left out.

MKL and oneDNN check, choose, pack and hand out work for each product, which takes as long as the product itself where
an expert has some dozens of rows. The kernels (csrc/cpu/products/row_products.h; AVX-512 with bfloat16, or AVX2) take
the matrices of all experts in one call, read factors where they lie or pack them in the cache, convert float32 weights
of a bfloat16 product on the way, and sum in one order: no result depends on the number of threads. The obvious form,
and what runs elsewhere, is F.linear and a product per expert (linear.py, grouped_linear.py).
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops import extension
from swin_moe.ops.random_draws import NO_DRAW, UnitDraw
from swin_moe.ops.reused_memory import empty_like_reused

COMPILED = extension.compiled_for("row_linear", "grouped_rows", "expert_rows", "expert_layer")
# One thread of a shared AMD Zen 5, 48 to 3072 channels, our kernels over the better of MKL and oneDNN, forward and both
# gradients: float32 1.1 to 1.3 from 16 to 512 rows, 1.0 at 2048; bfloat16 1.1 to 4 up to 196 rows, 1.0 to 1.1 at 512
# and 1024.
MOST_ROWS = 1024
MOST_ROWS_AVX2 = 512
_ELEMENTS = (torch.float32, torch.bfloat16)


@cache
def _has_kernels() -> bool:
    if "cpu" not in COMPILED:
        return False
    if extension.cpu_capability() == "avx2":  # with AVX-512 MKL multiplies vectors twice as long
        return torch.backends.cpu.get_cpu_capability() == "AVX2"
    return extension.cpu_capability() == "avx512_bf16"


@cache
def _has_tiles() -> bool:
    """Returns whether the processor multiplies bfloat16 by AMX tiles, which are faster than these kernels."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return tiles is None or tiles()


def takes(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Returns whether the kernels compute products of x and a weight at all: by dtype, device and processor.

    dtype: To which x will be converted; None = as it is.
    """
    if x.device.type != "cpu" or weight.device.type != "cpu" or not _has_kernels():
        return False
    if x.dtype not in _ELEMENTS or weight.dtype not in _ELEMENTS:
        return False
    return (dtype or x.dtype) == torch.float32 or not _has_tiles()


@cache
def most_rows(dtype: torch.dtype, *, single: bool) -> float:
    """Returns up to how many rows of a product the kernels are faster, by dtype and processor.

    With AVX2 bfloat16 is multiplied in float32, 3 to 30 times as fast as by PyTorch, whatever the rows; in float32 MKL
    is as fast, and what the kernels save is a call for each expert.

    Args:
        single: One product by itself; else those of all experts in one call.
    """
    if extension.cpu_capability() != "avx2":
        return MOST_ROWS
    if dtype == torch.bfloat16:
        return math.inf
    return 0 if single else MOST_ROWS_AVX2


def is_few(rows: int, dtype: torch.dtype, products: int | None = None) -> bool:
    """Returns whether so many rows are few enough for the kernels to be faster.

    products: Experts to which they are dealt out, all in one call; None = one product by itself.
    """
    return 0 < rows <= most_rows(dtype, single=products is None) * (products or 1)


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


class LayerOrder(NamedTuple):
    """Which rows tokens are for their experts; see swin_moe/moe/dispatch.py:RowOrder."""

    position: Tensor  # (T, k) int64, row of each pair
    keep: Tensor | None  # (T, k) bool; None = all
    pair: Tensor  # (N,) int64, token * k + choice of each row
    counts: Tensor  # (E,) int64, rows of each expert; their sum is N


def expert_layer(
    x: Tensor,
    gate: Tensor,
    weights: Sequence[Tensor],
    order: LayerOrder,
    *,
    dtype: torch.dtype,
    draw: UnitDraw | None,
) -> Tensor:
    """Returns (T, D) of the dtype of x, the sum over kept choices of gate times what the expert makes of the token.

    Rounds as gather, expert_rows and the weighted sum one after the other do. First derivatives only.

    Args:
        x: (T, D), float32 or bfloat16. gate: (T, k) float32.
        weights: fc1 (E, H, D), bias1 (E, H), fc2 (E, H, D), bias2 (E, D), see expert_rows; biases of `dtype`.
        dtype: Of the rows and of products; float32 or bfloat16.
        draw: Which hidden units of the N rows are dropped; None = none.
    """
    operands = NO_DRAW if draw is None else draw.operands()
    return _ExpertLayer.apply(x, gate, *weights, dtype, *order, *operands)


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        fc1: Tensor,
        bias1: Tensor,
        fc2: Tensor,
        bias2: Tensor,
        dtype: torch.dtype,
        position: Tensor,
        keep: Tensor | None,
        pair: Tensor,
        counts: Tensor,
        *draw: Any,
    ) -> Tensor:
        order = position, keep, pair, counts
        verb = torch.ops.swin_moe.expert_layer
        y, *made = verb(x, gate, fc1, bias1, fc2, bias2, *order, dtype, *draw)
        ctx.save_for_backward(gate, *made, fc1, fc2, *order, *draw[:2])
        ctx.draw = draw[2:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        out, fc1, fc2 = saved[4:7]
        needs_x, needs_gate, *needs = ctx.needs_input_grad[:6]
        makers = (
            lambda: empty_like_reused(fc1),
            lambda: out.new_empty(fc1.shape[:2]),
            lambda: empty_like_reused(fc2),
            lambda: out.new_empty((fc2.shape[0], fc2.shape[2])),
        )
        found = [make() if needed else None for make, needed in zip(makers, needs)]
        grad_x, grad_gate = torch.ops.swin_moe.expert_layer_backward(
            grad, *saved, *ctx.draw, needs_x, needs_gate, *found
        )
        return grad_x if needs_x else None, grad_gate if needs_gate else None, *found, *[None] * 12


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


def _fake_layer(
    x: Tensor,
    gate: Tensor,
    fc1: Tensor,
    bias1: Tensor | None,
    fc2: Tensor,
    bias2: Tensor | None,
    position: Tensor,
    keep: Tensor | None,
    pair: Tensor,
    counts: Tensor,
    dtype: torch.dtype,
    *draw: Any,
) -> tuple[Tensor, ...]:
    rows = x.new_empty((pair.shape[0], x.shape[1]), dtype=dtype)
    hidden = rows.new_empty((pair.shape[0], fc1.shape[1]))
    return torch.empty_like(x), rows, hidden, torch.empty_like(hidden), torch.empty_like(rows)


def _fake_layer_backward(grad: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs_x, needs_gate = rest[-6:-4]
    return grad.new_empty(grad.shape if needs_x else (0,)), gate.new_empty(gate.shape if needs_gate else (0,))


extension.add_fake("expert_layer", _fake_layer)
extension.add_fake("expert_layer_backward", _fake_layer_backward)
extension.add_fake("expert_rows", _fake_experts)
extension.add_fake("expert_rows_backward", lambda *arguments: None)
extension.add_fake("row_linear", _fake_linear)
extension.add_fake("row_linear_backward", _fake_linear_backward)
extension.add_fake("grouped_rows", _fake_grouped)
extension.add_fake("grouped_rows_backward", lambda grad, x, weight, counts, grad_x, grad_weight, grad_bias: None)
