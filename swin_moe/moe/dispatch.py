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

from swin_moe.moe.router import Routing
from swin_moe.ops import moe_plan
from swin_moe.ops.moe_permute import gate_gradient, permute, unpermute
from swin_moe.ops.transforms import apply


@dataclass(frozen=True)
class Plan:
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


class Chunks(Protocol):
    """Rows that travel in chunks; where there are several, one is computed while others are under way."""

    def arrive(self, chunk: int, departed: Tensor) -> Tensor:
        """Returns (rows, D), the chunk's rows for the local experts; departed: what stands for them until then."""
        ...

    def depart(self, chunk: int, y: Tensor) -> Tensor:
        """Returns what stands for the experts' results y of this chunk, on their way home."""
        ...


@dataclass(frozen=True)
class Dispatched:
    """Rows for the local experts. Where they are still under way in chunks, the first three are lists, per chunk."""

    tokens: Tensor | list[Tensor]  # (rows, D), sorted by local expert; or what stands for a chunk until it arrives
    counts: Tensor | int | list[Tensor]  # rows of each local expert, int64; one number where all have as many
    pair: Tensor | list[Tensor] | None  # (rows,) int64, global pair index of each row, if it was asked for
    plan: Plan
    exchange: Any = None  # what a dispatcher across ranks has to remember for the way back
    chunks: Chunks | None = None


class Dispatcher(Protocol):
    """Brings rows to experts and back. Every rank of a group calls both, also without tokens."""

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """Returns the rows for this rank's experts.

        Args:
            x: (T, D).
            pair: (T, k) int64 global index of every pair, to travel along; None = not needed (alike on all ranks).
        """
        ...

    def combine(self, y: Tensor | list[Tensor], dispatched: Dispatched, gate: Tensor) -> Tensor:
        """Returns (T, D), sum over choices of gate * y, of the experts' results y, ordered as `dispatched.tokens`.

        In chunks, y is a list of what Chunks.depart returned.
        """
        ...


class LocalDispatcher:
    """All experts are here."""

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See Dispatcher."""
        unknown = x.is_cuda or torch.compiler.is_compiling()  # to ask would wait for the device, or break a graph
        plan, counts = _plan_and_counts(routing, ask=not unknown)
        return Dispatched(take_tokens(x, plan), counts, None if pair is None else pair.flatten()[plan.pair], plan)

    def combine(self, y: Tensor, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See Dispatcher."""
        return combine_tokens(y, gate, dispatched.plan)


class PaddedDispatcher:
    """All experts are here, and each gets equally many rows, as many as it has slots: shapes do not depend on the data.

    With capacity by need the number of rows is what the fullest expert needs; then the host waits for the device.
    """

    def __init__(self, verbs: "Verbs | None" = None) -> None:
        self.verbs = verbs or VERBS

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See Dispatcher."""
        rows = padded_rows(routing)
        plan = make_padded_plan(routing, rows)
        return Dispatched(self.verbs.take(x, plan), rows, None if pair is None else pair.flatten()[plan.pair], plan)

    def combine(self, y: Tensor, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See Dispatcher."""
        return self.verbs.combine(y, gate, dispatched.plan)


def padded_rows(routing: Routing) -> int:
    """Returns how many rows hold what any expert gets from these tokens: by the slots, or by need without a limit."""
    num_tokens, num_groups = routing.expert.shape[0], routing.kept.shape[0]
    if routing.capacity is None:
        return int(routing.kept.sum(dim=0).max()) if num_tokens else 0
    return min(num_groups * routing.capacity, num_tokens)  # a token chooses an expert once


def make_plan(routing: Routing, num_rows: int | None) -> Plan:
    """Returns the order of rows without padding. Slots already are positions within (group, expert), so nothing is
    sorted again.

    num_rows: routing.kept.sum(), if the host knows it; None = one row per pair, those left over at the end.
    """
    num_pairs = routing.expert.numel()
    all_kept = num_rows == num_pairs or routing.capacity is None
    num_rows = num_pairs if num_rows is None else num_rows
    if moe_plan.available(routing.expert):
        order = _order(routing, num_rows=num_rows)
        return Plan(order.position, None if all_kept else routing.keep, order.pair)
    kept_EG = routing.kept.t().reshape(-1)
    return _place(routing, kept_EG.cumsum(0) - kept_EG, num_rows, keep=None if all_kept else routing.keep)


def make_padded_plan(routing: Routing, rows: int) -> Plan:
    """Returns the order of `rows` rows for every expert, the taken ones first."""
    if moe_plan.available(routing.expert):
        order = _order(routing, padded_rows=rows)
        return Plan(order.position, routing.keep, order.pair, order.vacant)
    kept_EG = routing.kept.t()
    num_experts = len(kept_EG)
    base_E = torch.arange(num_experts, device=kept_EG.device)[:, None] * rows
    plan = _place(
        routing, (base_E + kept_EG.cumsum(dim=1) - kept_EG).reshape(-1), num_experts * rows, keep=routing.keep
    )
    vacant = torch.arange(rows, device=kept_EG.device) >= kept_EG.sum(dim=1, keepdim=True)
    return replace(plan, vacant=vacant.flatten())


def _plan_and_counts(routing: Routing, *, ask: bool) -> tuple[Plan, Tensor]:
    """Returns (plan without padding, (E,) rows of every expert); `ask`: the host may look how many rows there are."""
    if not moe_plan.available(routing.expert):
        counts = routing.kept.sum(dim=0)
        return make_plan(routing, int(counts.sum()) if ask else None), counts
    num_pairs = routing.expert.numel()
    order = _order(routing, num_rows=None if ask else num_pairs)
    all_kept = routing.capacity is None or (ask and order.pair.shape[0] == num_pairs)
    return Plan(order.position, None if all_kept else routing.keep, order.pair), order.counts


def _order(routing: Routing, **size: int | None) -> moe_plan.Order:
    columns = (routing.expert, routing.slot, routing.keep, routing.kept)
    return moe_plan.order_rows(*columns, group_size=routing.group_size, **size)


def _place(routing: Routing, first_EG: Tensor, num_rows: int, *, keep: Tensor | None) -> Plan:
    """Returns the plan in which the pairs of an expert and a group start at row first_EG[expert * G + group]."""
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
    return Plan(position if keep is None else position.masked_fill(~keep, 0), keep, pair[:num_rows])


class _TakeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(plan.position, plan.keep, plan.pair, plan.vacant)
        return permute(x, plan.pair, plan.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple:
        plan = Plan(*ctx.saved_tensors)
        return unpermute(grad_rows, plan.position, keep=plan.keep), None


class _CombineTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(y, gate, plan.position, plan.keep, plan.pair, plan.vacant)
        return unpermute(y, plan.position, keep=plan.keep, gate=gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        y, gate, *rest = ctx.saved_tensors
        plan = Plan(*rest)
        grad_y = grad_gate = None
        if ctx.needs_input_grad[0]:
            grad_y = permute(grad_out, plan.pair, plan.top_k, gate=gate, vacant=plan.vacant, dtype=y.dtype)
        if ctx.needs_input_grad[1]:
            grad_gate = gate_gradient(y, grad_out, plan.position, keep=plan.keep)
        return grad_y, grad_gate, None


def take_tokens(x: Tensor, plan: Plan) -> Tensor:
    """Returns (N, D), the token of each kept pair, in the plan's order."""
    return apply(_TakeTokens, x, plan)


def combine_tokens(y: Tensor, gate: Tensor, plan: Plan) -> Tensor:
    """Returns (T, D), sum over kept choices of gate * y, in the wider dtype; zeros for a fully dropped token."""
    return apply(_CombineTokens, y, gate, plan)


@dataclass(frozen=True)
class Verbs:
    """How rows are made of tokens and results are put together; others do what ours do."""

    take: Callable[[Tensor, Plan], Tensor]  # see take_tokens; a vacant row may hold anything finite
    combine: Callable[[Tensor, Tensor, Plan], Tensor]  # see combine_tokens; vacant rows get no gradient


VERBS = Verbs(take_tokens, combine_tokens)
