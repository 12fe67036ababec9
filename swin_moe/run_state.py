"""What a run remembers between steps: how far it is, and whether it was asked to stop."""

import signal
from dataclasses import dataclass, field


class StopRequest:
    """Remembers SIGTERM or SIGUSR1 until the ranks can agree to stop, at the end of a step."""

    def __init__(self):
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        self.name = signal.Signals(number).name


@dataclass
class Progressed:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0  # optimizer steps taken
    samples: int = 0  # training images seen
    best: float | None = None
    skipped: int = 0  # steps skipped in a row
    window: dict = field(default_factory=dict)  # sums since the last record
