"""A small process above every rank that outlives it and says how it died and what it was doing.

MPICH kills all other ranks within milliseconds after one ended, and names the wrong process; so the news has to come
from a process that MPI does not know of. The rank is a fork of its guard: what it notes lies in memory they share.
"""

import contextlib
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from launcher import watch
from launcher.env import rank_of

REPORTS = "LAUNCHER_REPORTS"  # folder of the launcher's host, in which a rank that fails leaves its exit code
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_HEADER = struct.Struct("=?dH")  # the rank has ended by itself; time of the note; bytes of the note
_PAGE_BYTES = 1024
# A rank that is killed together with its job is not worth a word: its guard is killed within this time as well.
_TOGETHER_SECONDS = 0.3

_page: mmap.mmap | None = None  # in a guarded rank, what it shares with its guard


def run(program: Callable[[], None]) -> None:
    """Runs `program` in a child; returns there when it has ended. The guard itself exits with the child's code."""
    global _page
    watch.die_with_parent(os.getppid())
    page, guard = mmap.mmap(-1, _PAGE_BYTES), os.getpid()
    child = os.fork()
    if child == 0:
        watch.die_with_parent(guard)
        _page = page
        program()
        return
    code, passed_on = _wait(child)
    if not _HEADER.unpack_from(page)[0] and -code not in passed_on:
        report(code if code > 0 else 128 - code if code else 1)
        time.sleep(_TOGETHER_SECONDS)
        print(f"[rank {_rank()}] error: {_obituary(code, page)}", file=sys.stderr, flush=True)
        time.sleep(_TOGETHER_SECONDS)  # hydra drops what it has not read when a process fails
        code = code or 1
    os._exit(code if code >= 0 else 128 - code)


def report(code: int) -> None:
    """Leaves the exit code with which this rank fails for the launcher: an MPI that kills the others reports the kill
    as often as what caused it. Does nothing on other hosts than the launcher's."""
    folder = Path(os.environ.get(REPORTS, "/nowhere"))
    if folder.is_dir():
        with contextlib.suppress(OSError):  # a full disk: what the MPI says of the rank has to do
            (folder / f"{time.monotonic_ns():020d}-{_rank()}").write_text(str(code))


def first_report(folder: Path) -> tuple[str, int] | None:
    """Returns (rank, exit code) of the rank that failed first, or None where no rank left one."""
    reports = sorted(path for path in folder.iterdir() if path.stat().st_size)
    return (reports[0].name.partition("-")[2], int(reports[0].read_text())) if reports else None


def note(text: str) -> None:
    """Remembers what this rank is doing, for its guard; costs a microsecond. Does nothing in a rank without one."""
    if _page is not None:
        data = text.encode()[: _PAGE_BYTES - _HEADER.size]
        _page[_HEADER.size : _HEADER.size + len(data)] = data
        _HEADER.pack_into(_page, 0, False, time.time(), len(data))


def ended() -> None:
    """To be called by a rank that ends by itself, with an error or without: its guard then stays silent."""
    if _page is not None:
        _page[0] = 1


def _wait(child: int) -> tuple[int, set[int]]:
    """Returns (the child's exit code, -n for signal n; the signals that were passed on to it meanwhile).

    A rank that dies of a signal sent to its guard was ended by somebody who knows: it is no culprit.
    """
    passed_on: set[int] = set()

    def forward(number: int, frame: FrameType | None) -> None:
        passed_on.add(number)
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass

    for number in _FORWARDED:
        signal.signal(number, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), passed_on


def _obituary(code: int, page: mmap.mmap) -> str:
    _, noted, length = _HEADER.unpack_from(page)
    how = f"exited with code {code}"
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        how += " (kill -9, or the kernel for lack of memory)" if code == -signal.SIGKILL else ""
    if not length:
        return f"rank {_rank()} {how} without a word"
    text = page[_HEADER.size : _HEADER.size + length].decode(errors="replace")
    ago = time.time() - _TOGETHER_SECONDS - noted
    return f"rank {_rank()} {how}; it was last seen in {text}, which it had begun {ago:.1f} s before"


def _rank() -> str:
    return rank_of(os.environ)
