"""The program of the fault matrix: `python -m tests.launcher.failure.fault_program` as a rank, told by the environment.

Ranks meet over MPI in every step and rank 0 saves after it, atomically. In the phase that the environment names they
leave word that they are there, and then one of them fails, or all wait there for somebody to end them.
"""

import hashlib
import os
import signal
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from launcher.env import rank_of

FOLDER, PHASE, FAULT, GROUP = "FAULT_FOLDER", "FAULT_PHASE", "FAULT_KIND", "FAULT_GROUP"
PHASES = ("import", "rendezvous", "first step", "steady state", "saving")
STEADY_STEP, STEPS = 3, 6
_PAYLOAD_BYTES = 64 * 1024
_HOLD_SECONDS = 600.0
_asked: list[int] = []  # signals that ask to save


def culprit_of(phase: str) -> int:
    """Returns the rank that fails in a phase: the one that saves, where that is what it is about."""
    return 0 if phase == "saving" else 1


def prepare(environ: MutableMapping[str, str]) -> None:
    """Makes an interpreter ready that is going to be a rank: into the control group it may be killed in, and with a
    stop in the rendezvous."""
    if GROUP in environ and rank_of(environ) == str(culprit_of(environ[PHASE])):
        Path(environ[GROUP], "cgroup.procs").write_text(str(os.getpid()))
    if environ.get(PHASE) == "rendezvous":
        from launcher.machine import network

        read_place = network.read_place

        def stop_there() -> Any:
            reach("rendezvous")
            return read_place()

        network.read_place = stop_there


def reach(phase: str) -> None:
    """Does what is to happen in this phase; returns where nothing is, or once the rank was asked to save.

    It happens once: not in a job that was started again.
    """
    if phase != os.environ[PHASE] or os.environ.get("LAUNCHER_RESTART", "0") != "0":
        return
    folder, rank = Path(os.environ[FOLDER]), rank_of(os.environ)
    draft = folder / f".at-{rank}"
    draft.write_text("\n".join([str(os.getpid()), *_shared_memory()]))
    draft.rename(folder / f"at-{rank}")
    if rank != str(culprit_of(phase)):
        return
    commit = FAULTS.get(os.environ[FAULT], _wait)
    (folder / "began").write_text(repr(time.time()))
    commit()


def _shared_memory() -> set[str]:
    """Returns the names under /dev/shm that this process has mapped."""
    words = Path("/proc/self/maps").read_text().split()
    return {word.removeprefix("/dev/shm/") for word in words if word.startswith("/dev/shm/")}


def _wait() -> None:
    deadline, released = time.monotonic() + _HOLD_SECONDS, Path(os.environ[FOLDER], "released")
    while not _asked and not released.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def _raise() -> None:
    raise RuntimeError("the fault of the matrix")


def _leave_with_0() -> None:
    os._exit(0)


def _leave_with_3() -> None:
    sys.exit(3)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _take_memory() -> None:
    """Takes memory until the kernel ends this process; its group has less than this."""
    taken = [bytearray(os.urandom(1)) * (16 << 20) for _ in range(96)]
    raise AssertionError(f"{len(taken)} blocks of 16 MiB fit")


FAULTS = {
    "exception": _raise,
    "exit(0)": _leave_with_0,
    "exit(3)": _leave_with_3,
    "SIGKILL of a rank": _kill,
    "SIGSTOP of a rank": _stop,
    "out of memory": _take_memory,
    "disk full": lambda: None,  # saving fails by itself
}


def write_checkpoint(path: Path, step: int, pause: Any = None) -> None:
    """Writes one under another name first, so that a checkpoint is whole or is not there."""
    payload = hashlib.sha256(str(step).encode()).digest() * (_PAYLOAD_BYTES // 32)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        file.write(hashlib.sha256(payload).digest() + payload[: _PAYLOAD_BYTES // 2])
        file.flush()
        if pause is not None:
            pause()
        file.write(payload[_PAYLOAD_BYTES // 2 :])
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def verifies(path: Path) -> bool:
    """Returns whether a checkpoint is whole."""
    data = path.read_bytes()
    return len(data) == 32 + _PAYLOAD_BYTES and hashlib.sha256(data[32:]).digest() == data[:32]


def train() -> None:
    """Runs the steps; leaves with 75, having saved, where the job was asked to save."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: _asked.append(number))
    rank, folder = rank_of(os.environ), Path(os.environ[FOLDER], "checkpoints")
    world = sys.modules["mpi4py.MPI"].COMM_WORLD
    for step in range(1, STEPS + 1):
        reach({1: "first step", STEADY_STEP: "steady state"}.get(step, ""))
        asked = world.allreduce(len(_asked)) > 0
        if rank == "0":
            at = (lambda: reach("saving")) if step == STEADY_STEP else None
            write_checkpoint(folder / f"checkpoint-{step}", step, at)
        world.Barrier()
        if asked or world.allreduce(len(_asked)) > 0:
            sys.exit(75)


if __name__ == "__main__":
    if os.environ[PHASE] == "import":
        reach("import")
    train()
