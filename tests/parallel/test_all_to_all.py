"""The arithmetic of the exchange, without ranks; what travels for real: tests/equivalence."""

import pytest
import torch

from swin_moe.parallel.all_to_all import AllToAllDispatcher, _by_expert
from swin_moe.parallel.groups import Degrees, Groups


def test_rows_by_expert_by_hand():
    # Two sources send 1 and 2 rows for two experts, then 2 and 0: a | b b | c c  ->  a c c | b b.
    assert _by_expert(torch.tensor([[1, 2], [2, 0]])).tolist() == [0, 3, 4, 1, 2]
    assert _by_expert(torch.zeros(3, 2, dtype=torch.long)).tolist() == []


def dispatcher(rank, degrees, experts):
    return AllToAllDispatcher(Groups(Degrees(*degrees).world_size, rank, Degrees(*degrees)), experts)


def test_destinations_by_hand():
    # 4 experts over 3 ranks: 2, 2, 0.
    uneven = dispatcher(2, (3, 1, 1), 4)
    assert uneven.num_local == 0 and uneven.destinations == [range(0, 2), range(2, 4), range(4, 4)]
    assert uneven.sources == [0, 0, 0]
    # Ranks 0, 1 share experts 0, 1 and ranks 2, 3 experts 2, 3: even ranks send to even shards.
    shared = dispatcher(1, (2, 2, 1), 4)
    assert shared.destinations == [range(0), range(0, 2), range(0), range(2, 4)]
    assert shared.sources == [0, 2, 0, 2]


@pytest.mark.parametrize(("degrees", "experts"), [((4, 1, 1), 8), ((3, 1, 1), 4), ((2, 2, 1), 5), ((1, 4, 2), 3)])
def test_every_expert_has_one_destination_and_senders_agree_with_receivers(degrees, experts):
    ranks = [dispatcher(rank, degrees, experts) for rank in range(degrees[0] * degrees[1])]
    for sender, d in enumerate(ranks):
        assert [e for span in d.destinations for e in span] == list(range(experts))
        for receiver, span in enumerate(d.destinations):
            assert len(span) == ranks[receiver].sources[sender]


def test_counts_and_splits_by_hand():
    d = dispatcher(0, (2, 1, 1), 4)
    # I keep 1, 2, 3, 4 rows of the experts; for my experts 0 and 1 arrive 1, 2 from me and 5, 0 from the other.
    exchange, counts = d._exchange([1, 2, 3, 4], [1, 2, 5, 0], torch.device("cpu"))
    assert exchange.send == [3, 7] and exchange.receive == [3, 5] and counts.tolist() == [6, 2]
    assert exchange.order.tolist() == [0, 3, 4, 5, 6, 7, 1, 2]
    assert exchange.inverse[exchange.order].tolist() == list(range(8))
