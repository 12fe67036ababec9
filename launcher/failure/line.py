"""How ranks on other hosts reach the launcher, which see no folder of its: over TCP, a message a connection.

The guard of each rank holds a connection beside that, over which nothing is said after the greeting. The kernels of
both ends ask each other once in a while (TCP keepalive) and give it up where nothing answers, whatever the processes
there do meanwhile: so a host without power or network is found even if no process of the job ever hears of it.
"""

import json
import os
import socket
from typing import Any

WHERE = "LAUNCHER_LINE"  # "ADDRESS PORT" of the launcher; empty where it expects nobody
TOKEN = "LAUNCHER_JOB"  # by which a job's processes and messages are known
SECONDS = "LAUNCHER_LOST"  # after which a host that does not answer counts as lost
# The same where nobody said (--lost). Long, for the network of names may be down for a while and
# leave alone a job whose data take another one.
LOST_SECONDS = 120.0
_PROBES = 4
_ANSWER_SECONDS = 3.0  # to connect, and to be answered
_unreachable: list[bool] = []  # not empty: this process tried in vain, and shall not wait again


def say(kind: str, data: dict[str, Any]) -> bool:
    """Returns whether the launcher took a message; it may be on this host, too."""
    connection = _send(kind, data)
    if connection is None:
        return False
    with connection:
        try:
            return connection.recv(1) != b""  # so that nothing that is said later can be taken for earlier
        except OSError:
            return False


def hold(data: dict[str, Any], seconds: float) -> socket.socket | None:
    """Returns a connection that the launcher watches, and `is_held` asks about; None = there is none.

    Args:
        seconds: After which the launcher counts as lost.
    """
    connection = _send("hold", data)
    if connection is not None:
        keep_alive(connection, seconds)
        connection.setblocking(False)
    return connection


def is_held(connection: socket.socket) -> bool:
    """Returns whether the launcher is still there."""
    try:
        return connection.recv(16) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def keep_alive(connection: socket.socket, seconds: float) -> None:
    """Has the kernel give a connection up after so many seconds without an answer (tcp(7))."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        idle = max(1, int(seconds / 3))
        pause = max(1, int((seconds - idle) / _PROBES))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


def _send(kind: str, data: dict[str, Any]) -> socket.socket | None:
    address, _, port = os.environ.get(WHERE, "").partition(" ")
    if not port.isdigit() or _unreachable:
        return None
    try:
        connection = socket.create_connection((address, int(port)), timeout=_ANSWER_SECONDS)
        connection.sendall(
            json.dumps({"token": os.environ.get(TOKEN, ""), "kind": kind, "data": data}).encode() + b"\n"
        )
    except OSError:
        _unreachable.append(True)
        return None
    return connection
