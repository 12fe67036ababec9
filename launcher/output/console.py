"""Shows what ranks and mpirun write, as whole lines that tell who wrote them, in the order in which they came.

One thread reads, another writes: a terminal that stands still keeps neither signals nor the end of the job waiting,
and the ranks only once some MiB have come together.
"""

import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launcher.output.lines import MARK, Lines, unframe
from launcher.output.pump import HEAD

_READ = 2**18
_MOST_WAITING = 2**24  # bytes
_LONGEST_PATH = 100  # of a socket: sun_path has 108 bytes
_LOOK_SECONDS = 1.0  # between looks at lines that do not end
_CLOSING_SECONDS = 0.02
_END_SECONDS = 5.0  # without a word of ranks whose job has ended


@dataclass(frozen=True)
class Show:
    """How lines are shown."""

    tag: str = "others"  # "all" = each tells the rank that wrote it, "others" = rank 0's do not
    hosts: bool = False  # whether the tag names the host, too
    raw: bool = False  # there is one rank, whose bytes are shown as they come


class Console:
    """The screen of a job: `start`, then `say` from anywhere, then `close`."""

    def __init__(self, show: Show) -> None:
        folder = tempfile.mkdtemp(prefix="launcher-")
        if len(folder) > _LONGEST_PATH - 2:
            os.rmdir(folder)
            folder = tempfile.mkdtemp(prefix="launcher-", dir="/tmp")
        self.folder, self._show = Path(folder), show
        self._screen = _Screen()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(self.path)
        self._listening.listen(1024)
        self.movers: set[int] = set()  # process ids of what moves output here, and ends by itself
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ, self._accept)
        self._wake, self._sleeping = os.pipe()[::-1]
        self._selector.register(self._sleeping, selectors.EVENT_READ, self._wake_up)
        self._lines: dict[tuple[str, int], Lines] = {}  # by who writes and stream
        self._sources = 0  # that can still write
        self._closing = False  # nothing but last words is awaited
        self._heard = 0.0  # time.monotonic() of the last of a rank of this host; what moves its output comes to an end
        self._reader = threading.Thread(target=self._read, name="launcher-console", daemon=True)

    @property
    def path(self) -> str:
        """Returns the socket for ranks of this host."""
        return str(self.folder / "console")

    def start(self, process: subprocess.Popen[bytes]) -> None:
        """Begins to show what `process`, started with pipes, and the ranks write."""
        for stream, pipe in ((1, process.stdout), (2, process.stderr)):
            assert pipe is not None
            self._add(pipe, _Mpirun(self, stream).take)
        self._reader.start()

    @staticmethod
    def print(text: str, stream: int) -> None:
        """Shows a line where there is no console."""
        print(text, file=sys.stderr if stream == 2 else sys.stdout, flush=True)

    def say(self, text: str, stream: int) -> None:
        """Shows a line of the launcher's own."""
        self._screen.put(stream, f"{text}\n".encode(errors="replace"), wait=False)

    def close(self) -> None:
        """Returns when all that was written is shown, or at a signal that the caller blocks, if the screen stands."""
        self._heard = time.monotonic()
        self._closing = True
        os.write(self._wake, b".")
        while self._reader.is_alive() or not self._screen.is_empty():
            if received := signal.sigtimedwait((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), 0.01):
                os.kill(os.getpid(), received.si_signo)  # the caller has to know of it
                break
        os.close(self._wake)
        shutil.rmtree(self.folder, ignore_errors=True)

    def heard(self) -> None:
        """Is told of each word of a rank of this host."""
        self._heard = time.monotonic()

    def take(self, who: str, rank: int, host: str, stream: int, data: bytes) -> None:
        """Shows what can be shown after these bytes of a rank; none of them: it has ended."""
        if self._show.raw and rank >= 0:
            self._screen.put(stream, data)
            return
        found = self._lines.get((who, stream))
        if found is None:
            found = self._lines[who, stream] = Lines(self._tag_of(rank, host))
        self._screen.put(stream, found.feed(data, time.monotonic()) if data else found.end())

    def _tag_of(self, rank: int, host: str) -> bytes:
        if rank < 0 or rank == 0 and self._show.tag == "others":
            return b""
        return f"[{rank} {host}] ".encode() if self._show.hosts else b"[%d] " % rank

    def _read(self) -> None:
        looked = time.monotonic()
        while True:
            closing = self._closing  # before the last look at what is there
            ready = self._selector.select(_CLOSING_SECONDS if closing else _LOOK_SECONDS)
            for key, _ in ready:
                key.data(key.fileobj)
            now = time.monotonic()
            if closing and not ready and (not self._sources or now >= self._heard + _END_SECONDS):
                break
            if now - looked >= _LOOK_SECONDS:
                looked = now
                for (_, stream), lines in self._lines.items():
                    self._screen.put(stream, lines.stale(now))
        for (_, stream), lines in self._lines.items():
            self._screen.put(stream, lines.end())
        self._listening.close()
        os.close(self._sleeping)

    def _add(self, source: IO[bytes] | socket.socket, take: Callable[[bytes], None]) -> None:
        self._sources += 1

        def read(fileobj: IO[bytes] | socket.socket) -> None:
            data = os.read(fileobj.fileno(), _READ)
            take(data)
            if not data:
                self._selector.unregister(fileobj)
                self._sources -= 1
                fileobj.close()

        self._selector.register(source, selectors.EVENT_READ, read)

    def _wake_up(self, sleeping: int) -> None:
        self._selector.unregister(sleeping)

    def _accept(self, listening: socket.socket) -> None:
        connection, _ = listening.accept()
        self._add(connection, _Rank(self).take)


class _Rank:
    """A rank of this host: a line that says who it is, then messages."""

    def __init__(self, console: Console) -> None:
        self._console, self._head = console, ""
        self._rank, self._host = 0, ""
        self._data = bytearray()

    def take(self, data: bytes) -> None:
        """Takes bytes of the socket; none: it was closed."""
        self._console.heard()
        if not data:
            for stream in (1, 2):
                self._console.take(self._head, self._rank, self._host, stream, b"")
            return
        self._data += data
        if not self._head:
            head, newline, rest = self._data.partition(b"\n")
            if not newline:
                return
            self._head, self._data = head.decode(errors="replace"), rest
            pid, rank, self._host = self._head.split()
            self._rank = int(rank)
            self._console.movers.add(int(pid))
        at = 0
        while at + HEAD.size <= len(self._data):
            stream, size = HEAD.unpack_from(self._data, at)
            if at + HEAD.size + size > len(self._data):
                break
            at += HEAD.size
            self._console.take(
                self._head, self._rank, self._host, stream, bytes(memoryview(self._data)[at : at + size])
            )
            at += size
        del self._data[:at]


class _Mpirun:
    """What mpirun writes: frames of ranks of other hosts, and its own words."""

    def __init__(self, console: Console, stream: int) -> None:
        self._console, self._stream = console, stream
        self._rest: list[bytes] = []  # of a line that has not ended: joined once, however many pieces it comes in

    def take(self, data: bytes) -> None:
        """Takes bytes of the pipe; none: it was closed."""
        *whole, rest = data.split(b"\n")
        for line in whole:
            self._take_line(b"".join([*self._rest, line, b"\n"]))
            self._rest = []
        if rest:
            self._rest.append(rest)
        if self._rest and not (data and self._rest[0].startswith(MARK)):  # what begins no frame need not be kept
            self._console.take("mpirun", -1, "", self._stream, b"".join(self._rest))
            self._rest = []

    def _take_line(self, line: bytes) -> None:
        found = unframe(line)
        if found is None:
            self._console.take("mpirun", -1, "", self._stream, line)
        else:
            rank, host, stream, text = found
            self._console.take(f"{rank} {host}", rank, host, stream, text)


class _Screen:
    """Standard output and error, written by a thread of their own."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._size = 0
        self._changed = threading.Condition()
        self._started = False
        self._gone: set[int] = set()

    def put(self, stream: int, data: bytes, *, wait: bool = True) -> None:
        """Has `data` written; waits while too much is waiting."""
        if not data:
            return
        with self._changed:
            while wait and self._size > _MOST_WAITING:
                self._changed.wait()
            self._waiting.append((stream, data))
            self._size += len(data)
            self._changed.notify_all()
            if not self._started:
                self._started = True
                threading.Thread(target=self._work, name="launcher-screen", daemon=True).start()

    def is_empty(self) -> bool:
        """Returns whether all is written."""
        return not self._size

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                stream, data = self._waiting.popleft()
            self._write(stream, data)
            with self._changed:
                self._size -= len(data)
                self._changed.notify_all()

    def _write(self, stream: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest and stream not in self._gone:
            try:
                rest = rest[os.write(stream, rest) :]
            except BlockingIOError:  # another process made the terminal so
                time.sleep(0.01)
            except OSError:  # nobody reads it any more; the job goes on, for its results and its files
                self._gone.add(stream)
