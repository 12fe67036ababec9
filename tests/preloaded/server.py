"""Forks itself for each process of tests that asks for it: `python -m tests.preloaded.server SOCKET`.

It ends, and with it every fork, when its standard input does.
"""

import fcntl
import gc
import importlib
import io
import marshal
import os
import resource
import runpy
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

_PROGRAMS = ("launcher.rank", "tests.ranks", "swin_moe.train")  # what most of them run; what it imports stays
# What reduces gradients, recomputes or compiles loads the others: 2 seconds of a rank, DeepSpeed's imports among them.
_MODULES = (*_PROGRAMS, "torch.distributed", "torch._dynamo", "torch._inductor.compile_fx")
# Read when a library is loaded: a process in whose environment one of them differs runs by itself.
_READ_ONCE = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH_", "PYTORCH_"),
    *("LD_", "MALLOC_", "GLIBC_", "LANG", "LC_", "PYTHON", "SWIN_MOE_"),
)
_READ_AGAIN = ("PYTHONPATH", "PYTHONUNBUFFERED")
_MOST_FILES = 253  # that Linux lets one message carry


class Request(NamedTuple):
    """What a process hands over; client/sitecustomize.py packs it."""

    words: list[str]  # the module and its arguments
    environ: dict[str, str]
    folder: str
    files: list[int]  # its open files, as it numbers them
    ignored: list[int]  # signals
    limits: list[tuple[int, tuple[int, int]]]
    umask: int

    def is_served(self) -> bool:
        """Returns whether a fork of this process is what the process would be."""
        return _read_once(dict(os.environ)) == _read_once(self.environ)

    def run(self) -> None:
        """Runs the module in this process as `python -m` would."""
        os.environ.clear()
        os.environ.update(self.environ)
        os.chdir(self.folder)
        os.umask(self.umask)
        # This server may be the child of a shell in the background, or of nohup.
        if signal.SIGINT not in self.ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.SIGHUP not in self.ignored:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for number in self.ignored:
            signal.signal(number, signal.SIG_IGN)
        for kind, limits in self.limits:
            resource.setrlimit(kind, limits)
        sys.path[:1] = [self.folder, *filter(None, self.environ.get("PYTHONPATH", "").split(os.pathsep))]
        runpy.run_module(self.words[0], run_name="__main__", alter_sys=True)


class Server:
    """Waits for processes, and for the ends of forks."""

    def __init__(self, address: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._events = selectors.DefaultSelector()
        self._events.register(self._listener, selectors.EVENT_READ, self._accept)
        self._forks: dict[int, socket.socket] = {}  # by process: who waits for it

    def serve(self) -> Request | None:
        """Returns, in a fork, what it is to run; in the server None, once its input has ended."""
        self._events.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in self._events.select():
                if key.fileobj == 0:
                    for pid in self._forks:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    return None
                handle: Callable[[], Request | None] = key.data
                request = handle()
                if request is not None:
                    return request

    def _accept(self) -> Request | None:
        client = self._listener.accept()[0]
        size, received = socket.recv_fds(client, 8, _MOST_FILES)[:2]
        try:
            request = Request(*marshal.loads(client.recv(struct.unpack("=q", size)[0], socket.MSG_WAITALL)))
            pid = os.fork() if request.is_served() else None
        except (ConnectionError, EOFError, struct.error):  # it was killed meanwhile
            request, pid = None, None
        if request is not None and pid == 0:
            self._leave(client)
            _take_files(received, request.files)
            _open_streams("PYTHONUNBUFFERED" in request.environ)
            return request
        for file in received:
            os.close(file)
        if pid is None:
            _tell(client, b"n")
            client.close()
            return None
        _tell(client, b"y")
        self._forks[pid] = client
        ended = os.pidfd_open(pid)
        self._events.register(client, selectors.EVENT_READ, lambda: self._hear(client, pid))
        self._events.register(ended, selectors.EVENT_READ, lambda: self._end(client, pid, ended))
        return None

    def _leave(self, client: socket.socket) -> None:
        """Closes in a fork what is the server's."""
        self._events.close()
        for place in (self._listener, client, *self._forks.values()):
            place.close()

    def _hear(self, client: socket.socket, pid: int) -> None:
        if pid not in self._forks:  # its end was told at the same time
            return
        try:
            numbers = client.recv(16)
        except ConnectionError:
            numbers = b""
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)  # it is there, if only to be waited for
        if not numbers:
            self._events.unregister(client)

    def _end(self, client: socket.socket, pid: int, ended: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._events.unregister(ended)
        os.close(ended)
        if client in self._events.get_map():
            self._events.unregister(client)
        del self._forks[pid]
        _tell(client, struct.pack("=i", code))
        client.close()


def _tell(client: socket.socket, word: bytes) -> None:
    try:
        client.sendall(word)
    except OSError:
        return  # it was killed; so is its fork


def _read_once(environ: dict[str, str]) -> dict[str, str]:
    return {n: v for n, v in environ.items() if n.startswith(_READ_ONCE) and n not in _READ_AGAIN}


def _take_files(received: list[int], numbers: list[int]) -> None:
    """Has this process no open files but the received ones, under the numbers they had in the other process."""
    above = 1 + max([2, *numbers, *received])
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in received]
    os.closerange(0, above)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)


def _open_streams(unbuffered: bool) -> None:
    """Has print write where standard output is now, as in an interpreter that was just started."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            raw = open(number, "wb" if number else "rb", buffering=0, closefd=False)
        except OSError:  # it was closed
            stream: io.TextIOWrapper | None = None
        else:
            lines = number == 2 or raw.isatty()
            binary = raw if unbuffered and number else (io.BufferedWriter if number else io.BufferedReader)(raw)
            errors = "backslashreplace" if number == 2 else "strict"
            stream = io.TextIOWrapper(
                binary, errors=errors, line_buffering=lines, write_through=unbuffered and number > 0
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def main() -> None:
    """Serves; and runs, in a fork, what it was asked for."""
    server = Server(sys.argv[1])
    for name in _MODULES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would wait for threads that it does not have"
    for name in _PROGRAMS:  # what is run as __main__ is not imported under its own name
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    request = server.serve()
    if request is not None:
        sys.argv = request.words
        request.run()


if __name__ == "__main__":
    main()
