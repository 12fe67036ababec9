"""How rows travel between the ranks of the expert group: a transport makes exchange plans, rows are moved by one.

A plan is one or two all-to-alls with a permutation of rows before, between and after them. Its reverse is the way
back, and the way of gradients. Transports differ only in the plans they make; a new one is a line in TRANSPORTS.

Shape legend: R ranks of the expert group, S ranks that send here, E local experts, C slices (overlap.py).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from swin_moe.parallel.exchange.owners import Owners
from swin_moe.parallel.exchange.topology import Topology
from swin_moe.parallel.groups import Groups
from swin_moe.registry import lookup

TRANSPORTS = {
    "linear": "swin_moe.parallel.exchange.transport:LinearTransport",
    "hierarchical": "swin_moe.parallel.exchange.hierarchical:HierarchicalTransport",
}


Counts = list[list[int]]  # rows, as a matrix


@dataclass(frozen=True)
class AllToAll:
    """One all-to-all of rows; group None = this rank alone, nothing moves."""

    group: ProcessGroup | None
    send: list[int]  # rows to each rank of the group
    receive: list[int]  # rows from each
    away: tuple[bool, ...]  # which ranks of the group are on another node
    me: int  # this rank's number in the group

    def reversed(self) -> "AllToAll":
        """Returns the all-to-all back."""
        return AllToAll(self.group, self.receive, self.send, self.away, self.me)

    @property
    def sent_rows(self) -> int:
        """Rows that leave this rank."""
        return sum(self.send) - self.send[self.me]

    @property
    def crossing_rows(self) -> int:
        """Rows that leave this rank's node."""
        return sum(rows for rows, away in zip(self.send, self.away) if away)


@dataclass(frozen=True)
class Permutation:
    """A reordering of rows, x[index], and its inverse."""

    index: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class ExchangePlan:
    """All-to-alls one after the other, with the rows permuted before each and after the last; None = in order."""

    calls: tuple[AllToAll, ...]
    permutations: tuple[Permutation | None, ...]

    @cached_property
    def reverse(self) -> "ExchangePlan":
        """The way back: the rows end as they were at the start."""
        permutations = tuple(p and Permutation(p.inverse, p.index) for p in reversed(self.permutations))
        return ExchangePlan(tuple(call.reversed() for call in reversed(self.calls)), permutations)

    @property
    def sent_rows(self) -> int:
        """Rows that leave this rank; one that is relayed here counts as well."""
        return sum(call.sent_rows for call in self.calls)

    @property
    def crossing_rows(self) -> int:
        """Rows that this rank sends to other nodes."""
        return sum(call.crossing_rows for call in self.calls)


class PendingRows:
    """Rows that are being exchanged by a plan: started at once, without waiting. No gradient.

    Every rank of the plan's groups has to start, advance and wait for its rows in the same order, also with no rows.
    """

    def __init__(self, rows: Tensor, plan: ExchangePlan) -> None:
        self._rows, self._plan, self._number = rows, plan, 0  # number: of the call under way
        self._start()

    def _start(self) -> None:
        # Contiguous first: an output made like a transposed input would scramble rows.
        call = self._plan.calls[self._number]
        rows = _permuted(self._rows, self._plan.permutations[self._number]).contiguous()
        self._sent: Tensor | None = rows  # kept alive until it has been sent
        if call.group is None:
            self._rows, self._work = rows, None
            return
        self._rows = rows.new_empty((sum(call.receive), *rows.shape[1:]))
        self._work = dist.all_to_all_single(self._rows, rows, call.receive, call.send, group=call.group, async_op=True)

    def advance(self) -> None:
        """Waits for the call under way and starts the next, unless the last is under way."""
        if self._number + 1 < len(self._plan.calls):
            self.finish()
            self._number += 1
            self._start()

    def wait(self) -> Tensor:
        """Returns the rows that arrived, in the plan's last order."""
        while self._number + 1 < len(self._plan.calls):
            self.advance()
        self.finish()
        return _permuted(self._rows, self._plan.permutations[-1])

    def finish(self) -> None:
        """Waits for the call under way."""
        if self._work is not None:
            self._work.wait()
        self._work = self._sent = None


def _permuted(rows: Tensor, permutation: Permutation | None) -> Tensor:
    return rows if permutation is None else rows.index_select(0, permutation.index)


def exchange_rows(x: Tensor, send: list[int], receive: list[int], group: ProcessGroup | None) -> Tensor:
    """Returns (M, ...), the rows the ranks of the group sent here, in rank order: one all-to-all. No gradient.

    send, receive: Rows to and from each rank.
    """
    output = torch.empty((sum(receive), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_to_all_single(output, x.contiguous(), receive, send, group=group)
    return output


def block_permutation(sizes: list[int], wanted: list[int], device: torch.device) -> Permutation | None:
    """Returns what turns blocks of these sizes into blocks listed as in `wanted`; None if they are already.

    Args:
        sizes: Rows of each block, as they lie.
        wanted: A permutation of the blocks' numbers; empty ones may stand anywhere.
    """
    filled = [block for block in wanted if sizes[block]]
    if filled == sorted(filled):
        return None
    size = torch.tensor(sizes)
    first, block = size.cumsum(0) - size, torch.tensor(filled)
    size = size[block]
    index = torch.arange(int(size.sum())) + (first[block] - (size.cumsum(0) - size)).repeat_interleave(size)
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(len(index))
    return Permutation(index.to(device, non_blocking=True), inverse.to(device, non_blocking=True))


def by_expert(arriving: Counts, sources: list[int]) -> tuple[list[int], list[int]]:
    """Returns (sizes, wanted) for block_permutation: rows that lie by (source, expert), wanted by (expert, source).

    Args:
        arriving: Rows from each rank for each local expert.
        sources: The ranks in the order in which their rows lie; wanted is the order of ranks.
    """
    num_local = len(arriving[0])
    sizes = [rows for source in sources for rows in arriving[source]]
    position = {source: place for place, source in enumerate(sources)}
    wanted = [position[source] * num_local + e for e in range(num_local) for source in sorted(sources)]
    return sizes, wanted


class Transport(Protocol):
    """Makes exchange plans between the ranks of the expert group."""

    name: str
    relayed_ranks: list[int]  # X of them: the ranks of whose rows this rank has to know

    def __init__(self, groups: Groups) -> None: ...

    def relayed(self, send_CR: Tensor) -> Tensor:
        """Returns what this rank has to know of others' rows to plan C slices, (X, C, R) int64; X may be 0.

        Collective; stays on the device, so that the caller waits for it together with its own counts.
        """
        ...

    def plan(self, send: list[int], arriving: Counts, relayed: Counts, device: torch.device) -> ExchangePlan:
        """Returns the plan of rows that lie by destination, and end by (local expert, source).

        Args:
            send: (R) rows to each rank.
            arriving: (R, E) rows from each rank for each local expert.
            relayed: (X, R), what `relayed` gave for these rows.
        """
        ...


class LinearTransport:
    """One all-to-all over the whole group."""

    name = "linear"

    def __init__(self, groups: Groups) -> None:
        self.relayed_ranks: list[int] = []
        self.group, self.me = groups.expert, groups.expert_rank
        hosts = groups.topology.hosts
        self.away = tuple(host != hosts[self.me] for host in hosts)

    def relayed(self, send_CR: Tensor) -> Tensor:
        """See Transport."""
        return send_CR.new_empty((0, *send_CR.shape))

    def plan(self, send: list[int], arriving: Counts, relayed: Counts, device: torch.device) -> ExchangePlan:
        """See Transport."""
        call = AllToAll(self.group, send, [sum(rows) for rows in arriving], self.away, self.me)
        return ExchangePlan((call,), (None, block_permutation(*by_expert(arriving, list(range(len(send)))), device)))


def even_plan(transport: Transport, owners: Owners, rank: int, rows: int, device: torch.device) -> ExchangePlan:
    """Returns the plan by which every rank of the group sends `rows` rows for each expert.

    Nothing is exchanged to make it: for dispatchers that pad.
    """
    sends = {r: [rows * len(experts) for experts in owners.destinations(r)] for r in (rank, *transport.relayed_ranks)}
    num_local = owners.num_local(rank)
    arriving = [[rows if experts else 0] * num_local for experts in owners.sources(rank)]
    return transport.plan(sends[rank], arriving, [sends[r] for r in transport.relayed_ranks], device)


def build_transport(name: str, groups: Groups) -> tuple[Transport, str]:
    """Returns (the transport, why it is not the one asked for, or "").

    Raises:
        ValueError: There is no such transport.
    """
    topology: Topology = groups.topology
    why = ""
    if name == "hierarchical" and topology.is_flat:
        where = "its ranks share a node" if len(topology.nodes) == 1 else "every rank of it has a node of its own"
        why = f"not hierarchical: the expert group has no two levels, {where}"
        name = "linear"
    return lookup(TRANSPORTS, name, key="model.moe.transport")(groups), why
