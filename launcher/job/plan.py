"""What the launcher is going to do, as data and as a table: where every rank runs and what it gets there."""

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.hosts.hostfile import Host
from launcher.hosts.nodelist import compress
from launcher.machine.binding import gpu_of, split_cores
from launcher.machine.topology import Machine, short_list

AT_START = "at start"  # what only the ranks themselves can find out, on hosts that are not this one
LOOPBACK = "lo"
_MOST_ROWS = 64  # of a table with a row for each rank, then of one with a row for each host
_HEAD = ("rank", "host", "local", "cores", "numa", "gpu", "interface")


@dataclass(frozen=True)
class RankPlan:
    """One rank. Cores, NUMA nodes and GPU in the kernel's short form: "0-3"; "-" = none."""

    rank: int
    host: str
    local_rank: int
    cores: str = AT_START
    nodes: str = AT_START
    gpu: str = AT_START
    interface: str = AT_START


@dataclass(frozen=True)
class Plan:
    """A job before it runs. `hosts` have the ranks of each as their slots; () = this host alone."""

    hosts: tuple[Host, ...]
    ranks: tuple[RankPlan, ...]

    @property
    def is_complete(self) -> bool:
        """Returns whether nothing is left for the ranks to find out."""
        return all(AT_START not in (rank.cores, rank.interface) for rank in self.ranks)


def make_plan(hosts: Sequence[Host], ranks: int, machine: Machine, *, bind: bool = True) -> Plan:
    """Returns where the ranks run; what they get is known in advance for ranks on this host only.

    Args:
        hosts: With the ranks of each as slots; () = all ranks run here.
        machine: This host.
    """
    names = [host.name for host in hosts for _ in range(host.slots or 0)] or [socket.gethostname()] * ranks
    alone = len(set(names)) == 1 and is_here(names[0])
    totals, placed, plans = Counter(names), Counter[str](), []
    shares = {name: _local_shares(machine, count, bind) for name, count in totals.items() if is_here(name)}
    for rank, name in enumerate(names):
        local = placed[name]
        placed[name] += 1
        if name not in shares:
            plans.append(RankPlan(rank, name, local))
            continue
        cores, nodes, gpu = shares[name][local]
        plans.append(RankPlan(rank, name, local, cores, nodes, gpu, LOOPBACK if alone else AT_START))
    return Plan(tuple(hosts), tuple(plans))


def is_here(host: str) -> bool:
    """Returns whether a name is plainly this host's; an alias of it counts as another host."""
    own = socket.gethostname()
    return host in ("localhost", "127.0.0.1", "::1", own, own.partition(".")[0]) or host.partition(".")[0] == own


def describe_cores(cores: Sequence, gpus: Sequence, gpu: int | None) -> tuple[str, str, str]:
    """Returns (cores, NUMA nodes, GPU) of a rank as they stand in the table."""
    numbers, nodes = [core.number for core in cores], [core.node for core in cores]
    return short_list(numbers), short_list(nodes), "-" if gpu is None else f"{gpu} ({gpus[gpu].bus})"


def table(ranks: Sequence[RankPlan]) -> list[str]:
    """Returns the lines of a table: a row for each rank, for each host if there are many, for alike hosts of many."""
    rows = [_row(rank) for rank in ranks] if len(ranks) <= _MOST_ROWS else _rows_of_hosts(ranks)
    return columns([_HEAD, *rows])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows as lines, their columns under one another."""
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]


def _row(rank: RankPlan) -> tuple[str, ...]:
    return str(rank.rank), rank.host, str(rank.local_rank), rank.cores, rank.nodes, rank.gpu, rank.interface


def _rows_of_hosts(ranks: Sequence[RankPlan]) -> list[tuple[str, ...]]:
    """Returns a row for each host; of many, neighbours share one that differ in their ranks and names only."""
    of_host: dict[str, list[RankPlan]] = {}
    for rank in ranks:
        of_host.setdefault(rank.host, []).append(rank)
    rows: list[tuple[list[int], list[str], tuple[str, ...]]] = []
    for host, members in of_host.items():
        numbers = [rank.rank for rank in members]
        local = short_list([rank.local_rank for rank in members])
        alike = (local, *(_united(members, name) for name in ("cores", "nodes", "gpu", "interface")))
        if len(of_host) > _MOST_ROWS and rows and rows[-1][2] == alike:
            rows[-1][0].extend(numbers)
            rows[-1][1].append(host)
        else:
            rows.append((numbers, [host], alike))
    return [(short_list(numbers), compress(hosts), *alike) for numbers, hosts, alike in rows]


def _united(ranks: Sequence[RankPlan], name: str) -> str:
    """Returns the different entries of a column, in order, each once."""
    return " ".join(dict.fromkeys(getattr(rank, name) for rank in ranks))


def _local_shares(machine: Machine, ranks: int, bind: bool) -> list[tuple[str, str, str]]:
    """Returns (cores, NUMA nodes, GPU) of every rank of this host, as they stand in the table."""
    numbers = [gpu_of(machine.gpus, local) for local in range(ranks)]
    near = [None if number is None else machine.gpus[number].node for number in numbers]
    cores: Sequence[Sequence] = [machine.cores] * ranks
    if bind and machine.cores:
        cores = split_cores(machine.cores, ranks, near, machine.distances)
    return [describe_cores(own, machine.gpus, number) for own, number in zip(cores, numbers)]


def title(plan: Plan, by: str, environ: Mapping[str, str]) -> str:
    """Returns the line above the table."""
    hosts = len({rank.host for rank in plan.ranks})
    ranks = len(plan.ranks)
    count = f"{ranks} rank{'s' * (ranks > 1)} on {hosts} host{'s' * (hosts > 1)}"
    threads = environ.get("OMP_NUM_THREADS")
    return f"{count}, started by {by}" + (f", OMP_NUM_THREADS={threads} as you set it" if threads else "")
