"""A small process above every rank that outlives it and says how it died and what it was doing.

MPICH kills all other ranks within milliseconds after one ended, and names the wrong process; so the news has to come
from a process that MPI does not know of. The rank is a fork of its guard: what it notes lies in memory they share.
"""

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from types import FrameType

from launcher import watch
from launcher.env import rank_of, world_size_of_mpi
from launcher.failure import line, memory, orphans, reports, stacks
from launcher.failure.kinds import HOST, MEMORY, STALL
from launcher.failure.page import Page
from launcher.job.environment import take_back
from launcher.machine import shared_memory

STALL_SECONDS = "LAUNCHER_STALL"  # for how long a rank may be stopped
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# A rank that is killed together with its job is not worth a word: its guard is killed within this time as well.
_TOGETHER_SECONDS = 0.3
_PATROL_SECONDS = 0.25
_MANY_RANKS = 1000  # so many look into a folder that hosts share every so often; more look less often
_ABORT_SECONDS = 10.0  # by then the process that takes the order has killed this one
_WORD_SECONDS = 10.0  # more than stacks take

_page: Page | None = None  # in a guarded rank, what it shares with its guard


def run(program: Callable[[], None]) -> None:
    """Runs `program` in a child; returns there when it has ended. The guard itself exits with the child's code."""
    global _page
    watch.die_with_parent(os.getppid())
    take_back(os.environ)
    page, guard, killed = Page(), os.getpid(), memory.kills()
    pipe = orphans.start_reaper(page)
    child = os.fork()
    if child == 0:
        watch.die_with_parent(guard)
        _take_signals()
        if pipe is not None:
            os.close(pipe)
        _page = page
        reports.enter("starting")
        stacks.listen()
        program()
        return
    patrol = _Patrol(child, page)
    code, passed_on = _wait(child)
    if patrol.words:  # the rank went on to write its stacks, and ended meanwhile
        patrol.wait()
        _end(STALL, page)
    if patrol.is_over:
        page.judge()
        os._exit(128 + signal.SIGKILL)
    if patrol.is_alone:
        _end(HOST, page)
    asked = _was_asked(-code, passed_on)
    if not page.ends and not asked:
        status = code if code > 0 else 128 - code if code else 1
        how = _how(code)
        if code == -signal.SIGKILL and memory.kills() > killed:
            status, how = MEMORY, "was killed by the kernel for lack of memory in its control group"
        _leave_word(status, f"{how}{_without_a_word(page)}", page, child)
        time.sleep(_TOGETHER_SECONDS)
        _say(f"rank {_rank()} {how}{_last_seen(page)}")
        _end(status, page)
    if asked:  # it had no handler: the others cannot save without it
        reports.lose(_rank())
    if code > 0:  # it said why, or all did
        reports.fail(reports.Failure("", code, note=page.noted[1]))
    page.judge()
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
    reports.fail(reports.Failure(rank, code, words, _page.noted[1] if _page else "", host, pid))


def note(text: str) -> None:
    """Remembers what this rank is doing, for its guard; costs a microsecond. Does nothing in a rank without one."""
    if _page is not None:
        _page.note(text)


def ended() -> None:
    """To be called by a rank that ends by itself, with an error or without: its guard then stays silent."""
    if _page is not None:
        _page.end()


def leaves_shared_memory() -> None:
    """To be called by a rank that has just made shared memory: if it is killed, that is removed.

    By its reaper, or, where Slurm killed that as well, by the launcher of this host.
    """
    if _page is not None:
        names = shared_memory.held()
        _page.leave(names)
        reports.hold(names)


def _take_signals() -> None:
    """Has requests to save end a rank that has no handler for them; Slurm starts its tasks with SIGUSR1 ignored."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)


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


def _was_asked(number: int, passed_on: Collection[int]) -> bool:
    """Returns whether the signal that ended a rank was a request to save: to Slurm a task is all of its processes, and
    the rank may have had the signal, and be dead, before its guard has it or is told."""
    deadline = time.monotonic() + _TOGETHER_SECONDS
    while number in _FORWARDED and number not in passed_on and time.monotonic() < deadline:
        if number in (signal.SIGTERM, signal.SIGUSR1) and reports.asked():  # what starters pass on of any request
            return True
        time.sleep(0.02)
    return number in passed_on


def folder_rounds(environ: Mapping[str, str]) -> int:
    """Returns at every which round a patrol looks into the folder of reports: a file system that hosts share gets no
    more requests from many ranks than from _MANY_RANKS."""
    try:
        return max(1, world_size_of_mpi(environ) // _MANY_RANKS)
    except ValueError:
        return 1


class _Patrol:
    """Looks after a rank from a thread of its guard: whether its stacks are wanted, and whether it was stopped."""

    def __init__(self, child: int, page: Page) -> None:
        self.words, self.is_over = "", False  # why the rank is ended; whether the launcher ends all
        self.is_alone = False  # the launcher, or the way to it, is gone; mpirun may never hear of that
        self._child, self._page = child, page
        self._line: socket.socket | None = None  # held while this process lives
        self._limit = float(os.environ.get(STALL_SECONDS, "inf"))
        self._thread = threading.Thread(target=self._work, name="launcher-patrol", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when it has left word of why the rank is ended, where it is about to."""
        self._thread.join(_WORD_SECONDS)

    def _work(self) -> None:
        limit = float(os.environ.get(line.SECONDS, line.LOST_SECONDS))
        self._line = line.hold({"rank": _rank(), "host": socket.gethostname(), "pid": self._child}, limit)
        asked, stopped, rounds = False, 0.0, itertools.count(1)
        rest = folder_rounds(os.environ)
        while True:
            time.sleep(_PATROL_SECONDS)
            if next(rounds) % rest == 0:
                if not asked and stacks.are_wanted():
                    asked = True
                    stacks.ask(self._child)
                if reports.is_over():
                    self.is_over = True
                    self._send(signal.SIGKILL)
                    return
            if self._line is not None and not line.is_held(self._line):
                self.is_alone = True
                self._send(signal.SIGKILL)
                return
            # Counted, not timed: who stops all processes of a job stops this one, too.
            stopped = stopped + _PATROL_SECONDS if watch.is_stopped(self._child) else 0.0
            if stopped >= self._limit:
                self._end()
                return

    def _end(self) -> None:
        self.words = f"was stopped by a signal for {self._limit:g} s (--stall)"
        place, now = reports.folder(), time.time_ns()
        # Before the rank goes on for a moment, to write its stacks: others may fail of that.
        _leave_word(STALL, self.words, self._page, self._child, now)
        stacks.ask(self._child)
        if place is not None:
            stacks.wait_for(place, _rank())
        self._send(signal.SIGSTOP)  # it is not to go on
        where = stacks.describe(place, int(_rank())) if place is not None and _rank().isdigit() else ""
        _leave_word(STALL, f"{self.words}{f'; {where}' if where else ''}", self._page, self._child, now)
        _say(f"rank {_rank()} {self.words}{_last_seen(self._page)}{f'; {where}' if where else ''}")
        time.sleep(_TOGETHER_SECONDS)
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        try:
            os.kill(self._child, number)
        except ProcessLookupError:
            return


def _leave_word(code: int, words: str, page: Page, child: int, when: int = 0) -> None:
    reports.fail(reports.Failure(_rank(), code, words, page.noted[1], socket.gethostname(), child), when)


def _say(sentence: str) -> None:
    print(f"[rank {_rank()}] error: {sentence}", file=sys.stderr, flush=True)


def _end(code: int, page: Page) -> None:
    time.sleep(_TOGETHER_SECONDS)  # hydra drops what it has not read when a process fails
    page.judge()
    _end_on_other_hosts(code)
    os._exit(code)


def _end_on_other_hosts(code: int) -> None:
    """Has Hydra end all ranks of a job on several hosts: at a process that merely exits it does so on one host only.

    (Seen with MPICH 5.0.2: the others ran on for ever.) This is what MPI_Abort sends; source: MPICH 5.0,
    src/pmi/src/pmi_v1.c, PMI_Abort.
    """
    ours, all_ranks = os.environ.get("MPI_LOCALNRANKS"), os.environ.get("PMI_SIZE")  # the first is set by Hydra alone
    if ours is None or ours == all_ranks or not os.environ.get("PMI_FD", "").isdigit():
        return
    try:
        os.write(int(os.environ["PMI_FD"]), f"cmd=abort exitcode={code}\n".encode())
    except OSError:
        return
    time.sleep(_ABORT_SECONDS)


def _how(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    by_hand = " (kill -9, or the kernel for lack of memory)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{by_hand}"


def _without_a_word(page: Page) -> str:
    return "" if page.noted[1] else " without a word"


def _last_seen(page: Page) -> str:
    noted, text = page.noted
    if not text:
        return " without a word"
    return f"; it was last seen in {text}, which it had begun {time.time() - _TOGETHER_SECONDS - noted:.1f} s before"


def _rank() -> str:
    return rank_of(os.environ)
