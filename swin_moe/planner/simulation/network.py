"""Links of a world of ranks, and the bytes that every one of them carries in a collective.

A rank has a port to the switch inside its node, out and in; NICs belong to nodes, out and in; nodes hang on leaf
switches, whose links to the rest are up and down. What is inside a leaf does not block: only its uplinks do, by the
hardware file's oversubscription.

Shape legend: W ranks, C NICs of the world, F leaf switches, P ranks of an expert group.
"""

from dataclasses import dataclass, field

import numpy as np

from swin_moe.planner.hardware import Hardware

KINDS = ("port out", "port in", "nic out", "nic in", "leaf up", "leaf down")


@dataclass(frozen=True)
class Transfer:
    """A collective of every group of one kind: bytes by link, one array a kind of KINDS, and seconds before the first
    of them arrives."""

    name: str
    loads: tuple[np.ndarray, ...]
    latency: float
    sent: float = field(compare=False)  # bytes that leave a rank for another, of all ranks

    def alone(self, rates: tuple[float, ...]) -> float:
        """Returns seconds that its bytes take with no other traffic; rates: bytes/s by kind of link."""
        return max((float(load.max()) / rate for load, rate in zip(self.loads, rates) if load.size), default=0.0)


@dataclass(frozen=True)
class Network:
    """Which link every rank uses.

    Raises:
        ValueError: Ranks do not fill the nodes, or nodes the leaf switches.
    """

    hardware: Hardware
    ranks: int

    def __post_init__(self) -> None:
        if self.ranks > self.node and self.ranks % self.node:
            raise ValueError(f"{self.ranks} ranks do not fill nodes of {self.node} ({self.hardware.name})")
        if self.ranks % self.leaf:
            raise ValueError(
                f"{self.ranks} ranks do not fill leaf switches of {self.leaf} ranks ({self.hardware.name})"
            )

    @property
    def node(self) -> int:
        """Ranks of a node."""
        return min(self.hardware.ranks_per_node, self.ranks)

    @property
    def sharing(self) -> int:
        """Ranks that share a NIC."""
        return self.hardware.ranks_per_node // self.hardware.nics

    @property
    def leaf(self) -> int:
        """Ranks below a leaf switch; all where the file names no leaves."""
        nodes = self.hardware.nodes_per_leaf
        return min(self.ranks, nodes * self.hardware.ranks_per_node) if nodes else self.ranks

    @property
    def rates(self) -> tuple[float, ...]:
        """Bytes/s of a link of every kind."""
        share, between = self.hardware.link_share, self.hardware.between.bytes_per_second
        port, nic = self.hardware.inside.bytes_per_second * share, between * self.sharing * share
        up = between * share * self.leaf / self.hardware.oversubscription
        return port, port, nic, nic, up, up

    def check_even(self, ranks: int) -> None:
        """Raises ValueError where groups of so many consecutive ranks lie on nodes and leaves in different ways."""
        for below, what in ((self.node, "node"), (self.leaf, "leaf switch")):
            if below % ranks and ranks % below:
                raise ValueError(
                    f"groups of {ranks} ranks are not even over a {what} of {below} ranks of {self.hardware.name}: one "
                    f"must divide the other"
                )

    def transfer(
        self,
        name: str,
        inside: np.ndarray,
        out: np.ndarray,
        into: np.ndarray,
        up: np.ndarray,
        down: np.ndarray,
        latency: float,
    ) -> Transfer:
        """Returns a transfer from bytes of every rank: (2, W) inside, out and in; (W,) to and from other nodes; (W,) of
        those to and from other leaves."""

        def by(ranks: np.ndarray, group: int) -> np.ndarray:
            edges = np.arange(0, self.ranks, group)
            return np.add.reduceat(ranks, edges)

        loads = (
            inside[0],
            inside[1],
            by(out, self.sharing),
            by(into, self.sharing),
            by(up, self.leaf),
            by(down, self.leaf),
        )
        return Transfer(name, loads, latency, float(inside[0].sum() + out.sum()))


def all_to_all(network: Network, name: str, rows_P: np.ndarray, *, transport: str) -> list[Transfer]:
    """Returns the passages of rows to the experts: one, or two of a hierarchical transport.

    Args:
        rows_P: Bytes that each rank sends to the rank at this place of its group; groups are consecutive ranks.
    """
    group = len(rows_P)
    network.check_even(group)
    node, link = min(network.node, group), network.hardware
    to_W = np.tile(rows_P, network.ranks // group)
    here_W = _within(to_W, node)
    if transport == "hierarchical" and group > network.node:
        # First to the rank of the own node that has the destination's place there, then to the other nodes.
        by_place = rows_P.reshape(-1, node).sum(0)
        place_W, zeros = np.tile(by_place, network.ranks // node), np.zeros(network.ranks)
        inside = np.stack([by_place.sum() - place_W, (node - 1) * place_W])
        first = network.transfer(f"{name}, inside", inside, zeros, zeros, zeros, zeros, link.inside.latency)
        leaving = node * (place_W - to_W)
        arriving = (group - node) * to_W
        up = node * (place_W - _same_place_in_leaf(network, to_W, group, node))
        down = to_W * (group - _in_leaf(network, group))
        none = np.zeros((2, network.ranks))
        second = network.transfer(f"{name}, between", none, leaving, arriving, up, down, link.between.latency)
        return [first, second]
    total = rows_P.sum()
    inside = np.stack([here_W - to_W, (node - 1) * to_W])
    leaf = _in_leaf(network, group)
    up, down = total - _within(to_W, leaf), to_W * (group - leaf)
    latency = (link.between if group > network.node else link.inside).latency
    return [network.transfer(name, inside, total - here_W, (group - node) * to_W, up, down, latency)]


def back(transfer: Transfer, name: str) -> Transfer:
    """Returns the way back: the same messages, the other way round."""
    a, b, c, d, e, f = transfer.loads
    return Transfer(name, (b, a, d, c, f, e), transfer.latency, transfer.sent)


def rings(network: Network, name: str, kind: str, size: float, *, ranks: int, stride: int) -> Transfer:
    """Returns a reduction or gathering in groups of `ranks` ranks that are `stride` apart, over rings.

    Ranks of one node reduce among themselves; then as many rings as they are, each with its share of the bytes, go
    through the nodes. size: Bytes of the whole.
    """
    world, link = network.ranks, network.hardware
    network.check_even(stride)
    network.check_even(ranks * stride)
    here = max(1, min(ranks, network.node // stride))
    nodes = ranks // here
    passes = 2 if kind == "all_reduce" else 1
    inside = passes * size * (here - 1) / here
    between = passes * size * (nodes - 1) / nodes / here
    all_W = np.arange(world)
    # The rank at the same place on the next node of its ring.
    step = here * stride if here == 1 else network.node
    start = all_W // (ranks * stride) * (ranks * stride)
    following = start + (all_W - start + step) % (ranks * stride)
    previous = start + (all_W - start - step) % (ranks * stride)
    crosses = all_W // network.leaf != following // network.leaf
    entered = all_W // network.leaf != previous // network.leaf
    out = np.full(world, between)
    latency = link.inside.latency * np.ceil(np.log2(here)) + link.between.latency * np.ceil(np.log2(nodes))
    return network.transfer(name, np.full((2, world), inside), out, out, out * crosses, out * entered, float(latency))


def _within(values_W: np.ndarray, ranks: int) -> np.ndarray:
    """Returns, for every rank, the sum over the ranks of its node or leaf, (W,)."""
    return np.repeat(values_W.reshape(-1, ranks).sum(1), ranks)


def _in_leaf(network: Network, group: int) -> int:
    """Returns how many ranks of an expert group are below the leaf of each of them."""
    return min(network.leaf, group)


def _same_place_in_leaf(network: Network, to_W: np.ndarray, group: int, node: int) -> np.ndarray:
    """Returns, for every rank, what ranks of its place on the nodes of its leaf and group are sent, (W,)."""
    leaf = _in_leaf(network, group)
    sums = to_W.reshape(-1, leaf // node, node).sum(1)
    return np.repeat(sums, leaf // node, axis=0).reshape(-1)
