"""Routing groups that span ranks: what the ranks of a group tell each other, and the slots that follow from it.

Every rank orders its own tokens as if they were the whole group; what it lacks is how many tokens of other ranks come
before each of its own. In token order counts say that; by confidence it takes the scores of the whole group.

Shape legend: T tokens of this rank, E experts, k choices per token, R ranks of the routing group.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from swin_moe.moe.routing import Routing, assign_slots, route


class GroupExchange(Protocol):
    """The ranks whose micro-batches form one routing group, in global sample order. All of them make every call."""

    rank: int  # this rank's place in the group
    size: int  # R

    def gather(self, value: Tensor) -> Tensor:
        """Returns (R, ...), the value of every rank, in rank order; shapes are equal. No gradient."""
        ...

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Returns (sum(counts), ...), the rows of all ranks in rank order; rank r has counts[r]. No gradient."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum over ranks, the same bits on each; its gradient is the sum of the ranks' gradients."""
        ...


@dataclass(frozen=True)
class GroupDemand:
    """How many tokens every rank of a routing group holds, and how many of them chose each expert."""

    tokens: list[int]  # per rank
    count_RkE: Tensor  # int64, pairs of each rank by choice and expert

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole group, N."""
        return sum(self.tokens)


def gather_demand(expert: Tensor, num_experts: int, exchange: GroupExchange) -> GroupDemand:
    """Returns the demand of the group of which this rank's tokens chose `expert` (T, k). Waits for the device once."""
    num_tokens, top_k = expert.shape
    bucket = expert + torch.arange(top_k, device=expert.device) * num_experts
    table = torch.zeros(1 + top_k * num_experts, dtype=torch.int64, device=expert.device)
    table[0] = num_tokens
    table[1:].scatter_add_(0, bucket.flatten(), torch.ones_like(bucket).flatten())
    gathered = exchange.gather(table)
    return GroupDemand(gathered[:, 0].tolist(), gathered[:, 1:].view(-1, top_k, num_experts))


def slots_by_token(expert: Tensor, slot: Tensor, demand: GroupDemand, rank: int) -> Tensor:
    """Returns (T, k), the slots in the whole group in token order, from those among this rank's tokens alone.

    A pair's place is choice-major: after all earlier choices of the group, after the same choice of lower ranks, then
    as among this rank's own pairs.
    """
    count_RkE = demand.count_RkE
    whole_kE, own_kE = count_RkE.sum(dim=0), count_RkE[rank]
    before_kE = whole_kE.cumsum(dim=0) - whole_kE + count_RkE[:rank].sum(dim=0)
    offset_kE = before_kE - (own_kE.cumsum(dim=0) - own_kE)
    choice = torch.arange(expert.shape[1], device=expert.device)
    return slot + offset_kE[choice, expert]


def slots_by_confidence(
    expert: Tensor, confidence: Tensor, num_experts: int, demand: GroupDemand, exchange: GroupExchange
) -> Tensor:
    """Returns (T, k), the slots in the whole group where confident tokens come first, ties in global token order."""
    # Expert numbers are exact in every dtype that scores have, so one collective carries both.
    rows = torch.cat([confidence[:, None], expert.to(confidence.dtype)], dim=1)
    rows = exchange.gather_rows(rows, demand.tokens)
    if not len(rows):
        return expert
    slot, _ = assign_slots(rows[:, 1:].long(), num_experts, len(rows), rows[:, 0].contiguous())
    start = sum(demand.tokens[: exchange.rank])
    return slot[start : start + len(expert)]


def route_across(
    logits: Tensor,
    exchange: GroupExchange,
    *,
    top_k: int,
    capacity: Callable[[int], int | None],
    batch_prioritized: bool,
    normalize_gate: bool,
    scores: Tensor,
    **choice: Any,
) -> tuple[Routing, GroupDemand]:
    """Returns (routing of this rank's tokens, demand of the group); drops what one process with all tokens would drop.

    `slot` counts this rank's own pairs only: the kept ones of an expert are the first of them, because both orders
    agree, and so they are where a dispatcher expects them.

    Args:
        capacity: Tokens of the group -> slots per expert; None = by need.
        logits, top_k, batch_prioritized, normalize_gate, scores, choice: See route.
    """
    own = route(
        logits,
        top_k=top_k,
        capacity=None,
        batch_prioritized=batch_prioritized,
        normalize_gate=normalize_gate,
        scores=scores,
        **choice,
    )
    num_experts = logits.shape[1]
    demand = gather_demand(own.expert, num_experts, exchange)
    limit = capacity(demand.num_tokens)
    if limit is None:
        return own, demand
    with torch.no_grad():
        if batch_prioritized:
            confidence = scores.gather(1, own.expert[:, :1]).squeeze(1)
            slot = slots_by_confidence(own.expert, confidence, num_experts, demand, exchange)
        else:
            slot = slots_by_token(own.expert, own.slot, demand, exchange.rank)
        keep = slot < limit
        kept = torch.zeros_like(own.demand)
        if len(kept):
            kept[0].scatter_add_(0, own.expert.flatten(), keep.flatten().long())
    return replace(own, keep=keep, kept=kept, capacity=limit), demand
