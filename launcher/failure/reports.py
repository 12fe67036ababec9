"""The folder in which ranks leave word for the launcher: who they are, how far they came, and how they failed.

It lies on the launcher's host, or under --log-dir, which hosts share; elsewhere nothing is left, and that is no error.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.env import rank_of

REPORTS = "LAUNCHER_REPORTS"
PROGRESS = "LAUNCHER_PROGRESS"  # a file into which one rank of the program may write the number of its step
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
    place, rank = folder(), rank_of(os.environ)
    if place is not None and rank.isdigit():
        state = State(int(rank), socket.gethostname(), pid or os.getpid(), phase, time.time())
        _write(place / f"rank-{rank}.json", asdict(state))


def fail(failure: Failure) -> None:
    """Leaves word of a failure."""
    place = folder()
    if place is not None:
        _write(place / f"failed-{time.time_ns():020d}-{failure.rank}-{os.getpid()}.json", asdict(failure))


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
