"""The trainer as a program of the fault matrix: `fault_training.py CONFIG key=value ...` as a rank, told by the
environment as fault_program.py is. A fault comes once: the job that is started again runs to its end."""

import os
import sys
from collections.abc import Callable
from typing import Any

from launcher import guard
from tests.launcher.failure import fault_program

_STEPS = {"first step": 0, "steady state": 4}  # of six, counted from 0
_SAVED_STEP = 4
_pwrite, _note = os.pwrite, guard.note


def _once(phase: str) -> Callable[[], None]:
    """Returns what reaches a phase the first time it is called."""
    seen: list[str] = []

    def reach() -> None:
        if not seen:
            seen.append(phase)
            fault_program.reach(phase)

    return reach


_reach = {phase: _once(phase) for phase in fault_program.PHASES}


def _write(fd: int, data: Any, offset: int) -> int:
    if f"/checkpoints/.{_SAVED_STEP:010d}" in os.readlink(f"/proc/self/fd/{fd}"):
        _reach["saving"]()
    return _pwrite(fd, data, offset)


def _listen(text: str) -> None:
    _note(text)
    for phase, step in _STEPS.items():
        if text.startswith("forward") and text.endswith(f" of step {step}"):
            _reach[phase]()


if __name__ == "__main__":
    _reach["import"]()
    os.pwrite, guard.note = _write, _listen  # type: ignore[assignment]  # stand-ins

    import torch

    from swin_moe.run.session import run_main
    from swin_moe.train import main

    torch.set_num_threads(1)
    run_main(main, sys.argv[1:])
