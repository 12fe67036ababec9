"""The order of rows for experts, from a routing, as one operator.

Compiled kernels are in csrc/moe/moe_plan.cpp and csrc/cuda/moe/moe_plan.cu; swin_moe/moe/dispatch.py has the reference,
which runs where there are none.

Shape legend: T tokens, E experts, k choices per token, G routing groups, N rows for experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from swin_moe.ops import extension

COMPILED = extension.compiled_for("moe_plan")


class Order(NamedTuple):
    """Rows by expert, then routing group, then slot."""

    position: Tensor  # (T, k) int64, row of each pair; 0 where dropped
    pair: Tensor  # (N,) int64, token * k + choice of each row; 0 where a row is vacant
    vacant: Tensor  # (N,) bool; (0,) without padding
    counts: Tensor  # (E,) int64, kept summed over groups


def available(expert: Tensor) -> bool:
    """Returns whether the operator takes routings of this device.

    An exported program must run without this library, so it holds the reference's operators.
    """
    if torch.compiler.is_compiling() and torch.compiler.is_exporting():
        return False
    return expert.device.type in COMPILED


def order_rows(
    expert: Tensor,
    slot: Tensor,
    keep: Tensor,
    kept: Tensor,
    *,
    group_size: int,
    num_rows: int | None = None,
    padded_rows: int | None = None,
) -> Order:
    """Returns the order of the kept pairs of a routing, expert (T, k), slot (T, k), keep (T, k), kept (G, E).

    Args:
        num_rows: N, at least as many as are kept, those left over at the end; None = as many as are kept, which waits
            for a device.
        padded_rows: Rows of every expert, the taken ones first: N = E * padded_rows; None = without padding.

    Raises:
        ValueError: Shapes that do not fit. TypeError: another dtype. IndexError: more are kept than rows (CPU).
    """
    numbers = [-1 if value is None else value for value in (num_rows, padded_rows)]
    return Order(*torch.ops.swin_moe.moe_plan(expert, slot, keep, kept, group_size, *numbers))


def _fake_plan(
    expert: Tensor, slot: Tensor, keep: Tensor, kept: Tensor, group_size: int, num_rows: int, padded_rows: int
) -> tuple[Tensor, ...]:
    experts = kept.shape[1]
    padded = isinstance(padded_rows, torch.SymInt) or padded_rows >= 0
    rows: int | torch.SymInt
    if padded:
        rows = experts * padded_rows
    elif isinstance(num_rows, torch.SymInt) or num_rows >= 0:
        rows = num_rows
    else:
        rows = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty_like(expert),
        expert.new_empty((rows,)),
        keep.new_empty((rows if padded else 0,)),
        kept.new_empty((experts,)),
    )


extension.add_fake("moe_plan", _fake_plan)
