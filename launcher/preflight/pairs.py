"""Two ranks over TCP, as gloo's and NCCL's sockets: whether they connect, how soon and how fast bytes arrive.

Every rank listens on the chosen address; a thread for each connection reads what arrives and sends what is asked for.
"""

import errno
import hashlib
import socket
import statistics
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

CONNECT_SECONDS = 3.0
_ANSWER_SECONDS = 20.0  # the other side may wait for a core
_PINGS = 30
_SIZES = (1 << 16, 1 << 20, 1 << 23)
_REPEATS = 3
_LONGEST = 0.2  # seconds of one transfer; a larger size that would take longer is left out
_AT_A_TIME = 16
_ORDER = struct.Struct("!QQ")  # bytes to read, then bytes to send
_HELLO = struct.Struct("!16sI")
_CAUSES = {
    errno.ECONNREFUSED: "refused: nothing listens at that port, or a firewall rejects it",
    errno.EHOSTUNREACH: "no route to that host",
    errno.ENETUNREACH: "no route to that network",
    errno.ECONNRESET: "the connection was reset: by a firewall, or the rank ended",
    errno.EPIPE: "the connection was reset: by a firewall, or the rank ended",
    errno.EADDRNOTAVAIL: "the address of this side is not there any more",
    errno.EACCES: "forbidden by a firewall of this host",
    errno.EPERM: "forbidden by a firewall of this host",
    errno.EINVAL: "forbidden by a route of this host",
}


@dataclass(frozen=True)
class Target:
    """A rank's listener."""

    rank: int
    address: str
    port: int


class Listener:
    """Reads and acknowledges what other ranks send."""

    def __init__(self, address: str, token: str, rank: int) -> None:
        self._hello = _HELLO.pack(_digest(token), rank)
        self._digest = _digest(token)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="launcher-preflight", daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        # Without it the thread in accept() would keep the socket open.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        scratch = memoryview(bytearray(1 << 20))
        with connection:
            try:
                connection.settimeout(_ANSWER_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if _read(connection, len(self._digest)) != self._digest:
                    return
                connection.sendall(self._hello)
                while True:
                    coming, wanted = _ORDER.unpack(_read(connection, _ORDER.size))
                    _receive(connection, coming, scratch)
                    while wanted:
                        count = min(wanted, len(scratch))
                        connection.sendall(scratch[:count])
                        wanted -= count
            except OSError:  # the other side is done, or gone, which it notices itself
                return


def reach(targets: Sequence[Target], token: str, source: str) -> dict[int, str]:
    """Returns why each rank cannot be connected to, "" where it can; many are tried at a time.

    Args:
        source: Address of this rank, from which the others see it come.
    """
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        causes = pool.map(lambda target: _try(target, token, source), targets)
        return {target.rank: cause for target, cause in zip(targets, causes)}


def _try(target: Target, token: str, source: str) -> str:
    try:
        _connect(target, token, source).close()
        return ""
    except OSError as error:
        return cause_of(error)


def cause_of(error: OSError) -> str:
    """Returns the likely cause of a connection's failure."""
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_SECONDS:g} s: a firewall drops it, or nobody has that address"
    return _CAUSES.get(error.errno or 0, error.strerror or str(error))


def measure(target: Target, token: str, source: str) -> dict[str, Any]:
    """Returns {latency_s, there: [(bytes, seconds)], back: the same}, of one way each, or {cause} where it fails.

    A message and its answer take one way each, so half of an exchange of a byte is what to take off for the other way.
    """
    scratch = memoryview(bytearray(_SIZES[-1]))
    try:
        with _connect(target, token, source) as connection:
            half = statistics.median(_exchange(connection, 1, 1, scratch) for _ in range(_PINGS)) / 2
            found: dict[str, Any] = {"latency_s": half}
            for way in ("there", "back"):
                found[way] = []
                for size in _SIZES:
                    sizes = (size, 1) if way == "there" else (1, size)
                    taken = min(_exchange(connection, *sizes, scratch) for _ in range(_REPEATS))
                    found[way].append((size, max(taken - half, taken / 2)))
                    if taken * 8 > _LONGEST:
                        break
            return found
    except OSError as error:
        return {"cause": cause_of(error)}


def _exchange(connection: socket.socket, there: int, back: int, scratch: memoryview) -> float:
    began = time.perf_counter()
    connection.sendall(_ORDER.pack(there, back))
    connection.sendall(scratch[:there])
    _receive(connection, back, scratch)
    return time.perf_counter() - began


def _receive(connection: socket.socket, size: int, scratch: memoryview) -> None:
    while size:
        count = connection.recv_into(scratch[: min(size, len(scratch))])
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, "closed")
        size -= count


def _connect(target: Target, token: str, source: str) -> socket.socket:
    connection = socket.create_connection((target.address, target.port), CONNECT_SECONDS, (source, 0))
    try:
        connection.settimeout(_ANSWER_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(_digest(token))
        if _read(connection, _HELLO.size) != _HELLO.pack(_digest(token), target.rank):
            raise OSError(0, "something else answers at that address: two hosts have it, or a proxy is between")
    except BaseException:
        connection.close()
        raise
    return connection


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "closed")
        data += part
    return data


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()[:16]
