"""A small process above every rank that outlives it and says how it died and what it was doing.

MPICH kills all other ranks within milliseconds after one ended, and names the wrong process; so the news has to come
from a process that MPI does not know of. The rank is a fork of its guard: what it notes lies in memory they share.
"""

import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from launcher import watch
from launcher.env import rank_of
from launcher.failure import memory, orphans, reports, stacks
from launcher.failure.kinds import MEMORY, STALL

STALL_SECONDS = "LAUNCHER_STALL"  # for how long a rank may be stopped
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_HEADER = struct.Struct("=?dH")  # the rank has ended by itself; time of the note; bytes of the note
_PAGE_BYTES = 1024
# A rank that is killed together with its job is not worth a word: its guard is killed within this time as well.
_TOGETHER_SECONDS = 0.3
_PATROL_SECONDS = 0.25

_page: mmap.mmap | None = None  # in a guarded rank, what it shares with its guard


def run(program: Callable[[], None]) -> None:
    """Runs `program` in a child; returns there when it has ended. The guard itself exits with the child's code."""
    global _page
    watch.die_with_parent(os.getppid())
    page, guard, killed = mmap.mmap(-1, _PAGE_BYTES), os.getpid(), memory.kills()
    pipe = orphans.start_reaper()
    child = os.fork()
    if child == 0:
        watch.die_with_parent(guard)
        if pipe is not None:
            os.close(pipe)
        _page = page
        reports.enter("starting")
        stacks.listen()
        program()
        return
    stalled = _Patrol(child, page)
    code, passed_on = _wait(child)
    if stalled.words:
        _end(STALL)
    if not _HEADER.unpack_from(page)[0] and -code not in passed_on:
        status = code if code > 0 else 128 - code if code else 1
        how = _how(code)
        if code == -signal.SIGKILL and memory.kills() > killed:
            status, how = MEMORY, "was killed by the kernel for lack of memory in its control group"
        _leave_word(status, f"{how}{_without_a_word(page)}", page, child)
        time.sleep(_TOGETHER_SECONDS)
        _say(f"rank {_rank()} {how}{_last_seen(page)}")
        _end(status)
    if code > 0:  # it said why, or all did
        reports.fail(reports.Failure("", code, note=_noted(page)[1]))
    os._exit(code if code >= 0 else 128 - code)


def report(code: int, words: str = "", *, culprit: int | None = None) -> None:
    """Leaves word of how this rank fails for the launcher: an MPI that kills the others reports the kill as often as
    what caused it.

    Args:
        culprit: The rank that fails, where that is another one: it stalls.
    """
    state = None
    if culprit is not None and (place := reports.folder()) is not None:
        state = reports.states(place).get(culprit)
    rank = _rank() if culprit is None else str(culprit)
    host = socket.gethostname() if culprit is None else state.host if state else "?"
    pid = os.getpid() if culprit is None else state.pid if state else 0
    reports.fail(reports.Failure(rank, code, words, _noted(_page)[1] if _page else "", host, pid))


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


class _Patrol:
    """Looks after a rank from a thread of its guard: whether its stacks are wanted, and whether it was stopped."""

    def __init__(self, child: int, page: mmap.mmap) -> None:
        self.words = ""  # why the rank was ended
        self._child, self._page = child, page
        self._limit = float(os.environ.get(STALL_SECONDS, "inf"))
        threading.Thread(target=self._work, name="launcher-patrol", daemon=True).start()

    def _work(self) -> None:
        asked, stopped = False, 0.0
        while True:
            time.sleep(_PATROL_SECONDS)
            if not asked and stacks.are_wanted():
                asked = True
                stacks.ask(self._child)
            # Counted, not timed: who stops all processes of a job stops this one, too.
            stopped = stopped + _PATROL_SECONDS if watch.is_stopped(self._child) else 0.0
            if stopped >= self._limit:
                self._end()
                return

    def _end(self) -> None:
        self.words = f"was stopped by a signal for {self._limit:g} s (--stall)"
        place = reports.folder()
        stacks.ask(self._child)
        where = stacks.describe(place, int(_rank())) if place is not None and _rank().isdigit() else ""
        _leave_word(STALL, f"{self.words}{f'; {where}' if where else ''}", self._page, self._child)
        _say(f"rank {_rank()} {self.words}{_last_seen(self._page)}{f'; {where}' if where else ''}")
        time.sleep(_TOGETHER_SECONDS)
        os.kill(self._child, signal.SIGKILL)


def _leave_word(code: int, words: str, page: mmap.mmap, child: int) -> None:
    reports.fail(reports.Failure(_rank(), code, words, _noted(page)[1], socket.gethostname(), child))


def _say(sentence: str) -> None:
    print(f"[rank {_rank()}] error: {sentence}", file=sys.stderr, flush=True)


def _end(code: int) -> None:
    time.sleep(_TOGETHER_SECONDS)  # hydra drops what it has not read when a process fails
    os._exit(code)


def _how(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    by_hand = " (kill -9, or the kernel for lack of memory)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{by_hand}"


def _noted(page: mmap.mmap) -> tuple[float, str]:
    """Returns (when, what) the rank noted last; "" = nothing."""
    _, noted, length = _HEADER.unpack_from(page)
    return noted, page[_HEADER.size : _HEADER.size + length].decode(errors="replace")


def _without_a_word(page: mmap.mmap) -> str:
    return "" if _noted(page)[1] else " without a word"


def _last_seen(page: mmap.mmap) -> str:
    noted, text = _noted(page)
    if not text:
        return " without a word"
    return f"; it was last seen in {text}, which it had begun {time.time() - _TOGETHER_SECONDS - noted:.1f} s before"


def _rank() -> str:
    return rank_of(os.environ)
