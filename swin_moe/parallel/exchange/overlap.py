"""Overlap: rows travel to the experts and back in slices, and each is computed while others are under way.

Every expert's rows are cut into equally many runs, so a slice holds some of every expert's. All slices are sent to the
experts at once; each is computed as it arrives and sent back; at the end all are awaited. In backward the same happens
from the last slice to the first (link.py).

Shape legend: N rows, D channels.
"""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from swin_moe.moe.dispatch import Dispatched, RowOrder
from swin_moe.ops.moe.moe_permute import pick_rows
from swin_moe.parallel.exchange.link import Link, RowExchange, receive_rows, send_and_receive, send_rows
from swin_moe.parallel.exchange.transport import ExchangePlan, block_permutation

Rows = TypeVar("Rows", int, Tensor)


def rows_in_slice(rows: Rows, number: int, slices: int) -> Rows:
    """Returns how many of an expert's rows are in a slice; sender and receiver agree without asking."""
    return rows * (number + 1) // slices - rows * number // slices


def order_by_slice(order: RowOrder, kept: list[int], slices: int) -> RowOrder:
    """Returns the rows' order by (slice, expert) instead of by expert. kept: Rows of every expert."""
    sizes = [rows_in_slice(rows, number, slices) for rows in kept for number in range(slices)]
    wanted = [expert * slices + number for number in range(slices) for expert in range(len(kept))]
    permutation = block_permutation(sizes, wanted, order.pair.device)
    if permutation is None:
        return order
    index, inverse = permutation.index, permutation.inverse
    vacant = None if order.vacant is None else order.vacant[index]
    return replace(order, position=inverse[order.position], pair=order.pair[index], vacant=vacant)


class SlicedExchange:
    """See swin_moe/moe/dispatch.py:Slices. One plan per slice."""

    def __init__(self, link: Link, plans: list[ExchangePlan]) -> None:
        self.out = [RowExchange(link, plan) for plan in plans]
        self.back = [RowExchange(link, plan.reverse) for plan in plans]
        self.sizes = [sum(plan.calls[0].send) for plan in plans]

    def start(self, tokens: Tensor) -> list[Tensor]:
        """Returns what stands for every slice of the rows (N, D), which lie by slice and are under way."""
        return [send_rows(rows, exchange) for rows, exchange in zip(tokens.split(self.sizes), self.out)]

    def receive(self, number: int, sent: Tensor) -> Tensor:
        """See Slices."""
        return receive_rows(sent, self.out[number])

    def send(self, number: int, y: Tensor) -> Tensor:
        """See Slices."""
        return send_rows(y, self.back[number])

    def finish(self, sent: list[Tensor]) -> Tensor:
        """See Slices."""
        return torch.cat([receive_rows(y, exchange) for y, exchange in zip(sent, self.back)])


def dispatch_rows(
    tokens: Tensor, pair: Tensor | None, order: RowOrder, counts: list, plans: list[ExchangePlan], link: Link
) -> Dispatched:
    """Returns the rows for this rank's experts, from the rows (N, D) that this rank has for all of them.

    Args:
        tokens: In their order for experts; by slice where there are several.
        pair: See Dispatcher.
        counts: Per slice, the rows of the local experts.
        plans: Per slice.
    """
    if len(plans) == 1:
        (plan,) = plans
        arrived = None if pair is None else link.exchange(pick_rows(pair.flatten(), order.pair), plan)
        return Dispatched(send_and_receive(tokens, link, plan), counts[0], arrived, order, plan)
    slices, by_slice = SlicedExchange(link, plans), None
    if pair is not None:
        pairs = pick_rows(pair.flatten(), order.pair).split(slices.sizes)
        by_slice = [link.exchange(rows, plan) for rows, plan in zip(pairs, plans)]
    return Dispatched(slices.start(tokens), counts, by_slice, order, slices=slices)


def return_rows(y: Any, dispatched: Dispatched, link: Link) -> Tensor:
    """Returns (N, D), the experts' results of the rows that were dispatched, in their order for experts."""
    if dispatched.slices is not None:
        return dispatched.slices.finish(y)
    return send_and_receive(y, link, dispatched.exchange.reverse)
