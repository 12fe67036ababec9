"""What the rows of one layer travel through: a transport, a payload, counters; and its gradient.

An exchange of rows is two autograd nodes. `send_rows` starts the rows and returns an empty tensor that stands for them;
`receive_rows` waits. In backward, the node of receive_rows starts the gradient on its way back and that of send_rows
waits for it. Autograd runs nodes in the reverse order of their creation, so whatever was computed between the two in
forward has its backward computed while gradients travel, and the order of collectives is the same on all ranks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.config import MoEConfig
from swin_moe.moe.phases import PhaseClock
from swin_moe.parallel.exchange.payload import PAYLOADS, Codec, rounding_error
from swin_moe.parallel.exchange.transport import ExchangePlan, PendingRows, Transport, build_transport
from swin_moe.parallel.groups import Groups

EXPOSED = "exposed"  # the phase of a link's clock: waiting for rows, with nothing computed meanwhile


@dataclass
class Traffic:
    """What one rank sent for one layer since the numbers were last taken, forward and backward. Plain numbers."""

    sent_bytes: int = 0  # that left this rank; rows that are relayed count at both ranks
    crossing_bytes: int = 0  # that left this rank's node


class Link:
    """Carries rows of one layer, and their gradients.

    Args:
        payload: Key of PAYLOADS.
        overlap: Slices that a dispatcher sends rows in.
        reason: Why these three, where they are not what the config says.
    """

    def __init__(self, transport: Transport, payload: str, overlap: int = 1, reason: str = "") -> None:
        self.transport, self.payload, self.overlap, self.reason = transport, payload, overlap, reason
        self.traffic = Traffic()
        # While it is set, every wait for rows is stamped and the payload's error summed up (one more encoding).
        self.clock: PhaseClock | None = None
        # (2,) each: sums of squares of the rounding error and of the rows, since the numbers were last taken.
        self.rounding: dict[str, Tensor] = {}
        self._pending: list[tuple[PendingRows, Codec | None, torch.dtype]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Link":
        """Returns a link over the same ranks with counters of its own: process groups cannot be copied."""
        return Link(self.transport, self.payload, self.overlap, self.reason)

    def __str__(self) -> str:
        return f"{self.transport.name}, payload {self.payload}, overlap {self.overlap}"

    def send(self, rows: Tensor, plan: ExchangePlan, *, gradient: bool = False) -> tuple:
        """Returns what to give to `receive`, without waiting. Rows are received in the order in which they are sent."""
        codec = PAYLOADS[self.payload]
        codec = codec if codec is not None and codec.applies(rows) else None
        encoded = rows if codec is None else codec.encode(rows)
        if self.clock is not None and codec is not None:
            self._measure("gradients" if gradient else "rows", codec, rows)
        row_bytes = math.prod(encoded.shape[1:]) * encoded.element_size()
        self.traffic.sent_bytes += plan.sent_rows * row_bytes
        self.traffic.crossing_bytes += plan.crossing_rows * row_bytes
        with self._waiting():
            for pending, _, _ in self._pending:
                pending.advance()
        self._pending.append((PendingRows(encoded, plan), codec, rows.dtype))
        return self._pending[-1]

    def receive(self, sent: tuple) -> Tensor:
        """Returns the rows that arrived; those sent next go on meanwhile."""
        assert sent is self._pending[0], "rows are received in the order in which they are sent"
        with self._waiting():
            for pending, _, _ in self._pending[:2]:
                pending.advance()
            pending, codec, dtype = self._pending.pop(0)
            rows = pending.wait()
        return rows if codec is None else codec.decode(rows, dtype)

    def exchange(self, rows: Tensor, plan: ExchangePlan) -> Tensor:
        """Returns the rows that arrive, at once and without a gradient; for ids."""
        return self.receive(self.send(rows, plan))

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        if self.clock is not None:
            self.clock.end("")
        yield
        if self.clock is not None:
            self.clock.end(EXPOSED)

    @torch.no_grad()
    def _measure(self, what: str, codec: Codec, rows: Tensor) -> None:
        sums = rounding_error(codec, rows)
        self.rounding[what] = self.rounding[what] + sums if what in self.rounding else sums

    def take(self) -> tuple[Traffic, dict[str, Tensor]]:
        """Returns (traffic, rounding sums) since the last call, and starts again from zero."""
        taken = self.traffic, self.rounding
        self.traffic, self.rounding = Traffic(), {}
        return taken


def build_link(config: MoEConfig, groups: Groups) -> Link | None:
    """Returns what the rows of a layer travel through as the config says; None where all experts are here.

    Raises:
        ValueError: There is no such transport.
    """
    if groups.expert_size == 1:
        return None
    transport, reason = build_transport(config.transport, groups)
    return Link(transport, config.payload, config.overlap, reason)


class RowExchange:
    """One exchange of rows by a plan: what sending and receiving share, in forward and in backward."""

    def __init__(self, link: Link, plan: ExchangePlan) -> None:
        self.link, self.plan = link, plan
        self.rows: Any = None  # what Link.send returned
        self.gradient: Any = None


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.rows = exchange.link.send(rows, exchange.plan)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        exchange = ctx.exchange
        gradient, exchange.gradient = exchange.gradient, None
        return exchange.link.receive(gradient), None


class _ReceiveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        rows, exchange.rows = exchange.rows, None
        return exchange.link.receive(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        exchange = ctx.exchange
        exchange.gradient = exchange.link.send(grad, exchange.plan.reverse, gradient=True)
        return grad.new_empty(0), None


def send_rows(rows: Tensor, exchange: RowExchange) -> Tensor:
    """Returns an empty tensor that stands for the rows until `receive_rows`; they are under way."""
    return _SendRows.apply(rows, exchange)


def receive_rows(sent: Tensor, exchange: RowExchange) -> Tensor:
    """Returns the rows that arrived. Every rank runs forward and backward, also with 0 rows."""
    return _ReceiveRows.apply(sent, exchange)


def send_and_receive(rows: Tensor, link: Link, plan: ExchangePlan) -> Tensor:
    """Returns the rows that arrive by the plan, with a gradient."""
    exchange = RowExchange(link, plan)
    return receive_rows(send_rows(rows, exchange), exchange)
