"""Cells of a study: training runs, each of whose results is a file, so that a study that was killed goes on.

A folder holds cells/NAME.json (what a finished run gave), logs/NAME.txt (what it wrote) and runs/NAME (while it lasts).
A cell counts as finished where its file was made by the same ranks, words and program; everything else runs again.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NO_MEMORY = 71  # exit code of a run for which memory is too small


@dataclass(frozen=True)
class Cell:
    """A training run. words: Config and options. goes_on: A run that was cut off continues from its checkpoint; else
    it begins anew, as seconds must be those of one go."""

    name: str
    ranks: int
    words: tuple[str, ...]
    goes_on: bool = False


@dataclass(frozen=True)
class Study:
    """Where cells lie and how they are started.

    launch: Further words for the launcher, such as --hostfile. read: Run folder -> what a cell's file keeps of it.
    """

    folder: Path
    read: Callable[[str], dict[str, Any]]
    launch: tuple[str, ...] = ()

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Returns what a finished cell gave, None if it has to run."""
        try:
            found = json.loads(self._file(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found["result"] if found.get("cell") == self._identity(cell) else None

    def run(self, cells: Sequence[Cell]) -> list[str]:
        """Runs what is not finished, one after another, with a line for each; returns one sentence for each failure.

        Raises:
            ValueError: Another study, or a run that it left behind, works in this folder.
        """
        waiting = [cell for cell in cells if self.result(cell) is None]
        say(f"{len(cells) - len(waiting)} of {len(cells)} cells are finished in {self.folder}")
        failures: list[str] = []
        start = time.monotonic()
        with _only_one(self.folder) as lock:
            for number, cell in enumerate(waiting, 1):
                began = time.monotonic()
                failure = self._run(cell, lock)
                failures += [failure] if failure else []
                taken, so_far = time.monotonic() - began, time.monotonic() - start
                left = so_far / number * (len(waiting) - number)
                words = failure or _words(self.result(cell) or {})
                place = len(cells) - len(waiting) + number
                say(f"[{place}/{len(cells)}] {cell.name}: {words} ({taken:.0f} s; about {left / 60:.1f} min left)")
        return failures

    def _run(self, cell: Cell, lock: int) -> str:
        """Runs a cell and writes its file; returns what went wrong, or nothing."""
        output = self.folder / "runs"
        if not cell.goes_on:
            shutil.rmtree(output / cell.name, ignore_errors=True)
        log = self.folder / "logs" / f"{cell.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
        with log.open("w", encoding="utf-8") as written:
            child = subprocess.Popen(
                command_of(cell, self.launch, output),
                cwd=ROOT,
                env=environment,
                stdout=written,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
            )
            try:
                code = child.wait()
            except BaseException:
                child.send_signal(signal.SIGTERM)
                child.wait()
                raise
        if code == NO_MEMORY:
            self._write(cell, {"fits": False})
        elif code:
            return f"failed with exit code {code}, see {log}"
        else:
            try:
                result = self.read(str(output / cell.name))
            except ValueError as error:  # the other cells need not wait for whoever finds out why
                return f"its run cannot be read: {error}"
            self._write(cell, result)
        shutil.rmtree(output / cell.name, ignore_errors=True)
        return ""

    def write_unfit(self, cell: Cell, why: str) -> None:
        """Notes that a cell was not run because it would not fit."""
        self._write(cell, {"fits": False, "why": why})

    def _write(self, cell: Cell, result: dict[str, Any]) -> None:
        path = self._file(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".tmp")
        new.write_text(json.dumps({"cell": self._identity(cell), "result": result}, indent=1), encoding="utf-8")
        new.replace(path)

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def _identity(self, cell: Cell) -> dict[str, Any]:
        return {"name": cell.name, "ranks": cell.ranks, "words": list(cell.words), "launch": list(self.launch)}


def command_of(cell: Cell, launch: Sequence[str], output: Path) -> list[str]:
    """Returns the command line of a cell's run."""
    command = [sys.executable, "-m", "launcher", "-n", str(cell.ranks), *launch, "--", "-m", "swin_moe.train"]
    return [*command, *cell.words, f"run.output={output}", f"run.name={cell.name}", "log.tensorboard=false"]


@contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """Holds a folder for this process and the runs that it starts: a run that outlives it still holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another study, or by a run that one left behind") from None
        yield lock
    finally:
        os.close(lock)


def main(work: Callable[[], list[str]]) -> None:
    """Ends the process with 0, 1 where cells failed, 2 after a sentence about what is wrong, or 130 when stopped."""

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        failures = work()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        sys.exit(130)
    sys.exit(1 if failures else 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that studies of runs end with."""
    parser.add_argument("--launch", default="", metavar="WORDS", help="for the launcher, such as '--hostfile hosts'")
    parser.add_argument("--draw-only", action="store_true", help="draw what is finished and run nothing")


def check_numbers(options: Any, **least: int) -> None:
    """Raises ValueError for an option below the least that it may be."""
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {smallest}, got {getattr(options, name)}")


def study_of(options: Any, read: Callable[[str], dict[str, Any]]) -> "Study":
    """Returns the study in the folder of the options; read: what a finished run's folder says."""
    return Study(Path(options.out).resolve(), read, tuple(options.launch.split()))


def numbers(text: str) -> tuple[int, ...]:
    """Returns numbers above 0 of a text such as 1,2,4; raises ValueError."""
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ValueError(f"{text!r} must be whole numbers above 0 with commas between, such as 1,2,4")
    return found


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


def _words(result: dict[str, Any]) -> str:
    if not result.get("fits", True):
        return "does not fit in memory"
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, int | float))
