"""Gives orders to all ranks and hears their answers, over one TCP connection each: the checks must not stand on MPI,
which hangs where a link is broken, and a rank that never comes has to be named.

A message is a line of JSON. The hub says {hub} first, which a rank knows it by, the rank {hub, rank, facts}, then
{result} for each order; {clock} is answered with the hub's time at once.
"""

import hashlib
import json
import os
import queue
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from launcher.failure.kinds import HOST

_TICK_SECONDS = 0.2
_SEND_SECONDS = 10.0
_STRANGER_BYTES = 1 << 16  # of a first line
_CHUNK = 1 << 16
_OTHER_FILES = 256
_CLOCKS = 8
_FIND_SECONDS = 5.0
_PAUSE_SECONDS = 0.1


@dataclass
class _Line:
    """A connection."""

    socket: socket.socket
    rank: int | None = None  # None = it has not said
    received: bytearray = field(default_factory=bytearray)


class Hub:
    """The side of the orders; one thread uses it."""

    def __init__(self, addresses: Sequence[str], world: int, token: str, port: int = 0) -> None:
        """Listens on these addresses of this host. Raises OSError where it cannot.

        Args:
            port: 0 = a free one for each address.
        """
        self.world, self.lost = world, dict[int, str]()  # rank -> why it does not answer any more
        self._greeting, self._stop = _digest(token), threading.Event()
        self._lines: dict[int, _Line] = {}
        self._facts: dict[int, Any] = {}
        self._results: dict[int, Any] = {}
        self._waiting: set[int] = set()  # ranks that have not answered yet
        _allow_connections(world)
        self._selector = selectors.DefaultSelector()
        self._listeners = []
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, port), family=family, backlog=4096)
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, None)
            self._listeners.append(listener)

    @property
    def places(self) -> list[tuple[str, int]]:
        """Returns the addresses and ports to be found at."""
        return [listener.getsockname()[:2] for listener in self._listeners]

    def meet(self, seconds: float) -> dict[int, Any]:
        """Returns the facts of the ranks that came; those that did not within `seconds` of another are lost."""
        came, deadline = -1, 0.0
        while len(self._facts) < self.world and not self._stop.is_set():
            if len(self._facts) > came:
                came, deadline = len(self._facts), time.monotonic() + seconds
            if time.monotonic() > deadline:
                break
            self._look(_TICK_SECONDS)
        for rank in range(self.world):
            if rank not in self._facts:
                self.lost.setdefault(
                    rank, "did not start" if came <= 0 else "did not start, or does not find the others"
                )
        return dict(self._facts)

    def order(self, orders: Mapping[int, Any], seconds: float) -> dict[int, Any]:
        """Returns what the ranks answer to their orders, less those that are lost, now or before."""
        self._results = {}
        self._waiting = {rank for rank in orders if rank not in self.lost}
        for rank in tuple(self._waiting):
            self._send(rank, orders[rank])
        deadline = time.monotonic() + seconds
        while self._waiting and not self._stop.is_set() and time.monotonic() < deadline:
            self._look(_TICK_SECONDS)
        for rank in self._waiting:
            self.lost.setdefault(rank, f"did not answer within {seconds:g} s")
        return self._results

    def dismiss(self, last: Any) -> None:
        """Sends a last order, that nobody answers."""
        for rank in self._lines:
            self._send(rank, last)  # to those that are lost, too: they may hang in a check, and end then

    def close(self) -> None:
        """Hangs up."""
        for listener in self._listeners:
            listener.close()
        for line in self._lines.values():
            line.socket.close()
        self._selector.close()

    def stop(self) -> None:
        """Has whoever waits in `meet` or `order` return; for another thread, when no rank is left."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Returns whether somebody called `stop`."""
        return self._stop.is_set()

    def _look(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._accept(key.fileobj)  # type: ignore[arg-type]
            else:
                self._receive(key.data)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            connection.sendall(json.dumps({"hub": self._greeting}).encode() + b"\n")
        except OSError:
            return
        self._selector.register(connection, selectors.EVENT_READ, _Line(connection))

    def _receive(self, line: _Line) -> None:
        try:
            data = line.socket.recv(_CHUNK)
        except OSError:
            data = b""
        line.received += data
        *complete, rest = line.received.split(b"\n")
        line.received = rest
        fine = bool(data) and (line.rank is not None or len(rest) < _STRANGER_BYTES)
        for text in complete:
            fine = fine and self._hear(line, bytes(text))
        if not fine:
            self._drop(line)

    def _hear(self, line: _Line, text: bytes) -> bool:
        """Returns whether a line is one of ours."""
        try:
            message = json.loads(text)
            if line.rank is None:
                rank = message["rank"]
                if message["hub"] != self._greeting or rank not in range(self.world) or rank in self._facts:
                    return False
                line.rank, self._facts[rank], self._lines[rank] = rank, message["facts"], line
            elif "clock" in message:
                self._send(line.rank, {"clock": time.time()})
            else:
                result = message["result"]
                if line.rank in self._waiting:
                    self._waiting.remove(line.rank)
                    self._results[line.rank] = result
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _send(self, rank: int, message: Any) -> None:
        try:
            self._lines[rank].socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._drop(self._lines[rank])

    def _drop(self, line: _Line) -> None:
        try:
            self._selector.unregister(line.socket)
        except (KeyError, ValueError):  # it was dropped before
            return
        line.socket.close()
        if line.rank is not None:
            self._waiting.discard(line.rank)
            self.lost.setdefault(line.rank, "ended, or its connection was cut")


class Member:
    """A rank's side. A thread hears the orders, so that a rank that hangs in a check still ends with the others."""

    def __init__(self, places: Sequence[tuple[str, int]], token: str, rank: int, facts: Any, *, seconds: float) -> None:
        """Finds the hub. Raises OSError where none of its places answers in time."""
        self.rank, self.token = rank, token
        self._socket, self._lines = _find(places, _digest(token), seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._heard: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._busy = False
        self._say({"hub": _digest(token), "rank": rank, "facts": facts})
        threading.Thread(target=self._listen, name="launcher-preflight-orders", daemon=True).start()

    def serve(self, act: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Returns the last order (`do` is "end"), having answered all before by what `act` returns.

        Raises:
            OSError: The hub is gone.
        """
        while (order := self._hear())["do"] != "end":
            self._busy = True
            result = act(order)
            self._busy = False
            self._say({"result": result})
        return order

    def clock(self) -> tuple[float, float]:
        """Returns (seconds by which this host's clock is ahead of the hub's, seconds that figure may be off).

        The hub answers at once, so its time was read halfway, give or take half of the exchange; the shortest counts.
        """
        best = (0.0, float("inf"))
        for _ in range(_CLOCKS):
            began, before = time.perf_counter(), time.time()
            self._say({"clock": True})
            theirs = self._hear()["clock"]
            half = (time.perf_counter() - began) / 2
            best = min(best, (before + half - theirs, half), key=lambda found: found[1])
        return best

    def _listen(self) -> None:
        while True:
            try:
                order = json.loads(self._lines.readline() or "null")
            except (OSError, ValueError):
                order = None
            if self._busy and (order is None or order.get("do") == "end"):
                os._exit(HOST)
            self._heard.put(order)
            if order is None or order.get("do") == "end":
                return

    def _hear(self) -> dict[str, Any]:
        message = self._heard.get()
        if message is None:
            raise ConnectionError("whoever gives the orders is gone")
        return message

    def _say(self, message: Any) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")


def _find(places: Sequence[tuple[str, int]], greeting: str, seconds: float) -> tuple[socket.socket, TextIO]:
    deadline, last = time.monotonic() + seconds, OSError("it has no address")
    while True:
        for place in places:
            try:
                found = socket.create_connection(place, _FIND_SECONDS)
                lines = found.makefile("r")
                if json.loads(lines.readline() or "null") == {"hub": greeting}:
                    found.settimeout(None)
                    return found, lines
                last = OSError(f"something else answers at {place[0]} port {place[1]}")
            except (OSError, ValueError) as error:
                last = error if isinstance(error, OSError) else OSError(str(error))
        if time.monotonic() > deadline:
            raise last
        time.sleep(_PAUSE_SECONDS)


def _allow_connections(count: int) -> None:
    """Raises this process's limit of open files to what so many ranks need, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
