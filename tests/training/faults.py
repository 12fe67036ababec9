"""`python -m tests.training.faults FAULT CONFIG key=value ...`: a training run that goes wrong at step 3."""

import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from swin_moe import train
from swin_moe.moe.layer import MoELayer
from swin_moe.run.session import run_main

STEP, SLOW = 3, 8.0  # seconds, longer than the engine.timeout of the tests


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


def stop() -> None:
    """Stops this process, once the others have heard what it is in (a beat every 0.5 s)."""
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGSTOP)


def die_once() -> None:
    """Kills this process, unless the launcher has started the job again."""
    if "LAUNCHER_RESTART" not in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)


def in_forward(rank: int, act) -> None:
    """Calls `act` on one rank in the forward of the MoE layer of step 3."""
    original = MoELayer.forward

    def forward(self, *arguments, **options):
        if int(os.environ["RANK"]) == rank and TRAINER and TRAINER[0].progress.step == STEP:
            act()
        return original(self, *arguments, **options)

    MoELayer.forward = forward  # type: ignore[method-assign]  # a stand-in


def in_records(rank: int, act) -> None:
    """Calls `act` on one rank before the record of step 3, which the ranks make together."""
    original = train.Trainer._record

    def record(self, *arguments):
        if int(os.environ["RANK"]) == rank and self.progress.step == STEP + 1:
            act()
        return original(self, *arguments)

    train.Trainer._record = record  # type: ignore[method-assign]  # a stand-in


def in_save(rank: int, act: Callable[[], None]) -> None:
    """Calls `act` on one rank at the beginning of every save."""
    original = train.CheckpointManager.save

    def save(self, *arguments, **options):
        if int(os.environ["RANK"]) == rank:
            act()
        return original(self, *arguments, **options)

    train.CheckpointManager.save = save  # type: ignore[method-assign]  # a stand-in


def save_slowly() -> None:
    """Makes rank 0 late for every checkpoint."""
    in_save(0, lambda: time.sleep(SLOW))


TRAINER: list[train.Trainer] = []
FAULTS = {
    "stop rank 1": lambda: in_forward(1, stop),
    "stop rank 0": lambda: in_forward(0, stop),
    "exit rank 1": lambda: in_forward(1, lambda: os._exit(7)),
    "kill rank 1 once": lambda: in_forward(1, die_once),
    "hang in forward": lambda: in_forward(1, sleep_for_ever),
    "hang in records": lambda: in_records(1, sleep_for_ever),
    "stop rank 0 in save": lambda: in_save(0, stop),
    "stop rank 1 in save": lambda: in_save(1, stop),
    "slow save": save_slowly,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    original_run = train.Trainer.run

    def run(self):
        TRAINER.append(self)
        original_run(self)

    train.Trainer.run = run  # type: ignore[method-assign]  # a stand-in
    FAULTS[sys.argv[1]]()
    run_main(train.main, sys.argv[2:])
