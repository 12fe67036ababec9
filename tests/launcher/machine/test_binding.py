"""Cores of every local rank, by hand on small machines and by their rules on many."""

import itertools

import pytest

from launcher.machine.binding import gpu_of, set_threads, split_cores, threads_of
from launcher.machine.topology import Core, Gpu, Machine, short_list


def cores(*nodes, threads=1):
    """Returns the cores of nodes with as many physical ones each, numbered as Linux does: second threads last."""
    physical = [(node, core) for node, count in enumerate(nodes) for core in range(count)]
    total = len(physical)
    return [
        Core(thread * total + number, node, (node, core))
        for thread in range(threads)
        for number, (node, core) in enumerate(physical)
    ]


def distances(count):
    """Returns distances in which neighbours 0-1, 2-3, ... are near."""
    return {(a, b): 10 if a == b else 12 if a // 2 == b // 2 else 32 for a in range(count) for b in range(count)}


@pytest.mark.parametrize(
    "machine, ranks, gpu_nodes, shares",
    [
        (cores(4), 2, None, ["0-1", "2-3"]),
        (cores(3), 2, None, ["0", "1-2"]),
        (cores(2), 4, None, ["0", "1", "0", "1"]),
        (cores(4, 4), 2, None, ["0-3", "4-7"]),
        (cores(4, 4), 4, None, ["0-1", "2-3", "4-5", "6-7"]),
        (cores(4, 4), 3, None, ["0-1", "2-4", "5-7"]),  # three ranks on two nodes: even counts are worth more
        (cores(2, 2, 2, 2), 2, None, ["0-3", "4-7"]),
        (cores(1, 7), 2, None, ["0-3", "4-7"]),  # an allocation that cut node 0 short
        (cores(4, threads=2), 2, None, ["0-1,4-5", "2-3,6-7"]),  # both threads of a core stay together
        (cores(1, threads=2), 2, None, ["0", "1"]),
        (cores(4, 4), 2, [1, 0], ["4-7", "0-3"]),  # GPU 0 sits at node 1
        (cores(4, 4), 4, [1, 1, 0, 0], ["4-5", "6-7", "0-1", "2-3"]),
        (cores(4, 4), 2, [0, 0], ["0-3", "4-7"]),  # node 1 has no GPU: its cores are not left idle
        (cores(2, 2, 2, 2), 2, [2, 0], ["4-7", "0-3"]),  # nodes 1 and 3 go with their neighbours
        (cores(4, 4), 2, [5, 0], ["0-3", "4-7"]),  # a node whose cores are not ours
        (cores(4, 4), 2, [None, 0], ["0-3", "4-7"]),
    ],
)
def test_split(machine, ranks, gpu_nodes, shares):
    found = split_cores(machine, ranks, gpu_nodes or [None] * ranks, distances(4))
    assert [short_list([core.number for core in share]) for share in found] == shares


@pytest.mark.parametrize("ranks", range(1, 17))
@pytest.mark.parametrize(
    "machine", [cores(16), cores(8, 8), cores(4, 4, 4, 4, threads=2), cores(3, 5), cores(1, 2, 13)]
)
def test_no_core_is_shared_or_lost_and_shares_are_even(machine, ranks):
    shares = split_cores(machine, ranks, [None] * ranks, distances(4))
    if ranks >= len(machine):
        assert all(len(share) == 1 for share in shares)
        return
    numbers = [core.number for share in shares for core in share]
    assert sorted(numbers) == sorted(core.number for core in machine)
    threads = 2 if len(machine) == 32 else 1
    assert max(map(len, shares)) - min(map(len, shares)) <= threads
    nodes = len({core.node for core in machine})
    if ranks % nodes == 0 and len({sum(core.node == n for core in machine) for n in range(nodes)}) == 1:
        assert all(len({core.node for core in share}) == 1 for share in shares)


@pytest.mark.parametrize("near", list(itertools.product([0, 1, 2, 3], repeat=4)))
def test_gpus_anywhere_leave_no_core_shared_or_lost(near):
    machine = cores(4, 4, 4, 4)
    shares = split_cores(machine, 4, list(near), distances(4))
    assert sorted(core.number for share in shares for core in share) == list(range(16))
    if len(set(near)) == 4:
        assert [{core.node for core in share} for share in shares] == [{node} for node in near]


def test_gpu_of_a_rank():
    two = [Gpu("a", "NVIDIA", 0), Gpu("b", "NVIDIA", 1)]
    assert [gpu_of(two, rank) for rank in (0, 1, 2)] == [0, 1, None]
    assert gpu_of(two[:1], 3) == 0  # a scheduler gave each task its own
    assert gpu_of([], 0) is None


@pytest.mark.parametrize(
    "count, quota, ranks, threads", [(8, None, 2, 8), (8, 4.0, 2, 2), (8, 3.5, 1, 3), (1, 8.0, 2, 1), (8, 0.5, 4, 1)]
)
def test_threads(count, quota, ranks, threads):
    assert threads_of(count, quota, ranks) == threads


@pytest.mark.parametrize(
    "count, quota, ranks, before, threads",
    [(8, None, 2, {}, "4"), (8, 2.0, 2, {}, "1"), (2, None, 4, {}, "1"), (8, None, 2, {"OMP_NUM_THREADS": "6"}, "6")],
)
def test_threads_of_ranks_that_are_not_bound(count, quota, ranks, before, threads):
    environ = dict(before)
    set_threads(Machine(tuple(cores(count)), quota, (), {}), ranks, environ)
    assert environ == {"OMP_NUM_THREADS": threads}
