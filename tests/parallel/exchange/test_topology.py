"""Who relays rows for whom, by hand and for random nodes."""

import random

import pytest

from swin_moe.parallel.exchange.topology import Topology


def test_equal_nodes_by_hand():
    two = Topology((0, 0, 1, 1))
    assert two.nodes == [[0, 1], [2, 3]] and not two.is_flat
    assert [two.relay([0, 1], d) for d in range(4)] == [0, 1, 0, 1]
    assert two.served(0) == [0, 2] and two.served(3) == [1, 3]
    assert two.crossings == [[0, 2], [1, 3]]


def test_unequal_nodes_by_hand():
    last = Topology((0, 0, 0, 1))
    assert last.served(0) == [0, 3] and last.served(1) == [1] and last.served(3) == [0, 1, 2, 3]
    assert last.crossings == [[0, 1, 2, 3]]
    mixed = Topology((5, 7, 5, 7, 5))  # numbers and order of nodes mean nothing
    assert mixed.nodes == [[0, 2, 4], [1, 3]]
    assert mixed.served(1) == [0, 1, 4] and mixed.served(4) == [4]
    assert mixed.crossings == [[0, 1, 4], [2, 3]]


@pytest.mark.parametrize("hosts", [(0,), (0, 0, 0), (0, 1, 2)])
def test_nothing_to_relay(hosts):
    assert Topology(hosts).is_flat


def test_every_destination_has_one_relay_per_node_within_one_crossing():
    draw = random.Random(0)
    for _ in range(300):
        topology = Topology(tuple(draw.randrange(4) for _ in range(draw.randrange(1, 12))))
        ranks = list(range(len(topology.hosts)))
        assert sorted(r for crossing in topology.crossings for r in crossing) == ranks
        for node in topology.nodes:
            assert sorted(d for rank in node for d in topology.served(rank)) == ranks
            assert all(rank in topology.served(rank) for rank in node)
        for rank in ranks:
            crossing = next(c for c in topology.crossings if rank in c)
            assert set(topology.served(rank)) <= set(crossing)
