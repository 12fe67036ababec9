"""The arithmetic of the exchange, without ranks; what travels for real: tests/equivalence."""

import torch

from swin_moe.moe.dispatch import RowOrder
from swin_moe.parallel.exchange.all_to_all import AllToAllDispatcher
from swin_moe.parallel.exchange.link import Link
from swin_moe.parallel.exchange.overlap import order_by_slice, rows_in_slice
from swin_moe.parallel.exchange.transport import LinearTransport
from swin_moe.parallel.groups import Degrees, Groups

CPU = torch.device("cpu")


def dispatcher(rank, degrees, experts, overlap=1):
    groups = Groups(Degrees(*degrees).world_size, rank, Degrees(*degrees))
    return AllToAllDispatcher(groups, experts, Link(LinearTransport(groups), "none", overlap))


def test_counts_and_splits_by_hand():
    d = dispatcher(0, (2, 1, 1), 4)
    # I keep 1, 2, 3, 4 rows of the experts; for my experts 0 and 1 arrive 1, 2 from me and 5, 0 from the other.
    made, counts = d._plans([1, 2, 3, 4], [1, 2, 5, 0], CPU)
    (plan,), (call,) = made, made[0].calls
    assert call.send == [3, 7] and call.receive == [3, 5] and counts[0].tolist() == [6, 2]
    assert plan.permutations[0] is None and plan.permutations[1].index.tolist() == [0, 3, 4, 5, 6, 7, 1, 2]
    assert plan.reverse.permutations[0].index.tolist() == [0, 6, 7, 1, 2, 3, 4, 5]


def test_slices_by_hand():
    d = dispatcher(0, (2, 1, 1), 4, overlap=2)
    made, counts = d._plans([1, 2, 3, 4], [1, 2, 5, 0], CPU)
    assert [plan.calls[0].send for plan in made] == [[0 + 1, 1 + 2], [1 + 1, 2 + 2]]
    assert [plan.calls[0].receive for plan in made] == [[0 + 1, 2 + 0], [1 + 1, 3 + 0]]
    assert [c.tolist() for c in counts] == [[2, 1], [4, 1]]
    # Rows a, b b, c c c, d d d d of four experts become  b c d d | a b c c d d.
    order = RowOrder(torch.arange(10)[:, None], None, torch.arange(10))
    sliced = order_by_slice(order, [1, 2, 3, 4], 2)
    assert sliced.pair.tolist() == [1, 3, 6, 7, 0, 2, 4, 5, 8, 9]
    assert sliced.position.flatten().tolist() == [4, 0, 5, 1, 6, 7, 2, 3, 8, 9]


def test_slices_of_few_rows_lose_none():
    for slices in (1, 2, 3, 5):
        found = [[rows_in_slice(rows, number, slices) for number in range(slices)] for rows in range(12)]
        assert [sum(parts) for parts in found] == list(range(12))
        assert all(max(parts) - min(parts) <= 1 for parts in found)
        counted = torch.stack([rows_in_slice(torch.arange(12), number, slices) for number in range(slices)], dim=1)
        assert counted.tolist() == found
    nothing = RowOrder(torch.zeros(0, 1, dtype=torch.int64), None, torch.zeros(0, dtype=torch.int64))
    assert order_by_slice(nothing, [0, 0, 0, 0], 2) is nothing
