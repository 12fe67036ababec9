"""What a run remembers between steps: how far it is, and whether it was asked to stop."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

STOPPED = 75  # exit code of a run that saved and left before its end; sysexits.h: EX_TEMPFAIL, to be tried again


class Stopped(Exception):
    """A run was asked to stop, has saved, and ends before its end."""


class StopRequest:
    """Remembers SIGTERM, SIGUSR1, SIGHUP or a first Ctrl-C until the ranks can agree to stop, at the end of a step.

    A second Ctrl-C ends the process where it is. `name` is that of the signal which the user sent: the launcher, whose
    mpirun passes some signals on as others, leaves word of it.
    """

    def __init__(self):
        self.name = ""
        self._interrupted = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            if sys.__stderr__ is not None:  # closed by whoever started the process
                # Not print: the signal may have come in the middle of one.
                os.write(sys.__stderr__.fileno(), b"\nstopping after this step; Ctrl-C again ends at once\n")
        self.name = _asked() or signal.Signals(number).name

    @property
    def number(self) -> int:
        """The signal, 0 = none."""
        return signal.Signals[self.name].value if self.name else 0

    def agree(self, numbers: Sequence[float]) -> None:
        """Takes the name that the first rank with a request knows, given the numbers of all ranks."""
        self.name = next((signal.Signals(int(number)).name for number in numbers if number), "")


def _asked() -> str:
    """Returns the signal which the launcher was sent; "" where there is no launcher, or it left no word here."""
    from launcher.failure import reports  # a run without a launcher needs none of it

    return reports.asked()


@dataclass
class Progressed:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0  # optimizer steps taken
    samples: int = 0  # training images seen
    best: float | None = None
    skipped: int = 0  # steps skipped in a row
