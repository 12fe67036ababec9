"""What rows look like while they travel: as they are, or rounded to fewer bytes. One encoded row per row, so that any
transport carries them.

Shape legend: N rows, D channels.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_SCALE_BYTES = 4


class Codec(Protocol):
    """Turns rows into what travels and back."""

    def applies(self, rows: Tensor) -> bool:
        """Returns whether encoding saves bytes on such rows; others travel as they are (ids, narrow types)."""
        ...

    def encode(self, rows: Tensor) -> Tensor:
        """Returns (N, W), what travels."""
        ...

    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns (N, D) in `dtype`."""
        ...


@dataclass(frozen=True)
class HalfRows:
    """bfloat16: relative rounding error of an element at most 2**-8."""

    def applies(self, rows: Tensor) -> bool:
        """See Codec."""
        return rows.is_floating_point() and rows.element_size() > 2

    def encode(self, rows: Tensor) -> Tensor:
        """See Codec."""
        return rows.to(torch.bfloat16)

    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        """See Codec."""
        return encoded.to(dtype)


@dataclass(frozen=True)
class ScaledRows:
    """A float8 type times one float32 scale per row, which stands behind the row: (N, D + 4) uint8.

    The scale maps the row's largest magnitude to the type's. A row that is not finite arrives as nan, so that overflow
    is still noticed.
    """

    dtype: torch.dtype

    def applies(self, rows: Tensor) -> bool:
        """See Codec."""
        if not rows.is_floating_point() or rows.dim() != 2:
            return False
        return rows.shape[1] * (rows.element_size() - 1) > _SCALE_BYTES

    def encode(self, rows: Tensor) -> Tensor:
        """See Codec."""
        largest = torch.finfo(self.dtype).max
        rows = rows.to(torch.float32)
        magnitude = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1)
        # A row of zeros, or of numbers too small for a scale, is divided by the smallest normal number instead of 0.
        scale = (magnitude / largest).clamp_(min=torch.finfo(torch.float32).tiny)
        scaled = (rows / scale[:, None]).clamp_(-largest, largest)  # the quotient may be rounded up past the largest
        behind = scale.view(torch.uint8).view(len(rows), _SCALE_BYTES)
        return torch.cat([scaled.to(self.dtype).view(torch.uint8), behind], dim=1)

    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        """See Codec."""
        # A copy in any case: a slice of one row is contiguous, but may not be aligned.
        scale = encoded[:, -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        values = encoded[:, :-_SCALE_BYTES].contiguous().view(self.dtype)
        return values.to(torch.float32).mul_(scale).to(dtype)


# How rows and their gradients travel, in the order of bytes; None = as they are. float8 gradients are e4m3 too: with a
# scale per row the range of e5m2 is not needed, and its error is twice as large (measured, docs/communication.md).
PAYLOADS: dict[str, Codec | None] = {"none": None, "bf16": HalfRows(), "fp8": ScaledRows(torch.float8_e4m3fn)}


def rounding_error(codec: Codec, rows: Tensor) -> Tensor:
    """Returns (2,) float32 on the rows' device: the sums of squares of the error a codec adds, and of the rows."""
    rows = rows.detach()
    error = codec.decode(codec.encode(rows), rows.dtype) - rows
    return torch.stack([error.float().square().sum(), rows.float().square().sum()])
