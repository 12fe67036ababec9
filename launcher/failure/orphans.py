"""Ends everything that a job started on this host, workers and their children included, and nothing else.

Processes are known by a token in the environment that they were started with, which forks and children keep, and by
the process group of their rank; never by name. Each rank has a reaper for that, a process in a session of its own that
does nothing until the guard of the rank is gone, however that ended: so it works on hosts without a launcher, and
after kill -9 of the launcher, mpirun, a daemon or the rank.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher import watch
from launcher.env import rank_of
from launcher.failure import reports
from launcher.failure.page import Page
from launcher.machine import shared_memory

JOB = "LAUNCHER_JOB"  # the token
_POLITE_SECONDS = 0.5  # between the request to end and the end
_SECONDS = 10.0
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def processes(token: str, *, rank: str = "", after: int = 0, group: int = 0) -> list[int]:
    """Returns the process ids of a job, less this process's own.

    Args:
        rank: "" = of all ranks and of what starts them.
        after: Only what started later than this, in clock ticks since boot: not the daemon that started the rank,
            whose environment may name a number of its own.
        group: A process group whose members belong to the rank even without a token.
    """
    mine, members, shared = [], [], False
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if pid == os.getpid() or fields[0] in "ZX" or int(fields[19]) <= after:
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


def sweep(token: str, *, rank: str = "", after: int = 0, group: int = 0) -> int:
    """Ends the processes of a job, as `processes` has them; returns how many there were."""
    began, seen = time.monotonic(), set()
    while time.monotonic() < began + _SECONDS:
        left = processes(token, rank=rank, after=after, group=group)
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
    token = os.environ.get(JOB)
    if not token:
        return None
    guard, group, rank = os.getpid(), os.getpgrp(), rank_of(os.environ)
    began, group = int(watch.start_time(guard)), group if group == guard else 0
    ours, theirs = os.pipe()
    if os.fork() == 0:
        try:
            _wait_until_closed(ours)
            if page.was_cut_off:
                reports.lose(rank)
            sweep(token, rank=rank, after=began, group=group)
            shared_memory.remove(page.left)
        finally:
            os._exit(0)
    os.close(ours)
    return theirs


@contextmanager
def cleaned_up(token: str, place: Path, *, keep: bool) -> Iterator[None]:
    """Has a process of its own clean up if this one, a launcher, is killed within: where Slurm kills the reapers, or no
    rank lived long enough to have one.

    Args:
        place: The folder of reports.
        keep: Whether that is to stay.
    """
    ours, theirs = os.pipe()
    cleaner = os.fork()
    if cleaner == 0:
        try:
            if not _wait_until_closed(ours):
                sweep(token)
                shared_memory.remove(reports.held_here(place))
                if not keep:
                    shutil.rmtree(place, ignore_errors=True)
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


def _wait_until_closed(pipe: int) -> bytes:
    """Returns what was last said into the pipe, when the process that has its other end said so or is gone; until then
    this process holds and heeds nothing."""
    os.setsid()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.closerange(0, pipe)
    os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 65536 else 65536)
    return os.read(pipe, 1)


def _owner(path: Path, token: str) -> str | None:
    """Returns the rank that a process belongs to, "?" = to what starts them; None without the token."""
    words = (path / "environ").read_bytes().split(b"\0")
    if f"{JOB}={token}".encode() not in words:
        return None
    pairs = (word.decode(errors="replace").partition("=") for word in words)
    return rank_of({name: value for name, _, value in pairs})


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return
