"""Moves token rows to where their experts are and the results back.

A dispatcher has no parameters; parallelize() replaces the local one by one that crosses ranks. Every row movement is a
gather, forward and backward: no atomics, so results do not depend on the order of threads.

Shape legend: T tokens, D channels, k choices per token, E experts, G routing groups, N kept (token, choice) pairs.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.moe.router import Routing


@dataclass(frozen=True)
class Plan:
    """The order of the kept pairs: by expert, then routing group, then slot."""

    position: Tensor  # (T, k) int64, row of each pair; 0 where dropped
    keep: Tensor | None  # (T, k) bool; None = all
    pair: Tensor  # (N,) int64, token * k + choice of each row

    @property
    def top_k(self) -> int:
        """Choices per token, k."""
        return self.position.shape[1]

    @property
    def num_rows(self) -> int:
        """Kept pairs, N."""
        return self.pair.shape[0]


@dataclass(frozen=True)
class Dispatched:
    """Rows for the local experts."""

    tokens: Tensor  # (rows, D), sorted by local expert
    counts: list[int]  # rows of each local expert
    pair: Tensor | None  # (rows,) int64, global pair index of each row, if it was asked for
    plan: Plan
    exchange: Any = None  # what a dispatcher across ranks has to remember for the way back


class Dispatcher(Protocol):
    """Brings rows to experts and back. Every rank of a group calls both, also without tokens."""

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """Returns the rows for this rank's experts.

        Args:
            x: (T, D).
            pair: (T, k) int64 global index of every pair, to travel along; None = not needed (alike on all ranks).
        """
        ...

    def combine(self, y: Tensor, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """Returns (T, D), sum over choices of gate * y, of the experts' results y, ordered as `dispatched.tokens`."""
        ...


class LocalDispatcher:
    """All experts are here."""

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See Dispatcher."""
        counts = routing.kept.sum(dim=0).tolist()  # the one wait for the device in a layer
        plan = make_plan(routing, sum(counts))
        return Dispatched(take_tokens(x, plan), counts, None if pair is None else pair.flatten()[plan.pair], plan)

    def combine(self, y: Tensor, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See Dispatcher."""
        return combine_tokens(y, gate, dispatched.plan)


def make_plan(routing: Routing, num_rows: int) -> Plan:
    """Returns the order of rows. Slots already are positions within (group, expert), so nothing is sorted again.

    num_rows: routing.kept.sum(), known to the caller on the host.
    """
    num_tokens, top_k = routing.expert.shape
    num_groups, num_experts = routing.kept.shape
    device = routing.expert.device
    kept_EG = routing.kept.t().reshape(-1)
    first_EG = kept_EG.cumsum(0) - kept_EG
    if num_groups == 1:
        bucket = routing.expert
    else:
        group_T = torch.arange(num_tokens, device=device).div_(routing.group_size, rounding_mode="floor")
        bucket = routing.expert * num_groups + group_T[:, None]
    position = first_EG[bucket] + routing.slot if num_tokens else routing.expert
    keep = None if num_rows == num_tokens * top_k else routing.keep
    # Dropped pairs are written to one row too many, which is cut off: a mask as index would wait for the device.
    target = position if keep is None else torch.where(keep, position, num_rows)
    pair = torch.empty(num_rows + 1, dtype=torch.int64, device=device)
    pair.scatter_(0, target.flatten(), torch.arange(num_tokens * top_k, device=device))
    return Plan(position if keep is None else position.masked_fill(~keep, 0), keep, pair[:num_rows])


def _gather_choice(rows: Tensor, plan: Plan, choice: int) -> Tensor:
    """Returns (T, D), for each token the row of its choice, zeros where dropped."""
    if rows.shape[0] == 0:
        return rows.new_zeros((plan.position.shape[0], rows.shape[1]))
    taken = rows.index_select(0, plan.position[:, choice])
    # Not a product with the mask: row 0 stands in for dropped pairs and may hold inf or nan.
    return taken if plan.keep is None else taken.masked_fill_(~plan.keep[:, choice, None], 0)


class _TakeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(plan.position, plan.keep, plan.pair)
        return x.index_select(0, plan.pair.div(plan.top_k, rounding_mode="floor"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple:
        plan = Plan(*ctx.saved_tensors)
        grad_x = _gather_choice(grad_rows, plan, 0)
        for choice in range(1, plan.top_k):
            grad_x += _gather_choice(grad_rows, plan, choice)
        return grad_x, None


class _CombineTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(y, gate, plan.position, plan.keep, plan.pair)
        out = _gather_choice(y, plan, 0) * gate[:, :1]
        for choice in range(1, plan.top_k):
            out.addcmul_(_gather_choice(y, plan, choice).to(out.dtype), gate[:, choice, None])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        y, gate, *rest = ctx.saved_tensors
        plan = Plan(*rest)
        grad_y = grad_gate = None
        if ctx.needs_input_grad[0]:
            token = plan.pair.div(plan.top_k, rounding_mode="floor")
            gate_N = gate.flatten().index_select(0, plan.pair)
            grad_y = grad_out.index_select(0, token).mul_(gate_N[:, None]).to(y.dtype)
        if ctx.needs_input_grad[1]:
            choices = range(plan.top_k)
            grad_gate = torch.stack([(_gather_choice(y, plan, c) * grad_out).sum(dim=1) for c in choices], dim=1)
        return grad_y, grad_gate, None


def take_tokens(x: Tensor, plan: Plan) -> Tensor:
    """Returns (N, D), the token of each kept pair, in the plan's order."""
    return _TakeTokens.apply(x, plan)


def combine_tokens(y: Tensor, gate: Tensor, plan: Plan) -> Tensor:
    """Returns (T, D), sum over kept choices of gate * y, in the wider dtype; zeros for a fully dropped token."""
    return _CombineTokens.apply(y, gate, plan)


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad.index_select(0, ctx.inverse), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Returns x[order], where inverse is the inverse permutation of order."""
    return _PermuteRows.apply(x, order, inverse)
