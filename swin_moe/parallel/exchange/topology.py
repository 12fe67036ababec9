"""Which ranks of a group share a node, and who relays rows between nodes. Plain data, without torch.distributed.

Ranks are numbered within the group. Nodes may hold any number of ranks, in any order.
"""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Topology:
    """The nodes of a group; hosts[r] is the number of rank r's node."""

    hosts: tuple[int, ...]

    @cached_property
    def nodes(self) -> list[list[int]]:
        """The ranks of each node, ascending; nodes in the order of their first ranks."""
        found: dict[int, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            found.setdefault(host, []).append(rank)
        return list(found.values())

    def node(self, rank: int) -> list[int]:
        """Returns the ranks on the node of `rank`, itself included."""
        return next(ranks for ranks in self.nodes if rank in ranks)

    @property
    def is_flat(self) -> bool:
        """True where there is nothing to relay: one node, or one rank on every node."""
        return len(self.nodes) == 1 or all(len(ranks) == 1 for ranks in self.nodes)

    def relay(self, ranks: list[int], destination: int) -> int:
        """Returns who of the node `ranks` collects the node's rows for `destination`.

        The rank with the same number within its node, as in Tutel's 2DH (arXiv:2206.03382), modulo the node's size
        where nodes are unequal. So a rank on this node collects what is for itself.
        """
        return ranks[self.node(destination).index(destination) % len(ranks)]

    def served(self, rank: int) -> list[int]:
        """Returns the destinations whose rows `rank` collects on its node, ascending; itself is one of them."""
        ranks = self.node(rank)
        return [destination for destination in range(len(self.hosts)) if self.relay(ranks, destination) == rank]

    @cached_property
    def crossings(self) -> list[list[int]]:
        """The sets of ranks that exchange rows between nodes: relays together with the destinations they serve.

        With equal nodes, the ranks of one number within their nodes.
        """
        sets: list[set[int]] = []
        for rank in range(len(self.hosts)):
            joined = set(self.served(rank))
            apart = [s for s in sets if not s & joined]
            sets = [*apart, joined.union(*(s for s in sets if s & joined))]
        return sorted(sorted(s) for s in sets)
