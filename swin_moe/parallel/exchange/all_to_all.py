"""Experts on other ranks: rows travel to them and back by all-to-all; experts cut over ranks are put together before
use.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.moe.dispatch import Dispatched, Dispatcher, LocalDispatcher, combine_tokens, make_order, take_tokens
from swin_moe.moe.routing import Routing
from swin_moe.parallel.exchange.link import Link
from swin_moe.parallel.exchange.overlap import dispatch_rows, order_by_slice, return_rows, rows_in_slice
from swin_moe.parallel.exchange.owners import Owners
from swin_moe.parallel.exchange.transport import ExchangePlan, exchange_rows
from swin_moe.parallel.groups import Groups

# Renamed in torch 2.13; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def local(groups: Groups, num_experts: int, link: Link | None) -> Dispatcher:
    """Returns the dispatcher that needs every expert here.

    Raises:
        ValueError: Experts are on other ranks.
    """
    if link is not None:
        raise ValueError(
            f"model.moe.backend=local needs every expert on every rank, but parallel.expert={groups.degrees.expert} x "
            f"parallel.expert_shard={groups.degrees.expert_shard} ranks share {num_experts}; set both to 1, or "
            "model.moe.backend=native"
        )
    return LocalDispatcher()


def native(groups: Groups, num_experts: int, link: Link | None) -> Dispatcher:
    """Returns the dispatcher that sends exactly the rows there are; nothing is sent where all experts are here."""
    return LocalDispatcher() if link is None else AllToAllDispatcher(groups, num_experts, link)


class AllToAllDispatcher:
    """Dispatcher over the expert group (see moe/dispatch.py). Nothing is padded: counts travel first, then just the
    rows.
    """

    def __init__(self, groups: Groups, num_experts: int, link: Link) -> None:
        self.groups, self.link = groups, link
        owners = Owners(groups.degrees, num_experts)
        self.num_local = owners.num_local(groups.expert_rank)
        self.destinations = owners.destinations(groups.expert_rank)
        self.num_sent = [len(experts) for experts in self.destinations]
        self.sources = owners.sources(groups.expert_rank)

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See Dispatcher."""
        kept, overlap = routing.kept.sum(dim=0), self.link.overlap
        # Experts are numbered in the order of ranks, so the counts for all destinations are the counts themselves.
        arriving = exchange_rows(kept, self.num_sent, self.sources, self.groups.expert)
        relayed = self._relayed(kept)
        numbers = torch.cat([kept, arriving, relayed.flatten()]).tolist()  # the one wait for the device in a layer
        kept_list, numbers = numbers[: len(kept)], numbers[len(kept) :]
        plans, counts = self._plans(kept_list, numbers, x.device)
        order = make_order(routing, sum(kept_list))
        if overlap > 1:
            order = order_by_slice(order, kept_list, overlap)
        return dispatch_rows(take_tokens(x, order), pair, order, counts, plans, self.link)

    def combine(self, y: Tensor | list[Tensor], dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See Dispatcher."""
        return combine_tokens(return_rows(y, dispatched, self.link), gate, dispatched.order)

    def _relayed(self, kept: Tensor) -> Tensor:
        """Returns what the transport has to know of others' rows, (X, C, R); see Transport.relayed."""
        slices = self.link.overlap
        if not self.link.transport.relayed_ranks:
            return kept.new_empty((0, slices, self.groups.expert_size))
        parts = [rows_in_slice(kept, number, slices).split(self.num_sent) for number in range(slices)]
        return self.link.transport.relayed(torch.stack([torch.stack([p.sum() for p in part]) for part in parts]))

    def _plans(
        self, kept: list[int], numbers: list[int], device: torch.device
    ) -> tuple[list[ExchangePlan], list[Tensor]]:
        """Returns per slice how rows travel, and the rows of each local expert.

        Args:
            kept: (E) rows of this rank for every expert.
            numbers: Rows that arrive for every local expert, from every rank that sends; then (X, C, R) relayed.
        """
        slices, ranks = self.link.overlap, self.groups.expert_size
        arriving, start = [], 0
        for count in self.sources:
            arriving.append(numbers[start : start + count] if count else [0] * self.num_local)
            start += count
        relayed = [numbers[i : i + ranks] for i in range(start, len(numbers), ranks)]
        plans, counts = [], []
        for number in range(slices):
            send = [sum(rows_in_slice(kept[e], number, slices) for e in experts) for experts in self.destinations]
            arriving_here = [[rows_in_slice(rows, number, slices) for rows in row] for row in arriving]
            plans.append(self.link.transport.plan(send, arriving_here, relayed[number::slices], device))
            counts.append(torch.tensor([sum(rows) for rows in zip(*arriving_here)], dtype=torch.int64))
        return plans, counts


class _GatherShards(torch.autograd.Function):
    """Forward puts the parts along dim 1 together; backward sums the ranks' gradients of the whole and keeps its own
    part.

    Each rank of the group used the whole expert on its own rows, so the sum is the gradient over all rows. Parts are
    padded to the first's length: collectives on tensors of unequal size do not exist on gloo.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, length: int, groups: Groups) -> Tensor:
        ctx.length, ctx.groups = length, groups
        shards = groups.degrees.expert_shard
        padded = -(-length // shards)
        ctx.part_shape = part.shape
        if part.shape[1] < padded:
            part = torch.cat([part, part.new_zeros((part.shape[0], padded - part.shape[1], *part.shape[2:]))], dim=1)
        gathered = part.new_empty((shards, *part.shape))
        _all_gather(gathered.view(-1), part.reshape(-1), group=groups.shard)
        return gathered.transpose(0, 1).flatten(1, 2)[:, :length].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        shards = ctx.groups.degrees.expert_shard
        padded = -(-ctx.length // shards)
        missing = padded * shards - ctx.length
        if missing:
            grad = torch.cat([grad, grad.new_zeros((grad.shape[0], missing, *grad.shape[2:]))], dim=1)
        grad = grad.unflatten(1, (shards, padded)).transpose(0, 1).contiguous()
        mine = torch.empty_like(grad[0])
        _reduce_scatter(mine.view(-1), grad.view(-1), group=ctx.groups.shard)
        return mine[:, : ctx.part_shape[1]], None, None


class ShardGather:
    """Makes whole experts of the parts in the shard group; GroupedExperts calls it on every parameter."""

    def __init__(self, groups: Groups, lengths: dict[str, int]) -> None:
        self.groups, self.lengths = groups, lengths  # lengths: parameter name -> global size of dim 1

    def __call__(self, part: Tensor, name: str) -> Tensor:
        """Returns the parameter with dim 1 whole."""
        return _GatherShards.apply(part, self.lengths[name], self.groups)
