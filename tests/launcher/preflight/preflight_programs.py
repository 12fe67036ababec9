"""Ranks with something wrong, for the preflight to name: `-m tests.launcher.preflight.preflight_programs NAME`."""

import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from launcher import mpi
from launcher.preflight import member, pairs
from launcher.preflight.conduct import Settings
from launcher.preflight.rank import on_ranks

SECONDS = 3.0  # in which a rank has to answer


def _healthy() -> None:
    return


def _deaf() -> None:
    """Nobody can connect to it, as its listener is closed."""
    listen = member.ACTIONS["listen"]

    def listen_and_close(state: member.State, order: dict[str, Any]) -> Any:
        answer = listen(state, order)
        assert state.listener is not None
        state.listener.close()
        state.listener = None
        return answer

    member.ACTIONS["listen"] = listen_and_close


def _throttled() -> None:
    """While it shows its pace, a child stops it for most of the time."""
    pace, victim = member.ACTIONS["pace"], os.getpid()

    def pace_under_stops(state: member.State, order: dict[str, Any]) -> Any:
        child = os.fork()
        if child == 0:
            with suppress(PermissionError):  # else a busy machine keeps it from stopping anything in time
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        while child == 0:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.005)
            if os.getppid() != victim:
                os._exit(0)
        answer = pace(state, order)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.kill(victim, signal.SIGCONT)
        return answer

    member.ACTIONS["pace"] = pace_under_stops


def _slow_to_read() -> None:
    """Over each of its links, bytes arrive at 6 MB/s at most."""
    receive = pairs._receive

    def receive_slowly(connection: Any, size: int, scratch: memoryview) -> None:
        time.sleep(size / 6e6)
        receive(connection, size, scratch)

    pairs._receive = receive_slowly


def _silent() -> None:
    """It never answers when it is to show its pace."""
    member.ACTIONS["pace"] = lambda state, order: time.sleep(600)


def _gone() -> None:
    """It ends in the middle."""
    member.ACTIONS["pace"] = lambda state, order: os._exit(0)


if __name__ == "__main__":
    env = mpi.bootstrap()
    if env.rank == 1:
        globals()[f"_{sys.argv[1]}"]()
    sys.exit(on_ranks(env, Settings("none", SECONDS if sys.argv[1] == "silent" else 60.0))[0])
