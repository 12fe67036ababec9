"""Moves token rows to where their experts are and the results back.

A dispatcher has no parameters; parallelize() replaces the local one by one that crosses ranks. Every row movement is a
gather, forward and backward: no atomics, so results do not depend on the order of threads.

Shape legend: T tokens, D channels, k choices per token, E experts, G routing groups, N rows for experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.moe.routing import Routing
from swin_moe.ops.moe import moe_plan
from swin_moe.ops.moe.moe_permute import gate_gradient, permute, unpermute
from swin_moe.ops.transforms import apply


@dataclass(frozen=True)
class RowOrder:
    """The order of rows for experts: by expert, then routing group, then slot."""

    position: Tensor  # (T, k) int64, row of each pair; 0 where dropped
    keep: Tensor | None  # (T, k) bool; None = all
    pair: Tensor  # (N,) int64, token * k + choice of each row; 0 where a row is vacant
    vacant: Tensor | None = None  # (N,) bool, padding between experts; None = none

    @property
    def top_k(self) -> int:
        """Choices per token, k."""
        return self.position.shape[1]

    @property
    def num_rows(self) -> int:
        """Rows for experts, N."""
        return self.pair.shape[0]


class Slices(Protocol):
    """Rows that travel in slices: one is computed while others are under way."""

    def receive(self, number: int, sent: Tensor) -> Tensor:
        """Returns (rows, D), a slice's rows for the local experts; sent: what stands for them until then."""
        ...

    def send(self, number: int, y: Tensor) -> Tensor:
        """Returns what stands for the experts' results y of a slice, on their way back."""
        ...

    def finish(self, sent: list[Tensor]) -> Tensor:
        """Returns (N, D), the experts' results of all slices, once they are back."""
        ...


@dataclass(frozen=True)
class Dispatched:
    """Rows for the local experts. Where they are still under way in slices, the first three are lists, per slice."""

    tokens: Tensor | list[Tensor]  # (rows, D), sorted by local expert; or what stands for a slice until it arrives
    counts: Tensor | int | list[Tensor]  # rows of each local expert, int64; one number where all have as many
    pair: Tensor | list[Tensor] | None  # (rows,) int64, global pair index of each row, if it was asked for
    order: Any  # RowOrder; None of a dispatcher that needs none: only the one that made it reads it
    exchange: Any = None  # what a dispatcher across ranks has to remember for the way back
    slices: Slices | None = None


class Dispatcher(Protocol):
    """Brings rows to experts and back. Every rank of a group calls both, also without tokens."""

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """Returns the rows for this rank's experts.

        Args:
            x: (T, D).
            pair: (T, k) int64 global index of every pair, to travel along; None = not needed (alike on all ranks).
        """
        ...

    def combine(self, y: Any, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """Returns (T, D), sum over choices of gate * y, of the experts' results y, ordered as `dispatched.tokens`.

        y: (rows, D); in slices, a list of what Slices.send returned.
        """
        ...


class LocalDispatcher:
    """All experts are here."""

    @property
    def in_one(self) -> bool:
        """Whether a layer may be one operator, which calls no dispatcher; one without this word says no."""
        return type(self) is LocalDispatcher  # another's dispatch may do more

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See Dispatcher."""
        unknown = x.is_cuda or torch.compiler.is_compiling()  # to ask would wait for the device, or break a graph
        order, counts = order_and_counts(routing, ask=not unknown)
        return Dispatched(take_tokens(x, order), counts, None if pair is None else pair.flatten()[order.pair], order)

    def combine(self, y: Tensor, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See Dispatcher."""
        return combine_tokens(y, gate, dispatched.order)


class PaddedDispatcher:
    """All experts are here, and each gets equally many rows, as many as it has slots: shapes do not depend on the data.

    With capacity by need the number of rows is what the fullest expert needs; then the host waits for the device.
    """

    def __init__(self, verbs: "Verbs | None" = None) -> None:
        self.verbs = verbs or VERBS

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See Dispatcher."""
        rows = padded_rows(routing)
        order = make_padded_order(routing, rows)
        return Dispatched(self.verbs.take(x, order), rows, None if pair is None else pair.flatten()[order.pair], order)

    def combine(self, y: Tensor, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See Dispatcher."""
        return self.verbs.combine(y, gate, dispatched.order)


def padded_rows(routing: Routing) -> int:
    """Returns how many rows hold what any expert gets from these tokens: by the slots, or by need without a limit."""
    num_tokens, num_groups = routing.expert.shape[0], routing.kept.shape[0]
    if routing.capacity is None:
        return int(routing.kept.sum(dim=0).max()) if num_tokens else 0
    return min(num_groups * routing.capacity, num_tokens)  # a token chooses an expert once


def make_order(routing: Routing, num_rows: int | None) -> RowOrder:
    """Returns the order of rows without padding. Slots already are positions within (group, expert), so nothing is
    sorted again.

    num_rows: routing.kept.sum(), if the host knows it; None = one row per pair, those left over at the end.
    """
    num_pairs = routing.expert.numel()
    all_kept = num_rows == num_pairs or routing.capacity is None
    num_rows = num_pairs if num_rows is None else num_rows
    if moe_plan.available(routing.expert):
        made = _order(routing, num_rows=num_rows)
        return RowOrder(made.position, None if all_kept else routing.keep, made.pair)
    kept_EG = routing.kept.t().reshape(-1)
    return _place(routing, kept_EG.cumsum(0) - kept_EG, num_rows, keep=None if all_kept else routing.keep)


def make_padded_order(routing: Routing, rows: int) -> RowOrder:
    """Returns the order of `rows` rows for every expert, the taken ones first."""
    if moe_plan.available(routing.expert):
        made = _order(routing, padded_rows=rows)
        return RowOrder(made.position, routing.keep, made.pair, made.vacant)
    kept_EG = routing.kept.t()
    num_experts = len(kept_EG)
    base_E = torch.arange(num_experts, device=kept_EG.device)[:, None] * rows
    order = _place(
        routing, (base_E + kept_EG.cumsum(dim=1) - kept_EG).reshape(-1), num_experts * rows, keep=routing.keep
    )
    vacant = torch.arange(rows, device=kept_EG.device) >= kept_EG.sum(dim=1, keepdim=True)
    return replace(order, vacant=vacant.flatten())


def order_and_counts(routing: Routing, *, ask: bool) -> tuple[RowOrder, Tensor]:
    """Returns (order without padding, (E,) rows of every expert); `ask`: the host may look how many rows there are."""
    if not moe_plan.available(routing.expert):
        counts = routing.kept.sum(dim=0)
        return make_order(routing, int(counts.sum()) if ask else None), counts
    num_pairs = routing.expert.numel()
    made = _order(routing, num_rows=None if ask else num_pairs)
    all_kept = routing.capacity is None or (ask and made.pair.shape[0] == num_pairs)
    return RowOrder(made.position, None if all_kept else routing.keep, made.pair), made.counts


def _order(routing: Routing, **size: Any) -> moe_plan.Order:
    columns = (routing.expert, routing.slot, routing.keep, routing.kept)
    return moe_plan.order_rows(*columns, group_size=routing.group_size, **size)


def _place(routing: Routing, first_EG: Tensor, num_rows: int, *, keep: Tensor | None) -> RowOrder:
    """Returns the order in which the pairs of an expert and a group start at row first_EG[expert * G + group]."""
    num_tokens, top_k = routing.expert.shape
    num_groups = routing.kept.shape[0]
    device = routing.expert.device
    if num_groups == 1:
        bucket = routing.expert
    else:
        group_T = torch.arange(num_tokens, device=device).div_(routing.group_size, rounding_mode="floor")
        bucket = routing.expert * num_groups + group_T[:, None]
    position = first_EG[bucket] + routing.slot if num_tokens else routing.expert
    # Dropped pairs are written to one row too many, which is cut off: a mask as index would wait for the device.
    target = position if keep is None else torch.where(keep, position, num_rows)
    pair = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    pair.scatter_(0, target.flatten(), torch.arange(num_tokens * top_k, device=device))
    return RowOrder(position if keep is None else position.masked_fill(~keep, 0), keep, pair[:num_rows])


class _TakeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: RowOrder) -> Tensor:
        ctx.save_for_backward(order.position, order.keep, order.pair, order.vacant)
        return permute(x, order.pair, order.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple:
        order = RowOrder(*ctx.saved_tensors)
        return unpermute(grad_rows, order.position, keep=order.keep), None


class _CombineTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, order: RowOrder) -> Tensor:
        ctx.save_for_backward(y, gate, order.position, order.keep, order.pair, order.vacant)
        return unpermute(y, order.position, keep=order.keep, gate=gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        y, gate, *rest = ctx.saved_tensors
        order = RowOrder(*rest)
        grad_y = grad_gate = None
        if ctx.needs_input_grad[0]:
            grad_y = permute(grad_out, order.pair, order.top_k, gate=gate, vacant=order.vacant, dtype=y.dtype)
        if ctx.needs_input_grad[1]:
            grad_gate = gate_gradient(y, grad_out, order.position, keep=order.keep)
        return grad_y, grad_gate, None


def take_tokens(x: Tensor, order: RowOrder) -> Tensor:
    """Returns (N, D), the token of each kept pair, in this order."""
    return apply(_TakeTokens, x, order)


def combine_tokens(y: Tensor, gate: Tensor, order: RowOrder) -> Tensor:
    """Returns (T, D), sum over kept choices of gate * y, in the wider dtype; zeros for a fully dropped token."""
    return apply(_CombineTokens, y, gate, order)


@dataclass(frozen=True)
class Verbs:
    """How rows are made of tokens and results are put together; others do what ours do."""

    take: Callable[[Tensor, RowOrder], Tensor]  # see take_tokens; a vacant row may hold anything finite
    combine: Callable[[Tensor, Tensor, RowOrder], Tensor]  # see combine_tokens; vacant rows get no gradient


VERBS = Verbs(take_tokens, combine_tokens)
