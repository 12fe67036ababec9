"""Takes what a rank writes, C libraries and children included: into a file of its own, and on to the launcher.

It runs in the reaper of the rank (failure/orphans.py), which nothing ends before the rank is gone. So what a rank wrote
before it was killed is in the file and on the screen. On the launcher's host it goes there by a socket; on others by
the output that mpirun forwards, as lines that can be put together again (lines.py). A screen that stands still stops
the rank once some MiB wait for it, as a full pipe would.
"""

import fcntl
import os
import select
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Protocol

from launcher.env import rank_of
from launcher.output import lines

CONSOLE = "LAUNCHER_CONSOLE"  # the socket of the launcher; unset or "" = nobody takes output
LOGS = "LAUNCHER_LOGS"  # the folder for one file a rank; "" = none
HEAD = struct.Struct("=BI")  # of a message to the launcher: stream, bytes
_READ = 65536
_WAITING = 2**20  # bytes for the screen beyond which no more are taken
_PIPEFULS = 32
_EMPTY_SECONDS = 1.0
_F_SETPIPE_SZ = 1031  # linux/fcntl.h


def file_of(folder: str, rank: str) -> Path:
    """Returns where the output of a rank is kept."""
    return Path(folder, f"rank-{rank:0>5}.log")


def write_lines_at_once() -> None:
    """Has this rank write every line as it is printed: what waits in a buffer is lost at a kill."""
    if os.environ.get(CONSOLE) and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)


class Pipes:
    """Two pipes that become standard output and error of this process and of the rank that it forks."""

    def __init__(self) -> None:
        self.read, self._write = zip(os.pipe(), os.pipe())

    def keep_reading(self) -> None:
        """Has this process, which takes what is written, hold no other end."""
        for descriptor in self._write:
            os.close(descriptor)

    def redirect(self) -> None:
        """Has this process, and what it forks, write into the pipes."""
        for descriptor, stream in zip(self._write, (1, 2)):
            os.dup2(descriptor, stream)
        for descriptor in (*self.read, *self._write):
            os.close(descriptor)


def wanted() -> Pipes | None:
    """Returns pipes where the launcher asks for output, else None."""
    return Pipes() if os.environ.get(CONSOLE) else None


class _Way(Protocol):
    """How bytes get to the launcher. Messages are sent whole or not at all, unless the launcher is gone."""

    descriptor: int  # -1 = it is gone

    def pack(self, stream: int, data: bytes) -> list[bytes]:
        """Returns messages."""

    def send(self, message: bytes) -> bytes:
        """Returns what is left of a message."""


class _Socket:
    """To the launcher on this host."""

    def __init__(self, path: str, head: bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._socket.sendall(b"%d %s\n" % (os.getpid(), head))
        self._socket.setblocking(False)
        self.descriptor = self._socket.fileno()

    def pack(self, stream: int, data: bytes) -> list[bytes]:
        return [HEAD.pack(stream, len(data)) + data]

    def send(self, message: bytes) -> bytes:
        return message[self._socket.send(message) :]


class _Forwarded:
    """Through the standard error of the process that mpirun started, which every MPI makes a pipe."""

    def __init__(self, descriptor: int, head: bytes) -> None:
        self.descriptor, self._head = descriptor, head
        try:  # then it holds whole frames only, and who reads it gets them whole
            fcntl.fcntl(descriptor, _F_SETPIPE_SZ, lines.FRAMES)
        except OSError:
            return

    def pack(self, stream: int, data: bytes) -> list[bytes]:
        return list(lines.frame(self._head, stream, data))

    def send(self, message: bytes) -> bytes:
        return message[os.write(self.descriptor, message) :]


class Pump:
    """Moves a rank's output."""

    def __init__(self, pipes: Pipes, inherited: int) -> None:
        """
        Args:
            inherited: The standard error that mpirun gave.
        """
        self._streams = dict(zip(pipes.read, (1, 2)))
        for descriptor in self._streams:
            os.set_blocking(descriptor, False)
        rank, host = rank_of(os.environ), socket.gethostname().partition(".")[0] or "?"
        head = f"{rank if rank.isdigit() else 0} {host}".encode()
        self._way: _Way
        try:
            self._way = _Socket(os.environ[CONSOLE], head)
        except OSError:  # another host
            self._way = _Forwarded(inherited, head)
        self._waiting: list[bytes] = []
        self._size = 0
        self._log = -1
        self._open(rank)

    @property
    def descriptors(self) -> list[int]:
        """Returns what must stay open."""
        return [number for number in (*self._streams, self._way.descriptor, self._log) if number >= 0]

    def work(self, until: int) -> None:
        """Moves until the descriptor `until` can be read."""
        while until not in self._turn([until], None):
            pass

    def empty(self) -> None:
        """Moves what was written so far, for a second at most."""
        self._take_all()
        deadline = time.monotonic() + _EMPTY_SECONDS
        while self._waiting and (left := deadline - time.monotonic()) > 0:
            self._turn([], left)

    def close(self, *inherited: int) -> None:
        """Closes what mpirun gave; what mpirun has not taken by then, for a second on end, is in the file alone."""
        if self._way.descriptor in inherited:
            self._take_all()
            self._send_all(_EMPTY_SECONDS)
            self._lose()
        for descriptor in inherited:
            os.close(descriptor)

    def finish(self, seconds: float) -> None:
        """Moves until nobody is left who could write, so long at most, and all is sent that was written before.

        That may take longer on a busy host: it ends when the launcher has taken nothing for so long.
        """
        self._take_all()
        deadline = time.monotonic() + seconds
        while self._streams and (left := deadline - time.monotonic()) > 0:
            self._turn([], left)
        self._streams.clear()
        self._send_all(seconds)

    def _take_all(self) -> None:
        """Takes what the pipes hold."""
        for descriptor in list(self._streams):
            for _ in range(_PIPEFULS):  # somebody may write without an end
                if descriptor not in self._streams or not self._take(descriptor):
                    break

    def _send_all(self, patience: float) -> None:
        """Sends what waits, unless nothing of it is taken for so many seconds on end."""
        poll = select.poll()
        if self._waiting:
            poll.register(self._way.descriptor, select.POLLOUT)
        while self._waiting and poll.poll(patience * 1000):
            self._send()

    def _turn(self, others: list[int], seconds: float | None) -> list[int]:
        """Moves what can be moved; returns what is ready of the others."""
        poll = select.poll()
        for descriptor in [*others, *(self._streams if self._size < _WAITING else ())]:
            poll.register(descriptor, select.POLLIN)
        if self._waiting:
            poll.register(self._way.descriptor, select.POLLOUT)
        ready = [number for number, _ in poll.poll(None if seconds is None else seconds * 1000)]
        if self._waiting and self._way.descriptor in ready:
            self._send()
        for descriptor in ready:
            if descriptor in self._streams:
                self._take(descriptor)
        return ready

    def _take(self, descriptor: int) -> bool:
        """Returns whether there was something, having kept it and packed it for the launcher."""
        try:
            data = os.read(descriptor, _READ)
        except BlockingIOError:
            return False
        if not data:
            del self._streams[descriptor]
            return False
        self._keep(data)
        self._pass_on(self._streams[descriptor], data)
        return True

    def _pass_on(self, stream: int, data: bytes) -> None:
        if self._way.descriptor >= 0:
            self._waiting += self._way.pack(stream, data)
            self._size += len(data)

    def _send(self) -> None:
        message = self._waiting[0]
        try:
            left = self._way.send(message)
        except BlockingIOError:
            return
        except OSError:
            self._lose()
            return
        self._waiting[:1] = [left] if left else []
        self._size = max(0, self._size - len(message) + len(left)) if self._waiting else 0

    def _lose(self) -> None:
        """Goes on without the launcher."""
        self._way.descriptor = -1
        self._waiting, self._size = [], 0

    def _open(self, rank: str) -> None:
        if not os.environ.get(LOGS):
            return
        path = file_of(os.environ[LOGS], rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            self._complain(path, error)

    def _keep(self, data: bytes) -> None:
        try:
            while data and self._log >= 0:
                data = data[os.write(self._log, data) :]
        except OSError as error:
            os.close(self._log)
            self._log = -1
            self._complain(file_of(os.environ[LOGS], rank_of(os.environ)), error)

    def _complain(self, path: Path, error: OSError) -> None:
        self._pass_on(2, f"launcher: {path} cannot be written: {error.strerror}; output is shown only\n".encode())
