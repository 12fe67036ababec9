"""Which cores a rank gets: those near its GPU, else an even split that keeps every rank within a NUMA node."""

import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from launcher.machine.topology import Core, Gpu, Machine

NO_BIND = "LAUNCHER_NO_BIND"  # set: ranks keep the cores they were started with


def share_of_cores(cores: Sequence[Any], local_rank: int, local_world_size: int) -> list[Any]:
    """Returns the contiguous share of one local rank; with more ranks than cores, ranks take turns, one core each."""
    if local_world_size >= len(cores):
        return [cores[local_rank % len(cores)]]
    low, high = (i * len(cores) // local_world_size for i in (local_rank, local_rank + 1))
    return list(cores[low:high])


def split_cores(
    cores: Sequence[Core], ranks: int, gpu_nodes: Sequence[int | None], distances: Mapping[tuple[int, int], int]
) -> list[list[Core]]:
    """Returns the cores of every local rank.

    Ranks whose GPUs say where they are get the cores of that NUMA node; nodes without a GPU go with the nearest one
    that has some. Without GPUs, ranks are dealt to nodes if that comes out even, so that no rank's memory lies on two;
    otherwise cores are cut evenly in the order of nodes. Hardware threads of one core stay together.

    Args:
        gpu_nodes: NUMA node of the GPU of each local rank; None = no GPU, or unknown.
    """
    ordered = sorted(cores, key=lambda core: (core.node, core.physical, core.number))
    if ranks >= len(ordered):
        return [share_of_cores(ordered, rank, ranks) for rank in range(ranks)]
    even = [_cut(ordered, rank, ranks) for rank in range(ranks)]
    nodes = sorted({core.node for core in ordered})
    if all(node in nodes for node in gpu_nodes):
        homes = _homes(nodes, [node for node in gpu_nodes if node is not None], distances)
        near = _by_node(ordered, homes, [node for node in gpu_nodes if node is not None])
        return near if _is_partition(near, ordered) else even
    if ranks % len(nodes) == 0:
        per_node = ranks // len(nodes)
        dealt = _by_node(ordered, {node: node for node in nodes}, [nodes[rank // per_node] for rank in range(ranks)])
    elif len(nodes) % ranks == 0:
        per_rank = len(nodes) // ranks
        homes = {node: nodes[number // per_rank * per_rank] for number, node in enumerate(nodes)}
        dealt = _by_node(ordered, homes, [nodes[rank * per_rank] for rank in range(ranks)])
    else:
        return even
    fair = min(map(len, dealt)) >= min(map(len, even))
    return dealt if fair and _is_partition(dealt, ordered) else even


def gpu_of(gpus: Sequence[Gpu], local_rank: int) -> int | None:
    """Returns the number of a rank's GPU among those it sees: its local rank's, or the only one; None = it has none."""
    if local_rank < len(gpus):
        return local_rank
    return 0 if len(gpus) == 1 else None


def threads_of(cores: int, quota: float | None, ranks: int) -> int:
    """Returns how many threads really run at a time in a rank: its cores, or its part of the cgroup's quota."""
    return max(1, cores if quota is None else min(cores, int(quota / ranks + 1e-6)))


def bind(node: Any, machine: Machine, environ: MutableMapping[str, str]) -> list[Core]:
    """Returns the cores of this rank, having bound it to them unless its MPI bound the ranks already.

    Sets OMP_NUM_THREADS to what the rank really has, unless the user did.

    Args:
        node: Communicator of this host's ranks.
    """
    own = list(machine.cores)
    number = gpu_of(machine.gpus, node.rank)
    everyone = node.allgather(([core.number for core in own], None if number is None else machine.gpus[number].node))
    if all(cores == everyone[0][0] for cores, _ in everyone) and hasattr(os, "sched_setaffinity") and own:
        own = split_cores(own, node.size, [near for _, near in everyone], machine.distances)[node.rank]
        os.sched_setaffinity(0, [core.number for core in own])
    environ.setdefault("OMP_NUM_THREADS", str(threads_of(len(own), machine.quota, node.size)))
    return own


def set_threads(machine: Machine, ranks: int, environ: MutableMapping[str, str]) -> None:
    """Sets OMP_NUM_THREADS, unless the user did, to an even part of what ranks that are not bound have together."""
    even = max(1, len(machine.cores) // ranks)
    environ.setdefault("OMP_NUM_THREADS", str(threads_of(even, machine.quota, ranks)))


def _is_partition(shares: Sequence[Sequence[Core]], cores: Sequence[Core]) -> bool:
    """Returns whether no core is in two shares or in none."""
    return sum(map(len, shares)) == len(cores) == len({core for share in shares for core in share})


def _cut(ordered: Sequence[Core], rank: int, ranks: int) -> list[Core]:
    """Returns one of `ranks` even parts, without cutting through a physical core where there are enough of them."""
    physical: dict[tuple, list[Core]] = {}
    for core in ordered:
        physical.setdefault((core.node, core.physical), []).append(core)
    if ranks > len(physical):
        return share_of_cores(ordered, rank, ranks)
    return [core for group in share_of_cores(list(physical.values()), rank, ranks) for core in group]


def _by_node(ordered: Sequence[Core], homes: Mapping[int, int], of_rank: Sequence[int]) -> list[list[Core]]:
    """Returns the cores of every rank, where ranks of a home share the cores of all its nodes."""
    shares = []
    for rank, home in enumerate(of_rank):
        cores = [core for core in ordered if homes[core.node] == home]
        shares.append(_cut(cores, of_rank[:rank].count(home), of_rank.count(home)))
    return shares


def _homes(nodes: Sequence[int], with_gpus: Sequence[int], distances: Mapping[tuple[int, int], int]) -> dict[int, int]:
    """Returns the node with GPUs to which each node's cores go; the nearest, and of those the one with least so far."""
    homes = {node: node for node in set(with_gpus)}
    taken = {node: 1 / with_gpus.count(node) for node in homes}  # nodes for each of its ranks
    for node in nodes:
        if node in homes:
            continue
        home = min(taken, key=lambda other: (distances.get((node, other), 255), taken[other], other))
        homes[node] = home
        taken[home] += 1 / with_gpus.count(home)
    return homes
