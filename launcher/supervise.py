"""Runs mpirun so that signals reach the ranks and nothing outlives the launcher."""

import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher import guard, watch
from launcher.flavors.base import Flavor

_STOP = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # save and exit, within the grace time
_END_SECONDS = 30.0  # what a scheduler gets to end its step; it kills the ranks within seconds itself
_HANDLED = {signal.SIGCHLD, signal.SIGUSR1, *_STOP}


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    code: int  # of the job; 128 + n when ended by signal n
    rank: str = ""  # the one that failed first, "" = none did, or none on this host said so
    asked_to_stop: bool = False  # by a signal, or as its time was over
    killed: bool = False  # by the launcher, as it did not stop in time


def run(
    command: Sequence[str], environment: dict[str, str], *, flavor: Flavor, grace: float, save_after: float = math.inf
) -> int:
    """Returns the exit code of the job, as `supervise` has it."""
    return supervise(command, environment, flavor=flavor, grace=grace, save_after=save_after).code


def supervise(
    command: Sequence[str], environment: dict[str, str], *, flavor: Flavor, grace: float, save_after: float = math.inf
) -> Outcome:
    """Returns how the job ended, after the last process is gone.

    SIGTERM, SIGHUP, SIGINT (Ctrl-C) and SIGUSR1 are passed to every rank through mpirun, so that the program can save
    and leave; after the first three, the job is killed when `grace` seconds are over, or at a second SIGINT. mpirun
    runs in a session of its own, so that Ctrl-C in a terminal arrives here only.

    Args:
        save_after: Seconds after which the ranks are asked as by a SIGTERM, for schedulers that give no warning.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-") as reports:
        environment = environment | {guard.REPORTS: reports}
        outcome = _wait(_start(command, environment, flavor), flavor, grace, save_after)
        failed_first = None if outcome.killed or not outcome.code else guard.first_report(Path(reports))
    return outcome if failed_first is None else replace(outcome, rank=failed_first[0], code=failed_first[1])


def _start(command: Sequence[str], environment: dict[str, str], flavor: Flavor) -> subprocess.Popen:
    watch.announce(environment)
    launcher = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        watch.die_with_parent(launcher, flavor.end)

    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare
    )


def _end(process: subprocess.Popen, flavor: Flavor) -> None:
    """Ends the job at once. Proxies and ranks follow: hydra's see their socket close, ranks watch this process."""
    process.send_signal(flavor.end)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen, flavor: Flavor, grace: float, save_after: float) -> Outcome:
    """Returns how the process ended, passing signals on meanwhile."""
    deadline, interrupts = math.inf, 0
    save_at = time.monotonic() + save_after
    while (code := process.poll()) is None:
        # 1 s: SIGCHLD is the usual way out, the time limit covers one that came between poll and here.
        received = signal.sigtimedwait(_HANDLED, min(1.0, max(0.0, min(deadline, save_at) - time.monotonic())))
        number = received.si_signo if received else None
        if number is None and time.monotonic() >= save_at:
            number, save_at = signal.SIGTERM, math.inf
            print(f"launcher: {save_after:g} s are over; the ranks have {grace:g} s to save", flush=True)
        interrupts += number == signal.SIGINT
        if interrupts > 1 or time.monotonic() >= deadline:
            _end(process, flavor)
            return Outcome(130 if interrupts else 124, asked_to_stop=True, killed=True)
        if number == signal.SIGINT:
            print(f"launcher: stopping; the ranks have {grace:g} s to save, Ctrl-C again ends them at once", flush=True)
        if number in _STOP:
            deadline, save_at = min(deadline, time.monotonic() + grace), math.inf
        if number in (signal.SIGUSR1, *_STOP):
            process.send_signal(number if number == signal.SIGUSR1 else flavor.stop)
    return Outcome(code if code >= 0 else 128 - code, asked_to_stop=deadline < math.inf)
