"""Rows between ranks as they take memory, without ranks: a dispatcher under which every expert gets as many rows.

What parallel/exchange/ allocates on the way to the experts and back is allocated here, and nothing is sent.

Shape legend: N rows that a rank sends, A rows that arrive at its experts, D channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.config import MoEConfig
from swin_moe.layout import even_part
from swin_moe.moe.dispatch import Dispatched, combine_tokens, make_order, make_padded_order, take_tokens
from swin_moe.moe.routing import Routing
from swin_moe.parallel.exchange.payload import PAYLOADS
from swin_moe.parallel.sharding import Degrees


class EvenDispatcher:
    """See moe/dispatch.py:Dispatcher. Stands for native and padded dispatchers, local ones and those across ranks.

    Args:
        rows: A / N.
        in_one: As LocalDispatcher's, where this stands for one.
    """

    def __init__(self, config: MoEConfig, degrees: Degrees, rows: float, *, in_one: bool = False) -> None:
        self.config, self.degrees, self.rows = config, degrees, rows
        self.num_local = even_part(config.num_experts, degrees.expert, 0)[1]
        self.in_one = in_one and config.backend in ("native", "local") and not self._is_spread

    def dispatch(self, x: Tensor, routing: Routing, pair: Tensor | None) -> Dispatched:
        """See Dispatcher."""
        num_pairs, num_experts = routing.expert.numel(), self.config.num_experts
        counts: Any
        if self.config.backend in ("native", "local"):
            order = make_order(routing, num_pairs)
            arriving = round(num_pairs * self.rows) if self._is_spread else num_pairs
            counts = routing.kept.new_empty((self.num_local,))
        else:
            groups = routing.kept.shape[0]
            by_need = -(-num_pairs // (groups * num_experts))
            rows = min(groups * (by_need if routing.capacity is None else routing.capacity), routing.expert.shape[0])
            order = make_padded_order(routing, rows)
            counts = rows * self.degrees.expert
            arriving = counts * self.num_local
        tokens = take_tokens(x, order)
        pairs = None if pair is None else pair.flatten()[order.pair]
        if not self._is_spread:
            return Dispatched(tokens, counts, pairs, order)
        way = _Way(self.config.payload, arriving, permuted=self.num_local > 1)
        if pairs is not None:
            pairs = way.move(pairs, arriving, with_payload=False)
        return Dispatched(_Exchange.apply(tokens, way, arriving), counts, pairs, order, way)

    def combine(self, y: Any, dispatched: Dispatched, gate: Tensor) -> Tensor:
        """See Dispatcher."""
        if dispatched.exchange is not None:
            y = _Exchange.apply(y, dispatched.exchange, dispatched.order.num_rows)
        return combine_tokens(y, gate, dispatched.order)

    def gather_shards(self, shapes: dict[str, tuple[int, ...]]) -> Callable[[Tensor, str], Tensor]:
        """Returns what stands for parallel/exchange/all_to_all.py:ShardGather. shapes: Global, by parameter."""
        return lambda part, name: _GatherShards.apply(part, shapes[name][1], self.degrees.expert_shard)

    @property
    def _is_spread(self) -> bool:
        return self.degrees.expert * self.degrees.expert_shard > 1


class _Way:
    """An exchange plan: what it keeps until the backward is over, and what a passage allocates."""

    def __init__(self, payload: str, arriving: int, *, permuted: bool) -> None:
        self.codec = PAYLOADS[payload]
        self.index = [torch.empty(arriving, dtype=torch.int64) for _ in range(2)] if permuted else []

    def move(self, rows: Tensor, arriving: int, *, with_payload: bool = True) -> Tensor:
        """Returns as many rows as arrive."""
        codec = self.codec if with_payload and self.codec is not None and self.codec.applies(rows) else None
        rows, dtype = rows.contiguous(), rows.dtype
        encoded = rows if codec is None else codec.encode(rows)
        there = arriving == len(self.index[0]) if self.index else False
        if self.index and not there:
            encoded = encoded.index_select(0, self.index[0])  # from by expert to by rank, on the way back
        received = encoded.new_empty((arriving, *encoded.shape[1:]))
        if there:
            received = received.index_select(0, self.index[0])
        return received if codec is None else codec.decode(received, dtype)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way, arriving: int) -> Tensor:
        ctx.way, ctx.num_sent = way, len(rows)
        return way.move(rows, arriving)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.way.move(grad, ctx.num_sent), None, None


class _GatherShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, length: int, shards: int) -> Tensor:
        ctx.length, ctx.shards, ctx.part_shape = length, shards, part.shape
        gathered = part.new_empty((shards, *part.shape))
        return gathered.transpose(0, 1).flatten(1, 2)[:, :length].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        padded = -(-ctx.length // ctx.shards)
        missing = padded * ctx.shards - ctx.length
        if missing:
            grad = torch.cat([grad, grad.new_zeros((grad.shape[0], missing, *grad.shape[2:]))], dim=1)
        grad = grad.unflatten(1, (ctx.shards, padded)).transpose(0, 1).contiguous()
        mine = torch.empty_like(grad[0])
        return mine[:, : ctx.part_shape[1]], None, None
