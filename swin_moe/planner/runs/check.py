"""Predicted against measured, for a run that is over or under way; and a hardware file fitted to runs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from swin_moe.planner.hardware import Hardware
from swin_moe.planner.layouts import Layout, layout_in
from swin_moe.planner.memory import Memory, predict_memory
from swin_moe.planner.plan import Traces
from swin_moe.planner.runs.records import Run
from swin_moe.planner.step_time import StepTime, predict_time
from swin_moe.planner.trace import Segment
from swin_moe.planner.workload import Workload, build_workload

_PULL = 0.01  # of a share towards the file's, against an error of the same logarithm: what no run tells stays
_ROUNDS = 40  # of the search, every one over all shares


@dataclass(frozen=True)
class Row:
    """One quantity, in seconds or bytes; None where it is not predicted or was not recorded."""

    name: str
    predicted: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1 if self.predicted is not None and self.measured else None


@dataclass(frozen=True, eq=False)
class Traced:
    """What predictions of a run need, whatever the machine."""

    run: Run
    layout: Layout
    workload: Workload
    segments: list[Segment]

    @cached_property
    def here(self) -> list[Segment]:
        """The segments by the operators that this processor chooses."""
        return Traces(self.run.config).of(self.layout, here=True)

    def time(self, hardware: Hardware) -> StepTime:
        """Returns the time of a step on a machine."""
        config = self.run.config
        segments = self.here if hardware.times_operators(config.engine.precision) else self.segments
        return predict_time(config, hardware, self.workload, self.layout, segments)

    def memory(self) -> Memory:
        """Returns what its fullest rank holds."""
        return predict_memory(self.run.config, self.workload, self.layout, self.segments)


def trace_run(run: Run) -> Traced:
    """Returns what predictions of a run need; takes seconds."""
    layout = layout_in(run.config, run.ranks)
    return Traced(run, layout, build_workload(run.config), Traces(run.config).of(layout))


def compare(traced: Traced, hardware: Hardware) -> list[Row]:
    """Returns a row per quantity. Phases are those that the run recorded: communication is part of them."""
    run, time, memory = traced.run, traced.time(hardware), traced.memory()
    forward, backward, both = (run.median(f"speed/s_{name}") for name in ("forward", "backward", "forward_backward"))
    if both is None and forward is not None and backward is not None:
        both = forward + backward
    rows = [Row("step seconds", time.seconds, run.step_seconds)]
    if run.ranks == 1:
        rows += [Row("  forward", time.forward, forward), Row("  backward", time.backward, backward)]
    else:
        # Rows between ranks travel in both, and recomputation is part of backward.
        rows.append(Row("  forward, backward, exchange", time.forward + time.backward + time.exchange, both))
    rows.append(Row("  reduction, update", time.reduction + time.update, run.median("speed/s_update")))
    rows.append(Row("  loading of data", None, run.median("speed/s_loading")))
    for name in ("parameters", "optimizer", "averages"):
        rows.append(Row(f"bytes of {name}", getattr(memory, name), run.median(f"memory/{name}_bytes")))
    peak = run.median("memory/peak_bytes") if hardware.device == "cuda" else None
    rows.append(Row("bytes at the peak", memory.total, peak))
    return [row for row in rows if row.measured or row.predicted]


def table(rows: Sequence[Row], title: str) -> list[str]:
    """Returns rows as lines: predicted, measured, error."""
    lines = [title, f"{'':<30} {'predicted':>12} {'measured':>12} {'error':>8}"]
    for row in rows:
        show = _bytes if row.name.startswith("bytes") else _seconds
        error = "" if row.error is None else f"{row.error:+.1%}"
        lines.append(f"{row.name:<30} {show(row.predicted):>12} {show(row.measured):>12} {error:>8}".rstrip())
    return lines


def refit(traced: Sequence[Traced], hardware: Hardware) -> Hardware:
    """Returns the machine with the shares of its peaks (*_share) that predict steps of these runs best.

    What is compared is a step without loading of data, by the logarithm of its error. Shares stay in (0, 1]; one that
    no run depends on stays the file's.
    """
    names = [f.name for f in dataclasses.fields(Hardware) if f.name.endswith("_share")]
    before = np.log([getattr(hardware, name) for name in names])

    def machine_of(logs: np.ndarray) -> Hardware:
        shares: dict[str, Any] = {name: min(1.0, float(share)) for name, share in zip(names, np.exp(logs))}
        return replace(hardware, **shares)

    def cost(logs: np.ndarray) -> float:
        machine = machine_of(logs)
        errors = [math.log(t.time(machine).seconds / without_loading(t.run)) for t in traced]
        return float(np.mean(np.square(errors)) + _PULL * np.mean(np.square(logs - before)))

    return machine_of(_lowest(cost, before))


def without_loading(run: Run) -> float:
    """Returns seconds of a step that the planner predicts."""
    return run.step_seconds - (run.median("speed/s_loading") or 0.0)


def _lowest(cost: Callable[[np.ndarray], float], start: np.ndarray) -> np.ndarray:
    """Returns where a cost of coordinates <= 0 is lowest: along one after another, in steps that become smaller."""
    place, least, step = start.copy(), cost(start), 0.5
    for _ in range(_ROUNDS):
        moved = False
        for axis in range(len(place)):
            for direction in (-step, step):
                tried = place.copy()
                tried[axis] = min(0.0, tried[axis] + direction)
                found = cost(tried)
                if found < least:
                    place, least, moved = tried, found, True
        if not moved:
            step /= 2
    return place


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
