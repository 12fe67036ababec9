"""Tutel's encode and decode (microsoft/Tutel, tutel/impls/fast_dispatch.py) behind our dispatcher.

Tutel moves rows between tokens and the experts' padded rows; all else is ours, because there it goes wrong: routing and
capacity (its capacity by need drops tokens when confident tokens come first), the exchange between ranks (the backward
of its all-to-all leaves a sub-group), weights and their loading (it fills missing ones with zeros and reinterprets
transposed ones), initialization (its system module makes a failed process exit with 0).

Shape legend: T tokens, D channels, k choices per token, E experts, C rows of one expert.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swin_moe.moe.dispatch import VERBS, Dispatcher, RowOrder, Verbs
from swin_moe.parallel.exchange.link import Link
from swin_moe.parallel.exchange.padded import pad_with
from swin_moe.parallel.groups import Groups

# Read by Tutel when it is imported or a layer is built; each changes what its code computes.
CHANGES_NUMERICS = ("BATCH_PRIO", "CAP_FACTOR", "FAST_CUMSUM", "SKIP_A2A", "SKIP_EXPERT", "SKIP_MOE")
_URL = "git+https://github.com/microsoft/tutel@main"


def tutel(groups: Groups, num_experts: int, link: Link | None) -> Dispatcher:
    """Returns the dispatcher that pads rows by Tutel's kernels.

    Raises:
        ValueError: Tutel cannot be imported, or an environment variable would change what it computes.
    """
    present = [name for name in CHANGES_NUMERICS if name in os.environ]
    if present:
        raise ValueError(
            f"model.moe.backend=tutel: Tutel computes something else where {', '.join(present)} is set in the "
            "environment; unset it, or choose model.moe.backend=native"
        )
    encode, decode = _import()
    return pad_with(tutel_verbs(encode, decode, num_experts), groups, num_experts, link)


def _import() -> tuple[Callable, Callable]:
    try:
        from tutel.moe import fast_decode, fast_encode
    except ImportError as error:  # also of its compiled part: "cannot import name 'tutel_custom_kernel'"
        raise ValueError(
            f"model.moe.backend=tutel needs Tutel, which cannot be imported ({error}); it is not on the package index: "
            f"pip install --no-build-isolation 'swin-moe[tutel]' or {_URL}, with NO_CUDA=1 before it where the machine "
            "has no CUDA toolkit, NO_NCCL=1 where nccl.h is missing"
        ) from error
    return fast_encode, fast_decode


def tutel_verbs(encode: Callable, decode: Callable, num_experts: int) -> Verbs:
    """Returns the verbs made of Tutel's fast_encode and fast_decode."""

    def take(x: Tensor, order: RowOrder) -> Tensor:
        _refuse_double(x)
        if _is_empty(order):
            return VERBS.take(x, order)
        rows = encode(x.float().contiguous(), _critical(order, num_experts, []))
        return rows.flatten(0, 1).to(x.dtype)

    def combine(y: Tensor, gate: Tensor, order: RowOrder) -> Tensor:
        if _is_empty(order):
            return VERBS.combine(y, gate, order)
        gates = [part.contiguous() for part in gate.float().unbind(dim=1)]
        rows = y.float().contiguous().view(num_experts, -1, y.shape[1])
        return decode(rows, _critical(order, num_experts, gates))

    return Verbs(take, combine)


def _is_empty(order: RowOrder) -> bool:
    """Returns whether there are no tokens or no rows; Tutel fails on either."""
    return order.position.shape[0] == 0 or order.num_rows == 0


def _critical(order: RowOrder, num_experts: int, gates: list[Tensor]) -> tuple[Any, ...]:
    """Returns what Tutel calls critical data: (E, experts, locations, gates, C, loads), a list per choice.

    Row e * C + l is location l of expert e; what is dropped gets location C, beyond the last one. The loads are for
    routing, which is not Tutel's.
    """
    capacity = order.num_rows // num_experts
    expert = order.position.div(capacity, rounding_mode="floor")
    location = order.position - expert * capacity
    if order.keep is not None:
        location = location.masked_fill(~order.keep, capacity)
    columns = ([part.to(torch.int32) for part in pairs.unbind(dim=1)] for pairs in (expert, location))
    return num_experts, *columns, gates, capacity, None


def _refuse_double(x: Tensor) -> None:
    """Tutel's buffers are float32 or float16; we give it float32, which holds every bfloat16 and float16."""
    if x.dtype == torch.float64:
        raise ValueError(
            "model.moe.backend=tutel computes in float32 and would round float64; choose model.moe.backend=native or "
            "padded, or lower precision"
        )
