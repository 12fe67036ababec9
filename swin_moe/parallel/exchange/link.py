"""What the rows of one layer travel through: a transport, a payload, counters; and its gradient.

A trip is two autograd nodes. `depart` starts the rows and returns an empty tensor that stands for them; `arrive`
waits. In backward, arrive's node starts the gradient on its way back and depart's node waits for it. Autograd runs
nodes in the reverse order of their creation, so whatever was computed between the two in forward has its backward
computed while gradients travel, and the order of collectives is the same on all ranks.
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
from swin_moe.parallel.exchange.transport import Flight, Route, Transport, build_transport
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
        overlap: Chunks that a dispatcher sends rows in.
        reason: Why these three, where they are not what the config says.
    """

    def __init__(self, transport: Transport, payload: str, overlap: int = 1, reason: str = "") -> None:
        self.transport, self.payload, self.overlap, self.reason = transport, payload, overlap, reason
        self.traffic = Traffic()
        # While it is set, every wait for rows is stamped and the payload's error summed up (one more encoding).
        self.clock: PhaseClock | None = None
        # (2,) each: sums of squares of the rounding error and of the rows, since the numbers were last taken.
        self.rounding: dict[str, Tensor] = {}
        self._flying: list[tuple[Flight, Codec | None, torch.dtype]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Link":
        """Returns a link over the same ranks with counters of its own: process groups cannot be copied."""
        return Link(self.transport, self.payload, self.overlap, self.reason)

    def __str__(self) -> str:
        return f"{self.transport.name}, payload {self.payload}, overlap {self.overlap}"

    def launch(self, rows: Tensor, route: Route, *, gradient: bool = False) -> tuple:
        """Returns the flight of these rows, to be given to `land`. Flights land in the order of their launches."""
        codec = PAYLOADS[self.payload]
        codec = codec if codec is not None and codec.applies(rows) else None
        encoded = rows if codec is None else codec.encode(rows)
        if self.clock is not None and codec is not None:
            self._measure("gradients" if gradient else "rows", codec, rows)
        row_bytes = math.prod(encoded.shape[1:]) * encoded.element_size()
        self.traffic.sent_bytes += route.sent_rows * row_bytes
        self.traffic.crossing_bytes += route.crossing_rows * row_bytes
        with self._waiting():
            for flight, _, _ in self._flying:
                flight.advance()
        self._flying.append((Flight(encoded, route), codec, rows.dtype))
        return self._flying[-1]

    def land(self, flying: tuple) -> Tensor:
        """Returns the rows that arrived; the flight behind this one goes on meanwhile."""
        assert flying is self._flying[0], "flights land in the order of their launches"
        with self._waiting():
            for flight, _, _ in self._flying[:2]:
                flight.advance()
            flight, codec, dtype = self._flying.pop(0)
            rows = flight.wait()
        return rows if codec is None else codec.decode(rows, dtype)

    def exchange(self, rows: Tensor, route: Route) -> Tensor:
        """Returns rows that travel at once and without a gradient, e.g. ids."""
        return self.land(self.launch(rows, route))

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


class Trip:
    """One journey of rows along a route; what depart and arrive share, in forward and in backward."""

    def __init__(self, link: Link, route: Route) -> None:
        self.link, self.route = link, route
        self.out: Any = None  # what Link.launch returned
        self.back: Any = None


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.out = trip.link.launch(rows, trip.route)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        trip = ctx.trip
        back, trip.back = trip.back, None
        return trip.link.land(back), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, departed: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        out, trip.out = trip.out, None
        return trip.link.land(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        trip = ctx.trip
        trip.back = trip.link.launch(grad, trip.route.reverse, gradient=True)
        return grad.new_empty(0), None


def depart(rows: Tensor, trip: Trip) -> Tensor:
    """Returns what `arrive` waits with; the rows are under way."""
    return _Depart.apply(rows, trip)


def arrive(departed: Tensor, trip: Trip) -> Tensor:
    """Returns the rows that arrived. Every rank runs forward and backward, also with 0 rows."""
    return _Arrive.apply(departed, trip)


def travel(rows: Tensor, link: Link, route: Route) -> Tensor:
    """Returns the rows at the end of the route, with a gradient."""
    trip = Trip(link, route)
    return arrive(depart(rows, trip), trip)
