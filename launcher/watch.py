"""Ties the life of a rank to the processes that started it, so that kill -9 of any of them leaves no orphan.

Two threads of safety: the kernel kills a rank whose parent dies (Linux, PR_SET_PDEATHSIG), and a thread in the rank
polls the process at the top (`python -m launcher`), which is not the parent of the ranks.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path

WATCHED = "LAUNCHER_WATCHED_PROCESS"  # "<host id> <pid> <start time>" of the process to die with
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 0.5
UNKNOWN = "unknown"


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Asks the kernel to send this process a signal when its parent ends; exits if `parent` is its parent no more."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def announce(environ: MutableMapping[str, str]) -> None:
    """Writes this process into the environment as the one that ranks must not outlive."""
    environ[WATCHED] = f"{this_host()} {os.getpid()} {start_time(os.getpid())}"


def start_watching(watched: str) -> None:
    """Starts a thread that ends this process at once when the announced one is gone; does nothing on another host."""
    host, pid, began = watched.split()
    if host != this_host():
        return

    def watch() -> None:
        while start_time(int(pid)) in (began, UNKNOWN):
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def this_host() -> str:
    """Returns what process ids are relative to: this boot of this machine, in this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return "unknown"


def start_time(pid: int) -> str:
    """Returns when process `pid` started, in clock ticks since boot, or "gone". A reused pid has another start.

    UNKNOWN where this process cannot look, as one that has as many files open as it may: the other may well live.
    """
    try:
        # Fields after the parenthesized name: state is the 1st, start time the 20th (proc_pid_stat(5), field 22).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except OSError:
        return UNKNOWN
    return "gone" if fields[0] in "ZX" else fields[19]


def is_stopped(pid: int) -> bool:
    """Returns whether a process was stopped by a signal; one in a debugger was not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False
