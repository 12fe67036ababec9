"""Runs mpirun so that signals reach the ranks and nothing outlives the launcher."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence

from launcher import watch
from launcher.command import Flavor

_STOP = (signal.SIGTERM, signal.SIGHUP)  # save and exit, within the grace time
_HANDLED = {signal.SIGCHLD, signal.SIGINT, signal.SIGUSR1, *_STOP}


def run(command: Sequence[str], environment: dict[str, str], *, flavor: Flavor, grace: float) -> int:
    """Returns the exit code of the job (128 + n when ended by signal n) after the last process is gone.

    SIGTERM, SIGHUP and SIGUSR1 are passed to every rank through mpirun, so that the program can save and leave; after
    the first two, the job is killed when `grace` seconds are over. SIGINT ends it at once. mpirun runs in a session of
    its own, so that Ctrl-C in a terminal arrives here only.
    """
    watch.announce(environment)
    launcher = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        watch.die_with_parent(launcher)

    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare
    )
    deadline = float("inf")
    while (code := process.poll()) is None:
        # 1 s: SIGCHLD is the usual way out, the time limit covers one that came between poll and here.
        received = signal.sigtimedwait(_HANDLED, min(1.0, max(0.0, deadline - time.monotonic())))
        number = received.si_signo if received else None
        if number == signal.SIGINT or time.monotonic() >= deadline:
            process.kill()  # the proxies and ranks follow: hydra's see their socket close, ranks watch this process
            process.wait()
            return 130 if number == signal.SIGINT else 124
        if number in _STOP:
            deadline = min(deadline, time.monotonic() + grace)
        if number in (signal.SIGUSR1, *_STOP):
            process.send_signal(_as_forwarded(number, flavor))
    return code if code >= 0 else 128 - code


def _as_forwarded(number: int, flavor: Flavor) -> int:
    """Returns the signal mpirun passes on: hydra forwards SIGTERM, Open MPI would kill the ranks at once."""
    if number == signal.SIGHUP or flavor == "openmpi":
        return signal.SIGTERM if flavor == "mpich" else signal.SIGUSR1
    return number
