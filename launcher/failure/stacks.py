"""Where every rank is in its program: stacks that ranks write down when they are asked to, even while they hang.

The interpreter's own handler (faulthandler) does it, in C and without the interpreter's lock; a rank that was stopped
is continued for it, as its job is about to be ended. What asks is a file in the reports' folder, which guards look for.
"""

import faulthandler
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.env import rank_of
from launcher.failure import reports

_SIGNAL = signal.SIGRTMAX - 2  # of no library's: SIGUSR1 and SIGUSR2 are requests to save
_WANTED = "stacks-wanted"
_SECONDS = 5.0
_PAUSE = 0.2
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_LIBRARY = (
    "/site-packages/",
    "/dist-packages/",
    "/lib/python",
    "<frozen ",
    f"{Path(__file__).resolve().parent.parent}/",
)
_COLLECTIVES = "distributed_c10d.py"
_kept: list[Any] = []  # files that the handler writes to


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    line: str = ""  # "file.py:12 in function" of the program; "" = unknown
    collective: str = ""  # the call of torch.distributed or mpi4py that it is in

    def __str__(self) -> str:
        return f"at {self.line}{f', in {self.collective}' if self.collective else ''}" if self.line else "in no Python"


def listen() -> None:
    """Has this rank write its stacks down when its guard asks for them."""
    place = reports.folder()
    if place is not None:
        _kept.append((place / f"stacks-{rank_of(os.environ)}.txt").open("a"))
        faulthandler.register(_SIGNAL, _kept[-1], all_threads=True)


def are_wanted() -> bool:
    """Returns whether somebody asked for the stacks of all ranks."""
    place = reports.folder()
    return place is not None and (place / _WANTED).exists()


def ask(pid: int) -> None:
    """Has a rank of this host write its stacks down."""
    try:
        os.kill(pid, _SIGNAL)
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


def wait_for(place: Path, rank: str, seconds: float = 1.0) -> None:
    """Returns when a rank of this host, which was asked, has written its stacks down, or when the time is over."""
    deadline, before = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        time.sleep(0.05)
        text = _text(place, rank)
        if text and text == before:  # they are written line by line
            return
        before = text


def gather(place: Path, seconds: float = _SECONDS) -> dict[int, Place]:
    """Returns where all ranks are, having asked them; those that do not answer in time are left out."""
    (place / _WANTED).touch()
    known, deadline, before = reports.states(place), time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        time.sleep(_PAUSE)
        texts = {rank: _text(place, rank) for rank in known}
        if all(texts.values()) and texts == before:  # they are written line by line
            break
        before = texts
    return {rank: parse(text) for rank in known if (text := _text(place, rank))}


def describe(place: Path, rank: int) -> str:
    """Returns who and where a rank is that others wait for, having asked all for their stacks; "" = unknown."""
    where, state = gather(place).get(rank), reports.states(place).get(rank)
    if state is None:
        return ""
    said = "it does not say where it is" if where is None else str(where)
    return f"rank {rank} is process {state.pid} of {state.host}, {said}"


def parse(text: str) -> Place:
    """Returns where the main thread is, from what faulthandler wrote: the innermost line that is no library's.

    The main thread is the oldest, and so the last; the one that is called current is whichever took the signal.
    """
    frames: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if line.startswith(("Thread ", "Current thread ")):
            frames = []
        elif found := _FRAME.match(line):
            frames.append((found[1], found[2], found[3]))
    collectives = [function for file, _, function in frames if file.endswith(_COLLECTIVES)]
    mine = [frame for frame in frames if not any(part in frame[0] for part in _LIBRARY)] or frames
    if not mine:
        return Place()
    file, number, function = mine[0]
    return Place(f"{file}:{number} in {function}", collectives[0] if collectives else "")


def _text(place: Path, rank: int | str) -> str:
    try:
        return (place / f"stacks-{rank}.txt").read_text()
    except OSError:
        return ""
