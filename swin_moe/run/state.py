"""What a run remembers between steps: how far it is, and whether it was asked to stop."""

import os
import signal
import sys
from dataclasses import dataclass

STOPPED = 75  # exit code of a run that saved and left before its end; sysexits.h: EX_TEMPFAIL, to be tried again


class Stopped(Exception):
    """A run was asked to stop, has saved, and ends before its end."""


class StopRequest:
    """Remembers SIGTERM, SIGUSR1, SIGHUP or a first Ctrl-C until the ranks can agree to stop, at the end of a step.

    A second Ctrl-C ends the process where it is.
    """

    def __init__(self):
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            if self.name == "SIGINT":
                raise KeyboardInterrupt
            if sys.__stderr__ is not None:  # closed by whoever started the process
                # Not print: the signal may have come in the middle of one.
                os.write(sys.__stderr__.fileno(), b"\nstopping after this step; Ctrl-C again ends at once\n")
        self.name = signal.Signals(number).name


@dataclass
class Progressed:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0  # optimizer steps taken
    samples: int = 0  # training images seen
    best: float | None = None
    skipped: int = 0  # steps skipped in a row
