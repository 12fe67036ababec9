"""Runs tasks in streams: computation takes its time, transfers share links with what else is on the way.

All messages of a transfer advance in proportion, so that a transfer is one fluid with a speed between 0 and 1 of what
it does alone. Speeds are max-min fair: they rise together until a link is full, and whoever crosses it stays there.
Between two events they do not change, so events are starts and ends of tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swin_moe.planner.simulation.network import KINDS, Transfer

STREAMS = ("compute", "exchange", "reduction")
_DONE = 1e-12  # of a task's whole: what rounding leaves


@dataclass(frozen=True)
class Task:
    """What one stream does at a time: computation, or a transfer.

    after: Tasks that must have ended, by their place in the list. seconds: Of the slowest rank; mean: of all.
    """

    stream: str
    phase: str
    after: tuple[int, ...] = ()
    seconds: float = 0.0
    mean: float = 0.0
    transfer: Transfer | None = None


@dataclass(frozen=True)
class Span:
    """When a task ran, in seconds from the start of the step."""

    start: float
    end: float


@dataclass(frozen=True)
class Interval:
    """Between two events: speeds of the transfers on the way, by task."""

    start: float
    end: float
    speeds: dict[int, float]


@dataclass(frozen=True)
class Timeline:
    """What happened when; carried: bytes by kind of link and link."""

    spans: list[Span]
    intervals: list[Interval]
    carried: tuple[np.ndarray, ...]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return max((span.end for span in self.spans), default=0.0)


def run_tasks(tasks: Sequence[Task], rates: tuple[float, ...]) -> Timeline:
    """Returns when every task runs. Streams do their tasks in the order of the list, one at a time."""
    return _Clock(tasks, rates).run()


class _Clock:
    """What runs at the moment."""

    def __init__(self, tasks: Sequence[Task], rates: tuple[float, ...]) -> None:
        self.tasks, self.rates = tasks, rates
        self.queues = {name: [i for i, task in enumerate(tasks) if task.stream == name][::-1] for name in STREAMS}
        self.busy: dict[str, int] = {}  # stream -> its task
        self.starts, self.ends = [0.0] * len(tasks), [-1.0] * len(tasks)
        self.left: dict[int, float] = {}  # running task -> share of it that is left
        self.waits: dict[int, float] = {}  # running task -> seconds of latency that are left
        self.carried = tuple(np.zeros(size) for size in _sizes(tasks))
        self.alone = [task.transfer.alone(rates) if task.transfer else task.seconds for task in tasks]

    def run(self) -> Timeline:
        now, intervals = 0.0, []
        while self._start(now):
            flowing = {
                i: transfer
                for i in self.left
                if (transfer := self.tasks[i].transfer) is not None and self.waits[i] <= 0 and self.alone[i] > 0
            }
            speeds = dict(zip(flowing, share(list(flowing.values()), self.rates)))
            step = min(self._until(i, speeds) for i in self.left)
            for i in list(self.left):
                if self._advance(i, step, speeds.get(i, 1.0)):
                    self.ends[i] = now + step
                    del self.left[i], self.busy[self.tasks[i].stream]
            intervals.append(Interval(now, now + step, speeds))
            now += step
        assert all(end >= 0 for end in self.ends), "a task waits for one that never ends"
        return Timeline([Span(a, b) for a, b in zip(self.starts, self.ends)], intervals, self.carried)

    def _start(self, now: float) -> bool:
        """Starts what may; returns whether anything runs."""
        for name, queue in self.queues.items():
            if name in self.busy or not queue or any(self.ends[j] < 0 for j in self.tasks[queue[-1]].after):
                continue
            i = queue.pop()
            transfer = self.tasks[i].transfer
            self.busy[name], self.starts[i], self.left[i] = i, now, 1.0
            self.waits[i] = transfer.latency if transfer is not None else 0.0
        return bool(self.left)

    def _until(self, i: int, speeds: dict[int, float]) -> float:
        """Returns seconds to the next thing that happens to a running task, if all stays as it is."""
        return self.waits[i] if self.waits[i] > 0 else self.left[i] * self.alone[i] / speeds.get(i, 1.0)

    def _advance(self, i: int, step: float, speed: float) -> bool:
        """Returns whether a running task has ended after so many seconds."""
        if self.waits[i] > 0:
            left = self.waits[i] - step
            self.waits[i] = left if left > _DONE * step else 0.0
            return False
        done = self.left[i]
        if self.alone[i] > 0:
            done = min(done, speed * step / self.alone[i])
        if self.left[i] - done <= _DONE:
            done = self.left[i]
        transfer = self.tasks[i].transfer
        if transfer is not None:
            for total, load in zip(self.carried, transfer.loads):
                total += done * load
        self.left[i] -= done
        return self.left[i] <= 0


def _sizes(tasks: Sequence[Task]) -> list[int]:
    for task in tasks:
        if task.transfer is not None:
            return [len(load) for load in task.transfer.loads]
    return [0] * len(KINDS)


def share(transfers: Sequence[Transfer], rates: tuple[float, ...]) -> list[float]:
    """Returns the speeds of transfers that are on the way together, max-min fair, as shares of their speeds alone."""
    if len(transfers) < 2:
        return [1.0] * len(transfers)
    # Use of every link by every transfer at full speed, (transfers, links).
    use = np.array([_use(t, rates) for t in transfers])
    speeds, fixed = np.zeros(len(transfers)), np.zeros(len(transfers), dtype=bool)
    while not fixed.all():
        taken, rising = speeds[fixed] @ use[fixed], use[~fixed].sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            levels = np.where(rising > 0, (1.0 - taken) / rising, np.inf)
        level = min(1.0, float(levels.min()))
        full = levels <= level * (1 + _DONE)
        stays = ~fixed & ((use[:, full] > 0).any(1) | (level >= 1.0))
        speeds[stays] = level
        fixed |= stays
    return [float(s) for s in speeds]


def _use(transfer: Transfer, rates: tuple[float, ...]) -> np.ndarray:
    alone = transfer.alone(rates)
    return np.concatenate([load / (rate * alone) for load, rate in zip(transfer.loads, rates)])
