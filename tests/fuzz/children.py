"""Runs cases in a child process with little memory and a time limit each; another child goes on after one that died.

The children are forks of `python -m tests.fuzz serve`, a process that has computed nothing: a fork of one in which
OpenMP had started threads waits for ever, at its first parallel loop, for threads that it does not have.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from tests.fuzz.cases import Case, draw_case
from tests.fuzz.oracle import judge_call, judge_command
from tests.ranks import ROOT

MEMORY = 4 << 30  # bytes of address space beyond what the process has already
AT_ONCE = 50  # cases of one child: threads and caches of torch add up
SECONDS = 120  # of one case on a crowded machine


class Result(NamedTuple):
    """What became of a case."""

    number: int
    command: str
    kind: str
    outcome: str  # works, refused or wrong
    why: str
    said: str

    def report(self, seed: int, case: Case) -> str:
        """Returns a failure with the line that repeats it."""
        repeat = f"{sys.executable} -m tests.fuzz {seed}:{self.number}"
        return f"{self.why}\n  {case.text[:2000]}\n  {self.said[-1500:]}\n  repeat: {repeat}"


class Runner:
    """The process whose forks run cases, and what asks it. A context manager; one process serves many calls."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.fuzz", "serve"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()  # which closes its input: it ends

    def run_cases(
        self,
        seed: int,
        numbers: Iterable[int],
        files: dict[str, str],
        folder: Path,
        *,
        seconds: float = SECONDS,
        broken: Callable[[], object] | None = None,
    ) -> list[Result]:
        """Returns a result per case, in order.

        Args:
            seconds: Limit of a case.
            broken: Function of a module that a child calls before its cases, to see that what it breaks is found.
        """
        name = f"{broken.__module__}:{broken.__qualname__}" if broken else ""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([seed, list(numbers), files, str(folder), seconds, name]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"{' '.join(self._process.args)} ended"  # type: ignore[arg-type]  # a list of words
        return [Result(*result) for result in json.loads(answer)]


def serve() -> None:
    """Answers a Runner: a line with the results for each line that asks."""
    import torch

    from swin_moe import doctor, throughput, train  # noqa: F401  # once for all children
    from swin_moe.ops.attention.choice import Measuring

    torch.set_num_threads(1)
    Measuring.enabled = False
    for line in iter(sys.stdin.readline, ""):
        seed, numbers, files, folder, seconds, broken = json.loads(line)
        results = _fork_all(seed, numbers, files, Path(folder), seconds, broken)
        sys.stdout.write(json.dumps(results) + "\n")
        sys.stdout.flush()


def _fork_all(
    seed: int, waiting: list[int], files: dict[str, str], folder: Path, seconds: float, broken: str
) -> list[Result]:
    results: list[Result] = []
    folder.mkdir(parents=True, exist_ok=True)
    while waiting:
        journal = folder / "journal"
        journal.write_text("")
        child = os.fork()
        if child == 0:
            _run_here(seed, waiting[:AT_ONCE], files, folder, journal, seconds, broken)
        status = os.waitpid(child, 0)[1]
        lines = journal.read_text().splitlines()
        results += [Result(*json.loads(line)) for line in lines if line.startswith("[")]
        done = sum(line.startswith("[") for line in lines)
        waiting = waiting[done:]
        if waiting and done < AT_ONCE:  # the one that was begun last ended the child
            case = draw_case(seed, waiting[0], files, folder)
            said = (folder / "stderr").read_text(errors="replace")
            late = said.rfind("Timeout (")  # faulthandler's word; the innermost calls follow
            why = (
                f"it took over {seconds} s"
                if late >= 0
                else f"the process ended with {os.waitstatus_to_exitcode(status)}"
            )
            said = said[late:][:1500] if late >= 0 else said
            results.append(Result(waiting.pop(0), case.command, case.kind, "wrong", why, said))
    return results


def run_case(case: Case, folder: Path) -> tuple[str, str, str]:
    """Returns (outcome, why, what was said) of a case in this process, whose stderr is the file `folder`/stderr."""
    errors = folder / "stderr"
    sys.stderr.flush()
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    if case.call is not None:
        raised = None
        try:
            case.call()
        except Exception as error:
            raised = error
        outcome, why = judge_call(raised, case.subjects)
        said = "" if raised is None else "".join(traceback.format_exception(raised)[-2:])
        return outcome, why, said
    with _environment(case):
        code = _command(case.words)
    sys.stderr.flush()
    said = errors.read_text(errors="replace")
    outcome, why = judge_command(case.command, code, said, case.subjects)
    return outcome, why, said


@contextlib.contextmanager
def _environment(case: Case) -> Iterator[None]:
    """Sets the variables of a case, and takes them back with all that the command set."""
    before = dict(os.environ)
    for name, value in case.environment:
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    tempfile.tempdir = None  # asked for anew
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = None


def _command(words: tuple[str, ...]) -> object:
    from swin_moe import cli

    sys.argv = ["swin-moe", *words]
    try:
        cli.main()
    except SystemExit as stop:
        return 0 if stop.code is None else stop.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run_here(
    seed: int, numbers: list[int], files: dict[str, str], folder: Path, journal: Path, seconds: float, broken: str
) -> None:
    try:
        confine(folder)
        if broken:
            module, _, name = broken.partition(":")
            getattr(importlib.import_module(module), name)()
        with journal.open("a") as file:
            for number in numbers:
                faulthandler.dump_traceback_later(seconds, exit=True)
                random.seed(0)
                case = draw_case(seed, number, files, folder)
                outcome, why, said = run_case(case, folder)
                file.write(json.dumps([number, case.command, case.kind, outcome, why, said]) + "\n")
                file.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def confine(folder: Path) -> None:
    """Limits this process, turns its output into files, and makes long commands short: one step, two forwards."""
    from launcher import supervise
    from swin_moe import doctor, throughput, train
    from swin_moe.data.loader import StepBatches

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    vars(sys).update(__stdout__=sys.stdout, __stderr__=sys.stderr)
    faulthandler.enable(sys.stderr)
    os.environ["SWIN_MOE_TRACEBACK"] = "1"
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.chdir(folder)
    step = train.Trainer._train_step

    def one_step(trainer: train.Trainer, batches: StepBatches) -> bool:
        step(trainer, batches)
        return True

    train.Trainer._train_step = one_step  # type: ignore[method-assign, assignment]  # a stand-in
    throughput.WARMUP = throughput.TIMED = 1
    doctor.COMMON = {}
    # Ranks would cost seconds each.
    supervise.supervise = lambda *arguments, **options: supervise.Outcome(0)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
