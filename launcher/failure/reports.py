"""The folder in which ranks leave word for the launcher: who they are, how far they came, and how they failed.

It lies on the launcher's host, or under --log-dir, which hosts may share. What ranks elsewhere have to say goes to the
launcher over a line (line.py, switchboard.py); where there is neither, nothing is left, and that is no error.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.env import rank_of
from launcher.failure import line

REPORTS = "LAUNCHER_REPORTS"
PROGRESS = "LAUNCHER_PROGRESS"  # a file into which one rank of the program may write the number of its step
_ASKED = "asked"  # a file with the name of the signal that the launcher passes on
_OVER = "ending"  # a file that is there once the launcher ends the job
PHASES = ("starting", "meeting", "running")  # of a rank, before the program's own


@dataclass(frozen=True)
class State:
    """A rank and how far it came."""

    rank: int
    host: str
    pid: int
    phase: str
    since: float  # time.time()


@dataclass(frozen=True)
class Failure:
    """How a rank failed."""

    rank: str  # "" = all failed alike
    code: int
    words: str = ""  # a sentence or a traceback; "" = none was said
    note: str = ""  # what the rank was doing
    host: str = ""
    pid: int = 0

    def __str__(self) -> str:
        lines = [line for line in self.words.strip().splitlines() if line.strip()]
        said = f": {lines[-1].strip().removeprefix('error: ')}" if lines else ""
        return f"rank {self.rank} ({self.host}, pid {self.pid}) failed first{said}"


def folder() -> Path | None:
    """Returns where to leave word; None where there is no such place."""
    path = Path(os.environ.get(REPORTS) or "/nowhere")
    return path if path.is_dir() else None


def enter(phase: str, pid: int | None = None) -> None:
    """Leaves word of this rank's phase."""
    rank = rank_of(os.environ)
    if rank.isdigit():
        _leave("state", State(int(rank), socket.gethostname(), pid or os.getpid(), phase, time.time()))


def fail(failure: Failure, when: int = 0) -> None:
    """Leaves word of a failure.

    Args:
        when: In nanoseconds, 0 = now; the word that this process left of the same rank and time is replaced.
    """
    _leave("failure", failure, when)


def lose(rank: str) -> None:
    """Leaves word of a rank that was killed together with its guard, by whatever started them or by the loss of it."""
    place = folder()
    if place is not None:
        keep_lost(place, rank)
    else:
        line.say("lost", {"rank": rank})


def keep(place: Path, word: State | Failure, when: int = 0) -> None:
    """Writes word of a rank into the folder."""
    if isinstance(word, State):
        _write(place / f"rank-{word.rank}.json", asdict(word))
    else:
        _write(place / f"failed-{when or time.time_ns():020d}-{word.rank}-{os.getpid()}.json", asdict(word))


def keep_lost(place: Path, rank: str) -> None:
    """Writes into the folder that a rank was killed with its guard."""
    _write(place / f"lost-{rank}.json", {"time": time.time()})


def _leave(kind: str, word: State | Failure, when: int = 0) -> None:
    place = folder()
    if place is not None:
        keep(place, word, when)
    else:
        line.say(kind, asdict(word))


def hold(names: Sequence[str]) -> None:
    """Leaves word of the shared memory that this rank has on its host."""
    place = folder()
    if place is not None:
        _write(place / f"shared-{rank_of(os.environ)}.json", {"host": socket.gethostname(), "names": list(names)})


def held_here(place: Path) -> list[str]:
    """Returns the names of the shared memory that ranks of this host left word of."""
    found = [_read(path, dict) for path in place.glob("shared-*.json")]
    return [name for one in found if one and one.get("host") == socket.gethostname() for name in one.get("names", [])]


def call_it_over(place: Path) -> None:
    """Has the guard of every rank that sees the folder end its rank at once."""
    try:
        (place / _OVER).touch()
    except OSError:  # the disk is full: MPI ends them, later
        return


def ask(place: Path, number: int) -> None:
    """Leaves word of the signal that the launcher was sent, before mpirun passes it on, perhaps as another one."""
    with suppress(OSError):  # the disk is full: ranks know what arrives
        (place / _ASKED).write_text(signal.Signals(number).name)


def asked() -> str:
    """Returns the name of the signal that the launcher passed on last, "" where it left no word of one."""
    place = folder()
    try:
        name = "" if place is None else (place / _ASKED).read_text()
    except OSError:
        return ""
    return name if name in signal.Signals.__members__ else ""


def is_over() -> bool:
    """Returns whether the launcher is ending the job."""
    place = folder()
    return place is not None and (place / _OVER).exists()


def ends(place: Path) -> tuple[int, int]:
    """Returns how many ranks (failed on their own, were killed together with their guards)."""
    names = [entry.name.split("-") for entry in os.scandir(place) if entry.name.startswith(("failed-", "lost-"))]
    failed = {name[2] for name in names if name[0] == "failed" and len(name) > 2 and name[2]}
    return len(failed), sum(name[0] == "lost" for name in names)


def states(place: Path) -> dict[int, State]:
    """Returns the ranks that left word."""
    found = (_read(path, State) for path in place.glob("rank-*.json"))
    return {state.rank: state for state in found if state is not None}


def first_failure(place: Path) -> Failure | None:
    """Returns how the rank that failed first did, None where none left word."""
    found = (_read(path, Failure) for path in sorted(place.glob("failed-*.json")))
    return next((failure for failure in found if failure is not None), None)


def read_progress(path: Path) -> int | None:
    """Returns the step that the program wrote last; None where it wrote none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _write(path: Path, data: dict[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(data))
        draft.rename(path)
    except OSError:  # the launcher is gone, or its disk is full: the rank's own end matters more
        return


def _read(path: Path, kind: Callable[..., Any]) -> Any:
    try:
        return kind(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
