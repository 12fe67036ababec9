"""Experts on other ranks: rows travel to them and back by all-to-all; experts cut over ranks are put together before
use.

Shape legend: N rows sent, M rows received, D channels, E experts of the layer, R ranks of the expert group.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from swin_moe.layout import even_split
from swin_moe.moe.dispatch import (
    Dispatched,
    Dispatcher,
    LocalDispatcher,
    combine_tokens,
    make_plan,
    permute_rows,
    take_tokens,
)
from swin_moe.moe.router import Routing
from swin_moe.parallel.groups import Groups

# Renamed in torch 2.13; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def exchange_rows(x: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    """Returns (M, ...), the rows the ranks of the group sent here, in rank order. No gradient.

    send, receive: Rows to and from each rank. Contiguous first: an output made like a transposed input would scramble
    rows.
    """
    output = torch.empty((sum(receive), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_to_all_single(output, x.contiguous(), receive, send, group=group)
    return output


class _AllToAll(torch.autograd.Function):
    """Backward sends every gradient row back to where its row came from, in the same group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return exchange_rows(x, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return exchange_rows(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    """Returns what exchange_rows does, with a gradient. Every rank has to run forward and backward, also with 0 rows.
    """
    return _AllToAll.apply(x, send, receive, group)


@dataclass(frozen=True)
class Exchange:
    """How rows travelled."""

    send: list[int]  # rows to each rank
    receive: list[int]  # rows from each rank
    order: Tensor | None  # (M,) turns rows by source into rows by expert; None = they are already
    inverse: Tensor | None


def local(groups: Groups, num_experts: int) -> Dispatcher:
    """Returns the dispatcher that needs every expert here.

    Raises:
        ValueError: Experts are on other ranks.
    """
    if groups.expert_size > 1:
        raise ValueError(
            f"model.moe.backend=local needs every expert on every rank, but parallel.expert={groups.degrees.expert} x "
            f"parallel.expert_shard={groups.degrees.expert_shard} ranks share {num_experts}; set both to 1, or "
            "model.moe.backend=native"
        )
    return LocalDispatcher()


def native(groups: Groups, num_experts: int) -> Dispatcher:
    """Returns the dispatcher that sends exactly the rows there are; nothing is sent where all experts are here."""
    return AllToAllDispatcher(groups, num_experts) if groups.expert_size > 1 else LocalDispatcher()


class AllToAllDispatcher:
    """Dispatcher over the expert group (see moe/dispatch.py). Nothing is padded: counts travel first, then just the
    rows.

    An expert over several ranks: its rows from the group's rank i go to shard i % shards of the expert's owner.
    """

    def __init__(self, groups: Groups, num_experts: int) -> None:
        self.groups = groups
        shards, rank = groups.degrees.expert_shard, groups.expert_rank
        held = even_split(num_experts, groups.degrees.expert)
        self.num_local = held[rank // shards][1]
        # For each rank, the experts whose rows it gets from me, and those whose rows I get from it; possibly none.
        self.destinations = [
            range(first, first + count) if r % shards == rank % shards else range(0)
            for r, (first, count) in ((r, held[r // shards]) for r in range(groups.expert_size))
        ]
        self.sources = [self.num_local if r % shards == rank % shards else 0 for r in range(groups.expert_size)]

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See Dispatcher."""
        kept = routing.kept.sum(dim=0)
        # Experts are numbered in the order of ranks, so the counts for all destinations are the counts themselves.
        sizes = [len(experts) for experts in self.destinations]
        arriving = exchange_rows(kept, sizes, self.sources, self.groups.expert)
        numbers = torch.cat([kept, arriving]).tolist()  # the one wait for the device in a layer
        kept_list, arriving_list = numbers[: len(kept)], numbers[len(kept) :]
        plan = make_plan(routing, sum(kept_list))
        exchange, counts = self._exchange(kept_list, arriving_list, x.device)
        tokens = all_to_all(take_tokens(x, plan), exchange.send, exchange.receive, self.groups.expert)
        if pair is not None:
            pair = exchange_rows(pair.flatten()[plan.pair], exchange.send, exchange.receive, self.groups.expert)
        if exchange.order is not None:
            tokens = permute_rows(tokens, exchange.order, exchange.inverse)
            pair = None if pair is None else pair[exchange.order]
        return Dispatched(tokens, counts, pair, plan, exchange)

    def combine(self, y: Tensor, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See Dispatcher."""
        exchange: Exchange = dispatched.exchange
        if exchange.order is not None:
            y = permute_rows(y, exchange.inverse, exchange.order)
        y = all_to_all(y, exchange.receive, exchange.send, self.groups.expert)
        return combine_tokens(y, gate, dispatched.plan)

    def _exchange(self, kept: list[int], arriving: list[int], device: torch.device) -> tuple[Exchange, Tensor]:
        """Returns how rows travel, and the rows of each local expert."""
        send = [sum(kept[e] for e in experts) for experts in self.destinations]
        receive, start = [], 0
        for count in self.sources:
            receive.append(sum(arriving[start : start + count]))
            start += count
        if self.num_local <= 1:
            return Exchange(send, receive, None, None), torch.tensor([sum(receive)] * self.num_local, dtype=torch.int64)
        count_SE = torch.tensor(arriving).view(-1, self.num_local)  # S: ranks that send here
        counts = count_SE.sum(dim=0)
        order = _by_expert(count_SE).to(device, non_blocking=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=device)
        return Exchange(send, receive, order, inverse), counts


def _by_expert(count_SE: Tensor) -> Tensor:
    """Returns (M,) int64: rows listed by (source, expert), in the order (expert, source)."""
    first_SE = (count_SE.flatten().cumsum(0) - count_SE.flatten()).view_as(count_SE)
    count_ES, first_ES = count_SE.t().flatten(), first_SE.t().flatten()
    position_ES = count_ES.cumsum(0) - count_ES
    return torch.arange(int(count_ES.sum())) + (first_ES - position_ES).repeat_interleave(count_ES)


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
