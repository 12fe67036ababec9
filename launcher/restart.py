"""Runs a job, and after a failure again, on the hosts that remain and with a number of ranks that its layout allows.

The program continues by itself, from its newest complete checkpoint; what it is told is in the environment: the new
number of ranks, and LAUNCHER_RESTART, how often the job was started again.
"""

import argparse
import contextlib
import itertools
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher import guard, supervise
from launcher.failure import line, reports
from launcher.failure.kinds import CONFIGURATION, HOST, INTERRUPTED, NOT_STOPPED, PREEMPTED, STALL
from launcher.hosts.place import place
from launcher.job.options import BACKOFF, allowed_ranks, lost_seconds
from launcher.job.prepare import Prepared, arrange, find_hosts
from launcher.job.reachable import dead_hosts, other_hosts
from launcher.output import pump
from launcher.output.console import Show
from launcher.supervise import Limits, Outcome, World

RESTART = "LAUNCHER_RESTART"
_FINAL = (CONFIGURATION, NOT_STOPPED, INTERRUPTED)  # the same again, or wanted
_LONGEST_PAUSE = 300.0  # seconds
_SCREEN_SECONDS = 3.0  # a job that was asked to stop does not wait longer for a screen that stands
_PREEMPTIONS = 3  # in a row, without a step between them
_STEP = re.compile(r"\bstep (\d+)\b")


def own_variables(options: argparse.Namespace) -> list[str]:
    """Returns what every rank on every host has to know of the launcher, as NAME=VALUE; each start fills folders in."""
    told = {line.TOKEN: os.urandom(16).hex(), guard.STALL_SECONDS: options.stall, line.SECONDS: lost_seconds(options)}
    filled = dict.fromkeys((reports.REPORTS, reports.PROGRESS, pump.CONSOLE, pump.LOGS, line.WHERE), "")
    return [f"{name}={value}" for name, value in (told | filled).items()]


def run(job: Prepared, options: argparse.Namespace) -> int:
    """Returns the exit code of the job, having said why it failed, and having started it again as long as it may."""
    policy = Policy(options.restarts, BACKOFF if options.backoff is None else options.backoff)
    began, lost = time.monotonic(), Lost()
    whole = len(job.plan.ranks)
    while True:
        gone = time.monotonic() - began if policy.starts else 0.0
        logs = log_folder(options)
        outcome = _once(job, options, options.save_after - gone, logs)
        dead = dead_hosts(job) if outcome.doubtful else {}
        if dead:
            found = "; ".join(f"{host}: {why}" for host, why in dead.items())
            outcome = replace(outcome, code=HOST, rank="", words=f"nothing can be started on {found}")
        if outcome.code and outcome.rank and logs is not None:
            _say(f"launcher: what rank {outcome.rank} wrote is in {pump.file_of(str(logs), outcome.rank)}")
        if outcome.code and (outcome.rank or outcome.failure is None or outcome.words):
            _say(outcome.describe(), _SCREEN_SECONDS if outcome.asked_to_stop else None)
        pause, why = policy.after(outcome)
        if pause is None:
            if why:
                _say(f"launcher: {why}")
            return outcome.code
        try:
            lost = lost.more(job, outcome, dead)
            job = _again(job, options, lost, whole, policy.starts)
        except ValueError as error:
            _say(f"launcher: not started again: {error}")
            return outcome.code
        ranks = len(job.plan.ranks)
        _say(f"launcher: {why}; starting again in {pause:g} s with {ranks} rank{'s' * (ranks > 1)}{lost}")
        if signal.sigtimedwait(supervise.STOP, pause):
            _say("launcher: asked to stop; not started again")
            return outcome.code
        if not options.quiet:
            _say("\n".join(job.describe()))


class Policy:
    """Whether a job is started again: at most `restarts` times after failures, and not for ever without a step."""

    def __init__(self, restarts: int, backoff: float) -> None:
        self.starts = 0  # so far, beyond the first
        self._restarts, self._backoff = restarts, backoff
        self._failures = self._preemptions = 0
        self._step: int | None = None

    def after(self, outcome: Outcome) -> tuple[float | None, str]:
        """Returns (seconds to wait until the next start, why it is made); None = there is none."""
        if not outcome.code or outcome.asked_to_stop or outcome.code in _FINAL or not self._restarts:
            return None, ""
        step, before = step_of(outcome), self._step
        self._step = step
        if outcome.code == PREEMPTED:
            self._preemptions = self._preemptions + 1 if step is None or step == before else 1
            if self._preemptions > _PREEMPTIONS:
                return None, f"preempted {self._preemptions} times in a row without a step; not started again"
            self.starts += 1
            return self._pause(self._preemptions), "preempted"
        self._failures, self._preemptions = self._failures + 1, 0
        if step is not None and step == before:
            return None, f"failed twice at step {step}; not started again"
        if self._failures > self._restarts:
            return None, f"failed {self._failures} times; not started again (--restarts {self._restarts})"
        self.starts += 1
        at = "" if step is None else f" at step {step}"
        return self._pause(self._failures), f"failure {self._failures}{at}, of {self._restarts} that may be survived"

    def _pause(self, times: int) -> float:
        return min(_LONGEST_PAUSE, self._backoff * 2 ** (times - 1))


@dataclass(frozen=True)
class Lost:
    """What failed and is not used again."""

    hosts: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()  # the hosts of ranks that were killed or stalled, once for each

    def __str__(self) -> str:
        return f", without {', '.join(self.hosts)}" if self.hosts else ""

    def more(self, job: Prepared, outcome: Outcome, dead: Iterable[str] = ()) -> "Lost":
        """Returns it with what this outcome adds. Hosts on which mpirun cannot start `true` are lost.

        Args:
            dead: Those of which it is known already; () = to be tried.
        """
        if outcome.code == PREEMPTED:
            return self
        slots = self.slots
        if outcome.rank.isdigit() and (outcome.code in (HOST, STALL) or outcome.code > 128):
            slots += (job.plan.ranks[int(outcome.rank)].host,)
        return Lost((*self.hosts, *(dead or dead_hosts(job))), slots)


def step_of(outcome: Outcome) -> int | None:
    """Returns the step a job was in: what the program wrote into the file LAUNCHER_PROGRESS, else what the rank that
    failed noted last; None = unknown."""
    if outcome.step is not None:
        return outcome.step
    found = _STEP.search(outcome.failure.note) if outcome.failure else None
    return int(found[1]) if found else None


def _starts_here(job: Prepared) -> bool:
    """Returns whether some ranks start on this host at once; srun's may wait for the resources of their step."""
    here = not job.plan.hosts or len(other_hosts(job)) < len(job.plan.hosts)
    return here and job.mpi.flavor.name != "srun"


def choose_ranks(ranks: int, room: int | None, allowed: Sequence[int] | None, least: int | None) -> int:
    """Returns how many ranks to start again with.

    Args:
        ranks: Of the job as it was.
        room: Ranks that what remains takes; None = any number.
        allowed: Numbers that the layout allows, largest first; None = any.
        least: The smallest number; None = the smallest allowed one, else `ranks`.

    Raises:
        ValueError: There are too few.
    """
    least = least if least is not None else allowed[-1] if allowed else ranks
    most = ranks if room is None else min(ranks, room)
    found = most if allowed is None else next((number for number in allowed if number <= most), 0)
    if found < max(1, least):
        wanted = f"one of --allowed-ranks {','.join(map(str, allowed))}" if allowed else f"{least} ranks"
        raise ValueError(f"what remains takes {most} ranks, the job needs {wanted} (--min-ranks, --allowed-ranks)")
    return found


def log_folder(options: argparse.Namespace) -> Path | None:
    """Returns the folder of the next start, made: after those that are there, which may be another job's.

    Jobs that begin at one time (a scheduler's array) share no folder: only one of them can make it.
    """
    if not options.log_dir:
        return None
    place = Path(options.log_dir).absolute()
    numbers = [int(path.name[6:]) for path in place.glob("start-*") if path.name[6:].isdigit()]
    for number in itertools.count(max(numbers, default=-1) + 1):
        with contextlib.suppress(FileExistsError):
            (folder := place / f"start-{number}").mkdir(parents=True)
            return folder
    raise AssertionError("numbers do not end")


def _show(job: Prepared, options: argparse.Namespace) -> Show | None:
    """Returns how output is shown; None where one rank writes, which nothing can get between."""
    alone = len(job.plan.ranks) == 1
    if alone and not options.tag and not options.log_dir:
        return None
    hosts = len({rank.host for rank in job.plan.ranks}) > 1
    return Show("all" if options.tag else "others", hosts, raw=alone and not options.tag)


def _once(job: Prepared, options: argparse.Namespace, save_after: float, shared: Path | None) -> Outcome:
    try:
        job.write_hostfile()
        return supervise.supervise(
            job.command,
            job.environment(os.environ),
            flavor=job.mpi.flavor,
            limits=Limits(options.grace, max(0.0, save_after), options.stall, lost_seconds(options)),
            world=World(len(job.plan.ranks), other_hosts(job), shared, local=_starts_here(job)),
            show=_show(job, options),
        )
    finally:
        job.remove_hostfile()


def without(job: Prepared, options: argparse.Namespace, hosts: Sequence[str]) -> Prepared:
    """Returns the job without these hosts, which it will not get back. Raises ValueError where too little remains."""
    options.exclude = [*options.exclude, *hosts]
    return _again(job, options, Lost(), len(job.plan.ranks), 0)


def _again(job: Prepared, options: argparse.Namespace, lost: Lost, ranks: int, starts: int) -> Prepared:
    """Returns the job, which had `ranks` at first, on what remains. Raises ValueError where that is too little."""
    allowed = allowed_ranks(options)
    may_shrink = allowed is not None or options.min_ranks is not None
    hosts, _ = find_hosts(job.job, [*options.exclude, *lost.hosts])
    asked = replace(job.job, environment=job.job.environment | {RESTART: str(starts)})
    if not hosts:
        room = ranks - len(lost.slots) if may_shrink else None
        number = choose_ranks(ranks, room, allowed, options.min_ranks)
        return arrange(replace(asked, ranks=number), job.mpi, (), options)
    if may_shrink:  # a slot whose rank was lost may have a broken GPU or memory
        hosts = [
            host if host.slots is None else replace(host, slots=host.slots - lost.slots.count(host.name))
            for host in hosts
        ]
        hosts = [host for host in hosts if host.slots is None or host.slots > 0]
    room = None if any(host.slots is None for host in hosts) else sum(host.slots or 0 for host in hosts)
    number = choose_ranks(ranks, room, allowed, options.min_ranks)
    return arrange(replace(asked, ranks=number), job.mpi, place(number, hosts), options)


def _say(text: str, patience: float | None = None) -> None:
    """Writes to standard error; with `patience` only if somebody reads that within so many seconds."""
    if patience is not None:
        with contextlib.suppress(OSError):  # it is closed, which print knows how to bear
            if not select.select([], [2], [], patience)[1]:
                return
    print(text, file=sys.stderr, flush=True)
