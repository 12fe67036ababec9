"""Experts on other ranks with static shapes: equally many rows for every expert from every rank.

(E, C, D) on every rank becomes (E_local, S * C, D) at the owners, and the experts' products are batched ones. All that
is sent is known beforehand, but for C. Where a capacity is given and the ranks have equally many tokens, C is what each
of them computes; else they agree on the largest, for which the host waits, once a layer.

Shape legend: E experts, C rows of one expert from one rank, S ranks that send to this one, D channels.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_moe.moe.dispatch import VERBS, Dispatched, Dispatcher, PaddedDispatcher, Verbs, make_padded_order, padded_rows
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import Routing
from swin_moe.parallel.exchange.link import Link
from swin_moe.parallel.exchange.overlap import dispatch_rows, order_by_slice, return_rows, rows_in_slice
from swin_moe.parallel.exchange.owners import Owners
from swin_moe.parallel.exchange.transport import ExchangePlan, even_plan
from swin_moe.parallel.groups import Groups


def padded(groups: Groups, num_experts: int, link: Link | None) -> Dispatcher:
    """Returns the dispatcher that sends equally many rows to every expert."""
    return pad_with(VERBS, groups, num_experts, link)


def pad_with(verbs: Verbs, groups: Groups, num_experts: int, link: Link | None) -> Dispatcher:
    """Returns the dispatcher that pads and moves rows within a rank by these verbs; between ranks by the link."""
    return PaddedDispatcher(verbs) if link is None else PaddedAllToAll(verbs, groups, num_experts, link)


@contextmanager
def even_batches(model: nn.Module, even: bool) -> Iterator[None]:
    """Returns a context in which every rank runs the model on batches of one shape, if `even`; alike on all ranks."""
    modules = [module for module in model.modules() if isinstance(module, MoELayer)]
    padding = [layer.dispatcher for layer in modules if isinstance(layer.dispatcher, PaddedAllToAll)]
    for dispatcher in padding:
        dispatcher.even = even
    try:
        yield
    finally:
        for dispatcher in padding:
            dispatcher.even = False


class PaddedAllToAll:
    """Dispatcher over the expert group (see moe/dispatch.py).

    even: All ranks of the group have equally many tokens, in equal groups; see even_batches.
    """

    def __init__(self, verbs: Verbs, groups: Groups, num_experts: int, link: Link) -> None:
        self.verbs, self.groups, self.link = verbs, groups, link
        self.owners = Owners(groups.degrees, num_experts)
        self.even = False
        self._made: tuple[tuple, list[ExchangePlan]] | None = None  # the last plans and what for: C rarely changes

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See Dispatcher."""
        rows, overlap = self._rows(routing, x.device), self.link.overlap
        order = make_padded_order(routing, rows)
        if overlap > 1:
            order = order_by_slice(order, [rows] * self.owners.num_experts, overlap)
        parts = tuple(rows_in_slice(rows, number, overlap) for number in range(overlap))
        counts = [self.groups.degrees.expert * part for part in parts]
        return dispatch_rows(self.verbs.take(x, order), pair, order, counts, self._plans(parts, x.device), self.link)

    def combine(self, y: Tensor | list[Tensor], dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See Dispatcher."""
        return self.verbs.combine(return_rows(y, dispatched, self.link), gate, dispatched.order)

    def _rows(self, routing: Routing, device: torch.device) -> int:
        """Returns C, the rows of the rank that needs most."""
        if routing.capacity is None:
            most = routing.kept.sum(dim=0).amax() if len(routing.expert) else routing.kept.new_zeros(())
        elif self.even:
            return padded_rows(routing)
        else:  # filled where it is: a number copied to a device would be one more wait
            most = torch.full((), padded_rows(routing), dtype=torch.int64, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.groups.expert)
        return int(most)

    def _plans(self, parts: tuple[int, ...], device: torch.device) -> list[ExchangePlan]:
        """Returns the plan of each slice, of which every expert has so many rows from every rank."""
        transport, rank = self.link.transport, self.groups.expert_rank
        wanted = (transport, parts, device)
        if self._made is None or self._made[0] != wanted:
            self._made = wanted, [even_plan(transport, self.owners, rank, rows, device) for rows in parts]
        return self._made[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PaddedAllToAll":
        """Returns a dispatcher with a link of its own; plans hold process groups, which cannot be copied."""
        return PaddedAllToAll(self.verbs, self.groups, self.owners.num_experts, copy.deepcopy(self.link, memo))
