"""Ends everything that a job started on this host, workers and their children included, and nothing else.

Processes are known by a token in the environment that they were started with, which forks and children keep, and by
the process group of their rank; never by name. Each rank has a reaper for that, a process in a session of its own that
does nothing until the guard of the rank is gone, however that ended: so it works on hosts without a launcher, and
after kill -9 of the launcher, mpirun, a daemon or the rank. For the same reason it takes what the rank writes.
"""

import os
import shutil
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from launcher import watch
from launcher.env import rank_of
from launcher.failure import line, reports
from launcher.failure.page import Page
from launcher.machine import shared_memory
from launcher.output import pump
from launcher.output.pump import Pipes, Pump

_POLITE_SECONDS = 0.5  # between the request to end and the end
_SECONDS = 10.0
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def processes(token: str, *, rank: str = "", after: int = 0, group: int = 0, spared: Collection[int] = ()) -> list[int]:
    """Returns the process ids of a job, less this process's own.

    Args:
        rank: "" = of all ranks and of what starts them.
        after: Only what started later than this, in clock ticks since boot: not the daemon that started the rank,
            whose environment may name a number of its own.
        group: A process group whose members belong to the rank even without a token.
        spared: Process ids to leave out.
    """
    mine, members, shared = [], [], False
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if pid == os.getpid() or pid in spared or fields[0] in "ZX" or int(fields[19]) <= after:
                continue
            owner = _owner(path, token)
        except (OSError, IndexError):
            continue
        if owner is not None and rank in ("", owner):
            mine.append(pid)
        elif group and int(fields[2]) == group:
            members.append(pid)
            shared |= owner is not None  # Slurm puts all tasks of a node into the group of the first
    return mine if shared else mine + members


def sweep(token: str, *, rank: str = "", after: int = 0, group: int = 0, spared: Collection[int] = ()) -> int:
    """Ends the processes of a job, as `processes` has them; returns how many there were."""
    began, seen = time.monotonic(), set()
    while time.monotonic() < began + _SECONDS:
        left = processes(token, rank=rank, after=after, group=group, spared=spared)
        if not left:
            break
        number = signal.SIGKILL if time.monotonic() > began + _POLITE_SECONDS else signal.SIGTERM
        for pid in left:
            if pid not in seen or number == signal.SIGKILL:
                _kill(pid, number)
        seen.update(left)
        time.sleep(0.05)
    return len(seen)


def start_reaper(page: Page) -> int | None:
    """Starts the reaper of this rank, from its guard; returns what the rank has to close, None without a token.

    It leaves word of a guard that was killed, and removes the shared memory of a rank that could not do so itself.
    """
    token = os.environ.get(line.TOKEN)
    if not token:
        return None
    guard, group, rank = os.getpid(), os.getpgrp(), rank_of(os.environ)
    began, group = int(watch.start_time(guard)), group if group == guard else 0
    ours, theirs = os.pipe()
    pipes = pump.wanted()
    if os.fork() == 0:
        try:
            taken = _stand_by(ours, pipes)
            if page.was_cut_off:
                reports.lose(rank)
            if taken is not None:
                taken.empty()
            sweep(token, rank=rank, after=began, group=group)
            shared_memory.remove(page.left)
            if taken is not None:
                # Not before: Hydra does not abort a job if it finds a rank's output closed while a child of the rank
                # still holds the rank's PMI socket (seen with MPICH 5.0.2: it reaps the rank first, and then ignores
                # the socket).
                taken.close(1, 2)
                taken.finish(_SECONDS)
        finally:
            os._exit(0)
    os.close(ours)
    if pipes is not None:
        pipes.redirect()
    return theirs


@contextmanager
def cleaned_up(token: str, place: Path, *, remove: Sequence[Path]) -> Iterator[None]:
    """Has a process of its own clean up if this one, a launcher, is killed within: where Slurm kills the reapers, or no
    rank lived long enough to have one.

    Args:
        place: The folder of reports.
        remove: Folders that this process would have removed at its end.
    """
    ours, theirs = os.pipe()
    cleaner = os.fork()
    if cleaner == 0:
        try:
            _heed_nothing()
            _hold_only(ours)
            if not os.read(ours, 1):
                sweep(token)
                shared_memory.remove(reports.held_here(place))
                for folder in remove:
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            os._exit(0)
    os.close(ours)
    try:
        yield
    finally:
        try:
            os.write(theirs, b"done")
        except BrokenPipeError:  # somebody killed the cleaner
            pass
        os.close(theirs)
        os.waitpid(cleaner, 0)


def _stand_by(pipe: int, pipes: Pipes | None) -> Pump | None:
    """Returns when the guard, which has the other end of `pipe`, is gone; until then moves what the rank writes."""
    _heed_nothing()
    if pipes is None:
        _hold_only(pipe)
        os.read(pipe, 1)
        return None
    pipes.keep_reading()
    taken = Pump(pipes, inherited=2)
    _hold_only(pipe, 1, 2, *taken.descriptors)
    taken.work(until=pipe)
    return taken


def _heed_nothing() -> None:
    os.setsid()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def _hold_only(*kept: int) -> None:
    """Closes all descriptors but these."""
    last = min(os.sysconf("SC_OPEN_MAX"), 65536)
    for low, high in pairwise([-1, *sorted(set(kept)), last]):
        os.closerange(low + 1, high)


def _owner(path: Path, token: str) -> str | None:
    """Returns the rank that a process belongs to, "?" = to what starts them; None without the token."""
    words = (path / "environ").read_bytes().split(b"\0")
    if f"{line.TOKEN}={token}".encode() not in words:
        return None
    pairs = (word.decode(errors="replace").partition("=") for word in words)
    return rank_of({name: value for name, _, value in pairs})


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return
