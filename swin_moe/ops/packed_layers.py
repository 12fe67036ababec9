"""Linear layers for inference on the CPU: weights packed once, and all that stands around a product done with it.

One call of the operator (csrc/products/packed_layers.cpp) takes rows, normalizes them, multiplies them by one packed
matrix, or by two with exact GELU between, normalizes the result and adds the residual: block of rows by block, in the
cache. The packing depends on the processor's instruction set, so a packed tensor is never saved. No gradients.

A layer in int8 (Jacob et al., arXiv:1712.05877, equation 7) rounds each output's weights to [-127, 127] times a scale,
and each row to least + scale * [0, 255] as it is read; between two matrices, each row's groups of 384 hidden channels.
Its sums are whole numbers, the same on every processor.

Shape legend: E experts (1 of a plain layer), I inputs, H hidden channels, O outputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from swin_moe.ops import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT8_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of rows and results of layers in int8
_OPERATORS = ("pack_matrices", "pack_int8_matrices", "pack_vectors", "packed_layers")


class Patches(NamedTuple):
    """How an image (B, channels, height, width) is cut into rows of pixels; what reaches beyond it is zero."""

    height: int
    width: int
    rows: int  # of patches
    columns: int


@dataclass(frozen=True)
class PackedLinear:
    """E matrices (O, I) with their biases, as the operator reads them."""

    data: Tensor  # (E, bytes) uint8, or int8 of layers in int8
    bias: Tensor | None  # (E, O in whole vectors) in the dtype of sums
    inputs: int
    outputs: int
    dtype: torch.dtype  # of the factors; of layers in int8, that of rows and results which is not that of sums

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, int8: bool = False) -> "PackedLinear":
        """Returns weights (O, I) or (E, O, I) and biases (O,) or (E, O), packed in a dtype, or in int8."""
        weights = weight.detach().to(torch.float32 if int8 else dtype)
        weights = weights[None] if weights.ndim == 2 else weights
        biases = None
        if bias is not None:
            biases = torch.ops.swin_moe.pack_vectors(bias.detach().reshape(len(weights), -1), dtype)
        data = (torch.ops.swin_moe.pack_int8_matrices if int8 else torch.ops.swin_moe.pack_matrices)(weights)
        return cls(data, biases, weights.shape[2], weights.shape[1], dtype)


class Packing(NamedTuple):
    """How the layers of a network are packed."""

    dtype: torch.dtype  # see PackedLinear
    int8: bool = False

    def linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Returns weights (O, I) or (E, O, I) and biases (O,) or (E, O), packed so."""
        return PackedLinear.of(weight, bias, self.dtype, int8=self.int8)


class PackedNorm(NamedTuple):
    """A LayerNorm as the operator reads it."""

    weight: Tensor  # (1, channels in whole vectors) in the dtype of sums
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm, dtype: torch.dtype) -> "PackedNorm":
        """Returns the norm's numbers for products in a dtype."""
        weight, bias = (torch.ops.swin_moe.pack_vectors(v.detach()[None], dtype) for v in (norm.weight, norm.bias))
        return cls(weight, bias, norm.eps)


def numbers_of(norm: PackedNorm | None, after: PackedNorm | None) -> tuple[tuple[Tensor | None, ...], float]:
    """Returns (weight and bias of the one norm and of the other, eps) as operators read them; not of both."""
    assert norm is None or after is None, "there is one eps"
    numbers = [(None, None) if one is None else (one.weight, one.bias) for one in (norm, after)]
    used = norm or after
    return (*numbers[0], *numbers[1]), 0.0 if used is None else used.eps


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that sums, norms and residuals have where factors have this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refusal() -> str:
    """Returns why layers cannot be packed, one clause; "" where they can."""
    if extension.EXTENSION.loaded and all(hasattr(torch.ops.swin_moe, name) for name in _OPERATORS):
        return ""
    return extension.why_not("cpu") or "the compiled kernels are older than packed layers"


def packed_layers(
    x: Tensor,
    first: PackedLinear,
    second: PackedLinear | None = None,
    *,
    norm: PackedNorm | None = None,
    after: PackedNorm | None = None,
    residual: Tensor | None = None,
    counts: Tensor | None = None,
    patches: Patches | None = None,
    merged: bool = False,
    wide: bool = True,
) -> Tensor:
    """Returns residual + after(second(gelu(first(norm(x))))), without what is None, (..., O).

    Args:
        x: (..., I) in the dtype of factors or of sums; merged: (B, height, width, I / 4), of which 2 x 2 neighbours are
            a row in the order of the official patch merging; with patches (B, channels, height, width).
        second: None = one product and no GELU.
        norm, after: Of the rows before the first product, and of the result; not both.
        residual: (..., O) in the dtype of sums.
        counts: (E,) int64, rows of each expert, which follow each other; None = one matrix.
        wide: The result has the dtype of sums; else that of the factors.
    """
    norms, eps = numbers_of(norm, after)
    sizes = [first.inputs, first.outputs] if second is None else [first.inputs, first.outputs, second.outputs]
    return torch.ops.swin_moe.packed_layers(
        x,
        first.data,
        first.bias,
        None if second is None else second.data,
        None if second is None else second.bias,
        *norms,
        residual,
        counts,
        sizes,
        eps,
        () if patches is None else patches,
        merged,
        first.dtype,
        wide,
    )
