"""Overlap: rows travel to the experts and back in chunks, and each is computed while others are under way.

Every expert's rows are cut into equally many runs, so a chunk holds a part of every expert's. All chunks set out for
the experts at once; each is computed as it arrives and sets out for home; at the end all are awaited. In backward the
same happens from the last chunk to the first (link.py).

Shape legend: N rows, D channels.
"""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from swin_moe.moe.dispatch import Dispatched, Plan
from swin_moe.ops.moe_permute import pick_rows
from swin_moe.parallel.exchange.link import Link, Trip, arrive, depart, travel
from swin_moe.parallel.exchange.transport import Route, block_order

Rows = TypeVar("Rows", int, Tensor)


def rows_in_chunk(rows: Rows, chunk: int, chunks: int) -> Rows:
    """Returns how many of an expert's rows are in this chunk; sender and receiver agree without asking."""
    return rows * (chunk + 1) // chunks - rows * chunk // chunks


def chunk_plan(plan: Plan, kept: list[int], chunks: int) -> Plan:
    """Returns the plan with its rows by (chunk, expert) instead of by expert. kept: Rows of every expert."""
    sizes = [rows_in_chunk(rows, chunk, chunks) for rows in kept for chunk in range(chunks)]
    wanted = [expert * chunks + chunk for chunk in range(chunks) for expert in range(len(kept))]
    order = block_order(sizes, wanted, plan.pair.device)
    if order is None:
        return plan
    vacant = None if plan.vacant is None else plan.vacant[order.index]
    return replace(plan, position=order.inverse[plan.position], pair=plan.pair[order.index], vacant=vacant)


class ChunkTravel:
    """See swin_moe/moe/dispatch.py:Chunks. One route per chunk."""

    def __init__(self, link: Link, routes: list[Route]) -> None:
        self.out = [Trip(link, route) for route in routes]
        self.home = [Trip(link, route.reverse) for route in routes]
        self.sizes = [sum(route.hops[0].send) for route in routes]

    def start(self, tokens: Tensor) -> list[Tensor]:
        """Returns what stands for every chunk of the rows (N, D), which lie by chunk and are under way."""
        return [depart(rows, trip) for rows, trip in zip(tokens.split(self.sizes), self.out)]

    def arrive(self, chunk: int, departed: Tensor) -> Tensor:
        """See Chunks."""
        return arrive(departed, self.out[chunk])

    def depart(self, chunk: int, y: Tensor) -> Tensor:
        """See Chunks."""
        return depart(y, self.home[chunk])

    def finish(self, departed: list[Tensor]) -> Tensor:
        """Returns (N, D), the experts' results of all chunks, once they are home."""
        return torch.cat([arrive(y, trip) for y, trip in zip(departed, self.home)])


def set_out(
    tokens: Tensor, pair: Tensor | None, plan: Plan, counts: list, routes: list[Route], link: Link
) -> Dispatched:
    """Returns the rows for this rank's experts, from the rows (N, D) that this rank has for all of them.

    Args:
        tokens: In the plan's order; by chunk where there are several.
        pair: See Dispatcher.
        counts: Per chunk, the rows of the local experts.
        routes: Per chunk.
    """
    if len(routes) == 1:
        (route,) = routes
        travelled = None if pair is None else link.exchange(pick_rows(pair.flatten(), plan.pair), route)
        return Dispatched(travel(tokens, link, route), counts[0], travelled, plan, route)
    chunks, by_chunk = ChunkTravel(link, routes), None
    if pair is not None:
        pairs = pick_rows(pair.flatten(), plan.pair).split(chunks.sizes)
        by_chunk = [link.exchange(part, route) for part, route in zip(pairs, routes)]
    return Dispatched(chunks.start(tokens), counts, by_chunk, plan, chunks=chunks)


def come_home(y: Any, dispatched: Dispatched, link: Link) -> Tensor:
    """Returns (N, D), the experts' results of the rows that set out, in the plan's order."""
    if dispatched.chunks is not None:
        return dispatched.chunks.finish(y)
    return travel(y, link, dispatched.exchange.reverse)
