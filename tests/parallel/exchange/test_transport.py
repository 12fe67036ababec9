"""Exchange plans, without ranks: every rank's plan is made here, and the all-to-alls between them are done on lists."""

import random

import pytest
import torch

from swin_moe.parallel.exchange.hierarchical import HierarchicalTransport
from swin_moe.parallel.exchange.owners import Owners
from swin_moe.parallel.exchange.topology import Topology
from swin_moe.parallel.exchange.transport import (
    AllToAll,
    ExchangePlan,
    LinearTransport,
    PendingRows,
    Permutation,
    block_permutation,
    build_transport,
    by_expert,
    even_plan,
)
from swin_moe.parallel.groups import Degrees, Groups

CPU = torch.device("cpu")


def groups_of(rank, hosts, **groups):
    degrees = Degrees(len(hosts), 1, 1)
    return Groups(len(hosts), rank, degrees, expert="all", hosts=tuple(hosts), **groups)


def transports(kind, hosts):
    """Returns one transport per rank; a group is the tuple of its ranks."""
    topology = Topology(tuple(hosts))
    found = []
    for rank in range(len(hosts)):
        node, crossing = topology.node(rank), next(c for c in topology.crossings if rank in c)
        node = tuple(node) if len(node) > 1 else None
        found.append(kind(groups_of(rank, hosts, node=node, crossing=tuple(crossing))))
    return found


def plans(kind, hosts, count_RRE):
    """Returns one plan per rank; count_RRE: rows from a rank to a rank for each of its experts."""
    ranks = range(len(hosts))
    send_RR = [[sum(count_RRE[r][d]) for d in ranks] for r in ranks]
    found = []
    for rank, transport in enumerate(transports(kind, hosts)):
        relayed = [send_RR[r] for r in transport.relayed_ranks]
        found.append(transport.plan(send_RR[rank], [count_RRE[s][rank] for s in ranks], relayed, CPU))
    return found


def carry(all_plans, rows):
    """Returns every rank's rows after the calls, as PendingRows moves them."""
    for number in range(len(all_plans[0].calls)):
        rows = [reordered(r, plan.permutations[number]) for r, plan in zip(rows, all_plans)]
        arrived = []
        for rank, plan in enumerate(all_plans):
            call = plan.calls[number]
            members = {None: (rank,), "all": tuple(range(len(rows)))}.get(call.group, call.group)
            assert members[call.me] == rank
            parts = []
            for member, expected in zip(members, call.receive):
                other = all_plans[member].calls[number]
                start = sum(other.send[: members.index(rank)])
                part = rows[member][start : start + other.send[members.index(rank)]]
                assert len(part) == expected
                parts += part
            arrived.append(parts)
        rows = arrived
    return [reordered(r, plan.permutations[-1]) for r, plan in zip(rows, all_plans)]


def reordered(rows, permutation):
    return rows if permutation is None else [rows[i] for i in permutation.index.tolist()]


def test_block_permutation_by_hand():
    # a | b b | c c, wanted as a c c | b b.
    permutation = block_permutation([1, 2, 2], [0, 2, 1], CPU)
    assert permutation.index.tolist() == [0, 3, 4, 1, 2] and permutation.inverse.tolist() == [0, 3, 4, 1, 2]
    assert block_permutation([1, 0, 2], [1, 0, 2], CPU) is None  # an empty block may stand anywhere
    assert block_permutation([], [], CPU) is None
    assert by_expert([[1, 2], [2, 0]], [1, 0]) == ([2, 0, 1, 2], [2, 0, 3, 1])


def test_two_hops_by_hand():
    # Nodes {0, 1, 2} and {3}; rank r sends one row to every rank. Rank 0 relays its node's rows for 3, and 3 relays.
    made = plans(HierarchicalTransport, (0, 0, 0, 1), [[[1]] * 4] * 4)
    inside, between = made[0].calls
    assert inside.send == [2, 1, 1] and inside.receive == [2, 2, 2]
    assert between.send == [3, 0, 0, 3] and between.receive == [3, 0, 0, 1]
    assert (made[0].sent_rows, made[0].crossing_rows) == (5, 3)
    assert (made[1].sent_rows, made[1].crossing_rows) == (3, 0)
    assert made[3].calls[0].group is None and (made[3].sent_rows, made[3].crossing_rows) == (3, 3)


@pytest.mark.parametrize("kind", [LinearTransport, HierarchicalTransport])
def test_random_rows_arrive_by_expert_and_source_and_find_their_way_back(kind):
    draw = random.Random(1)
    for _ in range(150):
        hosts = [draw.randrange(3) for _ in range(draw.randrange(2, 9))]
        experts = [draw.randrange(4) for _ in hosts]
        sparse = draw.random()
        count = [
            [[draw.randrange(4) * (draw.random() < sparse) for _ in range(experts[d])] for d in range(len(hosts))]
            for _ in hosts
        ]
        made = plans(kind, hosts, count)
        rows = [
            [(s, d, e, i) for d, per_expert in enumerate(count[s]) for e, n in enumerate(per_expert) for i in range(n)]
            for s in range(len(hosts))
        ]
        arrived = carry(made, rows)
        for rank, found in enumerate(arrived):
            wanted = [row for sent in rows for row in sent if row[1] == rank]
            assert found == sorted(wanted, key=lambda row: (row[2], row[0], row[3]))
        assert carry([plan.reverse for plan in made], arrived) == rows
        away = [sum(sum(n) for d, n in enumerate(count[s]) if hosts[d] != hosts[s]) for s in range(len(hosts))]
        assert sum(plan.crossing_rows for plan in made) == sum(away)  # no row crosses twice


@pytest.mark.parametrize("kind", [LinearTransport, HierarchicalTransport])
@pytest.mark.parametrize(("degrees", "experts"), [((4, 1, 1), 8), ((4, 1, 1), 5), ((2, 2, 1), 3), ((1, 4, 1), 2)])
@pytest.mark.parametrize("rows", [0, 2])
def test_even_rows_need_no_counts(kind, degrees, experts, rows):
    hosts, owners = (0, 1, 1, 1), Owners(Degrees(*degrees), experts)
    count = [[[rows if owners.sources(d)[s] else 0] * owners.num_local(d) for d in range(4)] for s in range(4)]
    expected = plans(kind, hosts, count)
    for rank, transport in enumerate(transports(kind, hosts)):
        made = even_plan(transport, owners, rank, rows, CPU)
        assert made.calls == expected[rank].calls
        for found, wanted in zip(made.permutations, expected[rank].permutations):
            assert (found is None) == (wanted is None) and (found is None or torch.equal(found.index, wanted.index))


def test_a_hierarchy_without_levels_is_linear():
    for hosts, why in (((0, 0), "its ranks share a node"), ((0, 1), "every rank of it has a node of its own")):
        transport, reason = build_transport("hierarchical", groups_of(0, hosts))
        assert transport.name == "linear" and why in reason
    assert build_transport("linear", groups_of(0, (0, 1)))[1] == ""
    with pytest.raises(ValueError, match="model.moe.transport: unknown choice 'pigeon'; allowed: hierarchical, linear"):
        build_transport("pigeon", groups_of(0, (0, 0)))


def test_rows_alone_are_permuted_and_a_transposed_input_is_not_scrambled():
    permutation = Permutation(torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]))
    plan = ExchangePlan((AllToAll(None, [3], [3], (False,), 0),), (permutation, permutation))
    rows = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(PendingRows(rows, plan).wait(), rows[[1, 2, 0]])
    assert torch.equal(PendingRows(PendingRows(rows, plan).wait(), plan.reverse).wait(), rows)
