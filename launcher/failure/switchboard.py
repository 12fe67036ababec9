"""The launcher's end of the lines to ranks on other hosts: takes their word, and learns which hosts are gone.

A held line (line.py) that ends says that its guard did; one on which nothing answers, that its host is lost.
"""

import json
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.failure import reports
from launcher.failure.kinds import HOST
from launcher.failure.line import LOST_SECONDS, keep_alive
from launcher.failure.lookout import Verdict
from launcher.failure.reports import Failure, State

_MOST_BYTES = 1 << 20  # of a message; a traceback is the longest
_PAUSE = 0.5


@dataclass
class _Line:
    heard: bytes = b""
    holder: dict[str, Any] = field(default_factory=dict)  # rank, host and pid of the guard that holds it


class Switchboard:
    """Listens at one address of this host while the job runs; what ranks say goes into the folder of reports."""

    def __init__(self, place: Path, token: str, address: str, seconds: float = LOST_SECONDS) -> None:
        """Starts to listen.

        Args:
            place: The folder of reports.
            token: What a message of this job has.
            address: Of this host, that the others reach.
            seconds: After which a host that does not answer counts as lost.

        Raises:
            OSError: Nobody can listen there.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=1024)
        self.where = f"{address} {self._listener.getsockname()[1]}"
        self.lost: dict[str, Failure] = {}  # by host
        self.silent = False  # whether a guard ended before any rank told of a failure
        self._place, self._token, self._seconds = place, token, seconds
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="launcher-switchboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all lines."""
        self._closing = True
        self._thread.join(10 * _PAUSE)
        for key in list(self._selector.get_map().values()):
            self._close(key.fileobj)
        self._selector.close()

    def look(self) -> Verdict | None:
        """Returns why the job has to end where hosts are lost."""
        if not self.lost:
            return None
        names = ", ".join(sorted(self.lost))
        s, have = ("s", "have") if len(self.lost) > 1 else ("", "has")
        return Verdict(HOST, f"host{s} {names} {have} not answered for {self._seconds:g} s")

    def _work(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(_PAUSE):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj, key.data)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.settimeout(_PAUSE)  # nobody keeps the others waiting
        self._selector.register(connection, selectors.EVENT_READ, _Line())

    def _read(self, connection: Any, line: _Line) -> None:
        try:
            data = connection.recv(1 << 16)
        except OSError as error:
            if line.holder:
                self._lose(line.holder, error)
            self._close(connection)
            return
        if not data or len(line.heard) > _MOST_BYTES:
            if line.holder and not self.silent:
                self.silent = reports.first_failure(self._place) is None
            self._close(connection)
            return
        line.heard += data
        while b"\n" in line.heard:
            message, _, line.heard = line.heard.partition(b"\n")
            if not self._take(connection, line, message):
                self._close(connection)
                return

    def _take(self, connection: socket.socket, line: _Line, message: bytes) -> bool:
        """Returns whether a message is this job's, having acted on it."""
        try:
            said = json.loads(message)
            if said["token"] != self._token:
                return False
            kind, data = said["kind"], said["data"]
            if kind == "hold":
                line.holder = {name: data[name] for name in ("rank", "host", "pid")}
                keep_alive(connection, self._seconds)
            elif kind == "state":
                reports.keep(self._place, replace(State(**data), since=time.time()))  # clocks differ
            elif kind == "lost":
                reports.keep_lost(self._place, str(int(data["rank"])))
            elif kind == "failure":
                reports.keep(self._place, Failure(**data))
            connection.sendall(b"\n")
        except (KeyError, TypeError, ValueError, OSError):
            return False
        return True

    def _lose(self, holder: Mapping[str, Any], error: OSError) -> None:
        host = str(holder["host"])
        if isinstance(error, ConnectionResetError) or host in self.lost:
            return  # somebody answered: the process is gone, not the host
        words = f"host {host} has not answered for {self._seconds:g} s"
        self.lost[host] = Failure(str(holder["rank"]), HOST, words, "", host, int(holder["pid"]))
        reports.keep(self._place, self.lost[host])

    def _close(self, connection: Any) -> None:
        self._selector.unregister(connection)
        connection.close()
