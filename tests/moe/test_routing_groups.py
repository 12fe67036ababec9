"""Routing groups over ranks, the ranks being threads here: random groups against the slow reference of one process.

Outputs and gradients over real ranks: tests/equivalence.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from swin_moe.moe import expert_capacity
from swin_moe.moe.routing import route
from swin_moe.moe.routing_groups import gather_demand, route_across, slots_by_confidence, slots_by_token
from tests.moe.reference import route_slowly


class ThreadExchange:
    """A rank of a group whose ranks are threads of this process."""

    def __init__(self, rank, shared):
        self.rank, self.size = rank, shared["size"]
        self._shared = shared

    def _all(self, value):
        self._shared[self.rank] = value
        self._shared["barrier"].wait()
        values = [self._shared[rank] for rank in range(self.size)]
        self._shared["barrier"].wait()
        return values

    def gather(self, value):
        return torch.stack(self._all(value))

    def gather_rows(self, rows, counts):
        rows = self._all(rows)
        assert [len(r) for r in rows] == counts
        return torch.cat(rows)

    def sum(self, value):
        return torch.stack(self._all(value)).sum(dim=0)


def on_ranks(function, parts):
    """Returns function(part, exchange) of every rank."""
    shared = {"size": len(parts), "barrier": threading.Barrier(len(parts), timeout=20)}
    with ThreadPoolExecutor(len(parts)) as pool:
        runs = [pool.submit(function, part, ThreadExchange(rank, shared)) for rank, part in enumerate(parts)]
        return [run.result(timeout=20) for run in runs]


def random_group(seed):
    """Returns (logits of the group, tokens of each rank, experts, k); small numbers of distinct scores make ties."""
    draw = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high + 1, (), generator=draw))  # noqa: E731
    experts = number(1, 6)
    tokens = [number(0, 7) for _ in range(number(2, 4))]
    logits = torch.randint(-2, 3, (sum(tokens), experts), generator=draw).double()
    if number(0, 1):
        logits += torch.randn(logits.shape, dtype=torch.float64, generator=draw)
    return logits, tokens, experts, number(1, min(experts, 3))


@pytest.mark.parametrize("by_confidence", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.25, 0.0, -0.5])
def test_random_groups_drop_what_one_process_drops(factor, by_confidence):
    for seed in range(40):
        logits, tokens, experts, k = random_group(seed)

        def run(part, exchange, k=k, experts=experts):
            scores = torch.softmax(part, dim=1)
            routing, demand = route_across(
                part,
                exchange,
                top_k=k,
                batch_prioritized=by_confidence,
                normalize_gate=False,
                scores=scores,
                capacity=lambda n: expert_capacity(n, experts, top_k=k, factor=factor),
            )
            confidence = scores.gather(1, routing.expert[:, :1]).squeeze(1)
            if by_confidence:
                slot = slots_by_confidence(routing.expert, confidence, experts, demand, exchange)
            else:
                slot = slots_by_token(routing.expert, routing.slot, demand, exchange.rank)
            return routing, slot

        ranks = on_ranks(run, logits.split(tokens))
        limit = expert_capacity(len(logits), experts, top_k=k, factor=factor)
        expert, slot, keep = route_slowly(logits, top_k=k, capacity=limit, batch_prioritized=by_confidence)
        assert [row for r, _ in ranks for row in r.expert.tolist()] == expert, seed
        assert [row for _, s in ranks for row in s.tolist()] == slot, seed
        assert [row for r, _ in ranks for row in r.keep.tolist()] == keep, seed
        for routing, _ in ranks:
            assert routing.capacity == limit
            assert routing.kept.sum() == routing.keep.sum()
            # What a dispatcher relies on: the kept pairs of an expert are the first of this rank's own.
            assert torch.equal(routing.keep, routing.slot < routing.kept.sum(dim=0)[routing.expert])


def test_slots_by_hand():
    # Rank 0 holds one token, rank 1 two. First choices 0 | 0 1, second choices 1 | 1 0.
    def run(expert, exchange):
        own = route(torch.eye(2, dtype=torch.float64)[expert[:, 0]], top_k=2, capacity=None)
        assert torch.equal(own.expert, expert)
        demand = gather_demand(expert, 2, exchange)
        return demand, slots_by_token(expert, own.slot, demand, exchange.rank).tolist()

    (demand, first), (_, second) = on_ranks(run, [torch.tensor([[0, 1]]), torch.tensor([[0, 1], [1, 0]])])
    assert demand.tokens == [1, 2] and demand.num_tokens == 3
    assert demand.count_RkE.tolist() == [[[1, 0], [0, 1]], [[1, 1], [1, 1]]]
    # Expert 0: its first choices are slots 0 and 1, its one second choice is 2. Expert 1: 0, then 1 and 2.
    assert first == [[0, 1]] and second == [[1, 2], [0, 2]]
