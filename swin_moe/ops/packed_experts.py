"""A layer of experts that tokens choose, for inference on the CPU, as one operator (csrc/products/packed_experts.cpp).

Norm, router, scores, choices, slots, rows to their experts, both products, and the sum of a token's experts with what
stands around it: what is saved is what twenty operators cost between products that take as long. The weights are packed
as those of ops/packed_layers.py. No gradients.

Shape legend: T tokens, D channels, H hidden channels, E experts, P channels of a cosine router.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from swin_moe.ops import extension
from swin_moe.ops.moe.moe_layer import Options, Slots
from swin_moe.ops.packed_layers import PackedLinear, PackedNorm, numbers_of, refusal


class PackedRouter(NamedTuple):
    """A router as the operator reads it: logits are a product, of the tokens or of their points of length 1."""

    matrix: PackedLinear  # (E, D) or (E, P) in the dtype of sums
    projector: PackedLinear | None  # (P, D) in the dtype of sums; None = the tokens themselves
    balance: Tensor | None  # (E,) in the dtype of sums, added to scores where experts are chosen; None = 0


def available() -> bool:
    """Returns whether the operator is there."""
    return not refusal() and extension.EXTENSION.loaded and hasattr(torch.ops.swin_moe, "packed_experts")


def packed_experts(
    x: Tensor,
    router: PackedRouter,
    first: PackedLinear,
    second: PackedLinear,
    slots: Slots,
    options: Options,
    *,
    norm: PackedNorm | None = None,
    after: PackedNorm | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """Returns x + after(inner + the sum of gate * second(gelu(first(norm(x)))) over each token's experts), (..., D).

    A token whose experts have no slot for it gets inner alone. The same bits for every number of threads.

    Args:
        x: (..., D) in the dtype of sums, T tokens in their order.
        first, second: Of E experts, (H, D) and (D, H).
        options: Whether scores are sigmoids, and whether the gates of a token sum to 1; evaluation has no noise.
        norm: Of the tokens that router and experts get; None = as they are. after: Of the sum. Not both.
        inner: (..., D) in the dtype of sums, what else the layer gives; None = nothing.

    Raises:
        ValueError: Shapes or dtypes that do not fit.
    """
    (norms, eps), projector = numbers_of(norm, after), router.projector
    sizes = [first.inputs, first.outputs, router.matrix.outputs, 0 if projector is None else projector.outputs]
    return torch.ops.swin_moe.packed_experts(
        x,
        first.data,
        first.bias,
        second.data,
        second.bias,
        router.matrix.data,
        None if projector is None else projector.data,
        None if projector is None else projector.bias,
        router.balance,
        *norms,
        inner,
        sizes,
        eps,
        *slots.numbers(),
        options.sigmoid,
        options.normalize,
        first.dtype,
    )
