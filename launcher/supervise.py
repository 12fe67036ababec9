"""Runs mpirun so that signals reach the ranks and nothing outlives the launcher."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launcher import guard, watch
from launcher.flavors.base import Flavor

_STOP = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # save and exit, within the grace time
_HANDLED = {signal.SIGCHLD, signal.SIGUSR1, *_STOP}


def run(command: Sequence[str], environment: dict[str, str], *, flavor: Flavor, grace: float) -> int:
    """Returns the exit code of the job (128 + n when ended by signal n) after the last process is gone.

    SIGTERM, SIGHUP, SIGINT (Ctrl-C) and SIGUSR1 are passed to every rank through mpirun, so that the program can save
    and leave; after the first three, the job is killed when `grace` seconds are over, or at a second SIGINT. mpirun
    runs in a session of its own, so that Ctrl-C in a terminal arrives here only.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-") as reports:
        environment = environment | {guard.REPORTS: reports}
        code, killed = _wait(_start(command, environment), flavor, grace)
        failed_first = None if killed or not code else guard.first_report(Path(reports))
    return code if failed_first is None else failed_first


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    watch.announce(environment)
    launcher = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        watch.die_with_parent(launcher)

    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare
    )


def _wait(process: subprocess.Popen, flavor: Flavor, grace: float) -> tuple[int, bool]:
    """Returns (exit code, whether we killed the job), passing signals on meanwhile."""
    deadline, interrupts = float("inf"), 0
    while (code := process.poll()) is None:
        # 1 s: SIGCHLD is the usual way out, the time limit covers one that came between poll and here.
        received = signal.sigtimedwait(_HANDLED, min(1.0, max(0.0, deadline - time.monotonic())))
        number = received.si_signo if received else None
        interrupts += number == signal.SIGINT
        if interrupts > 1 or time.monotonic() >= deadline:
            process.kill()  # the proxies and ranks follow: hydra's see their socket close, ranks watch this process
            process.wait()
            return 130 if interrupts else 124, True
        if number == signal.SIGINT:
            print(f"launcher: stopping; the ranks have {grace:g} s to save, Ctrl-C again ends them at once", flush=True)
        if number in _STOP:
            deadline = min(deadline, time.monotonic() + grace)
        if number in (signal.SIGUSR1, *_STOP):
            process.send_signal(number if number == signal.SIGUSR1 else flavor.stop)
    return code if code >= 0 else 128 - code, False
