"""All-to-all in two steps: inside each node, then between nodes, in few large messages instead of many small ones.

The 2DH algorithm of Tutel (arXiv:2206.03382) for any number of ranks per node: a rank collects the rows of its node for
the destinations it serves (topology.py:Topology.served) and sends each of them one message. With n nodes of m ranks,
every rank sends n - 1 messages to other nodes instead of (n - 1) m; a row may travel once more inside its node.

Shape legend: as in transport.py; N ranks of this node, P destinations that this rank serves.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from swin_moe.parallel.exchange.transport import AllToAll, Counts, ExchangePlan, block_permutation, by_expert
from swin_moe.parallel.groups import Groups

# Renamed in torch 2.13; the old name warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class HierarchicalTransport:
    """See Transport. Rows lie by destination; then by (relay, destination); then by (destination, source) at the
    relay; then by source at the destination.
    """

    name = "hierarchical"

    def __init__(self, groups: Groups) -> None:
        topology, me = groups.topology, groups.expert_rank
        self.node_group, self.crossing_group = groups.node, groups.crossing
        self.node = topology.node(me)
        self.crossing = next(ranks for ranks in topology.crossings if me in ranks)
        assert (self.node_group is None) == (len(self.node) == 1) and self.crossing_group is not None
        self.me_in_node, self.me_in_crossing = self.node.index(me), self.crossing.index(me)
        self.served_by = [topology.served(rank) for rank in self.node]
        self.served = self.served_by[self.me_in_node]
        # For each rank of the crossing, whose rows it relays to me: those of its node, or nobody's.
        nodes = {rank: topology.node(rank) for rank in self.crossing}
        self.relays_from = [nodes[r] if topology.relay(nodes[r], me) == r else [] for r in self.crossing]
        self.sources = [source for sources in self.relays_from for source in sources]
        self.away = tuple(rank not in self.node for rank in self.crossing)
        assert sorted(self.sources) == list(range(len(topology.hosts)))

    @property
    def relayed_ranks(self) -> list[int]:
        """N: the ranks of this node tell each other what they send."""
        return self.node

    def relayed(self, send_CR: Tensor) -> Tensor:
        """See Transport: what every rank of the node sends, (N, C, R)."""
        gathered = send_CR.new_empty((len(self.node), *send_CR.shape))
        if self.node_group is None:
            return gathered.copy_(send_CR)
        _all_gather(gathered.view(-1), send_CR.contiguous().view(-1), group=self.node_group)
        return gathered

    def plan(self, send: list[int], arriving: Counts, relayed: Counts, device: torch.device) -> ExchangePlan:
        """See Transport."""
        to_node = [sum(send[d] for d in served) for served in self.served_by]
        from_node = [sum(rows[d] for d in self.served) for rows in relayed]
        inside = AllToAll(self.node_group, to_node, from_node, (False,) * len(self.node), self.me_in_node)

        collected = {d: sum(rows[d] for rows in relayed) for d in self.served}
        out = [collected.get(rank, 0) for rank in self.crossing]
        received = [sum(sum(arriving[s]) for s in sources) for sources in self.relays_from]
        between = AllToAll(self.crossing_group, out, received, self.away, self.me_in_crossing)

        by_relay = block_permutation(send, [d for served in self.served_by for d in served], device)
        num_sources, num_served = len(self.node), len(self.served)
        by_destination = block_permutation(
            [rows[d] for rows in relayed for d in self.served],
            [s * num_served + d for d in range(num_served) for s in range(num_sources)],
            device,
        )
        ended = block_permutation(*by_expert(arriving, self.sources), device)
        return ExchangePlan((inside, between), (by_relay, by_destination, ended))
