"""A simulated step as plain numbers and lines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from swin_moe.config import Config
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.layouts import Layout
from swin_moe.planner.simulation.events import Task, Timeline, run_tasks
from swin_moe.planner.simulation.network import KINDS
from swin_moe.planner.simulation.program import Program, stretches
from swin_moe.planner.trace import Segment
from swin_moe.planner.workload import Workload


@dataclass(frozen=True)
class Simulated:
    """Seconds of one optimizer step, and what they are spent on."""

    seconds: float
    images_per_second: float
    compute: float  # of the mean rank
    waiting: float  # of the mean rank for the slowest one of its group, in experts
    exposed: float  # nothing computes
    exchange: float  # rows are on the way
    reduction: float  # gradients or parameters are on the way
    busiest: dict[str, float]  # kind of link -> share of its bytes/s that its busiest one carries over the step
    tasks: int

    def as_dict(self) -> dict[str, Any]:
        """Returns it as JSON types."""
        return asdict(self)


def simulate(
    config: Config,
    hardware: Hardware,
    workload: Workload,
    layout: Layout,
    segments: Sequence[Segment],
    shares_LE: np.ndarray,
) -> Simulated:
    """Returns a step of a layout. config: With the layout's options; shares_LE: loads.py."""
    parts, update = stretches(config, hardware, workload, layout, segments)
    program = Program(config, hardware, workload, layout, shares_LE)
    tasks = program.build(parts, update)
    return summarize(tasks, run_tasks(tasks, program.network.rates), program.network.rates, config.data.global_batch)


def summarize(tasks: Sequence[Task], timeline: Timeline, rates: tuple[float, ...], images: int) -> Simulated:
    """Returns what a timeline amounts to."""
    spent = dict.fromkeys(("compute", "exchange", "reduction"), 0.0)
    for task, span in zip(tasks, timeline.spans):
        spent[task.stream] += span.end - span.start
    whole = timeline.seconds
    busiest = {
        kind: float(carried.max()) / (rate * whole)
        for kind, carried, rate in zip(KINDS, timeline.carried, rates)
        if carried.size and carried.max() > 0
    }
    mean = sum(task.mean for task in tasks)
    return Simulated(
        whole,
        images / whole,
        mean,
        spent["compute"] - mean,
        whole - spent["compute"],
        spent["exchange"],
        spent["reduction"],
        busiest,
        len(tasks),
    )


def lines(simulated: Simulated) -> list[str]:
    """Returns a simulated step in few words."""
    busy = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in simulated.busiest.items())
    return [
        f"simulated step {simulated.seconds:.4f} s, {simulated.images_per_second:,.0f} images/s",
        f"  ms: compute {1e3 * simulated.compute:.1f}, waiting for the slowest experts {1e3 * simulated.waiting:.1f}, "
        f"exposed communication {1e3 * simulated.exposed:.1f}",
        f"  ms on the way: rows {1e3 * simulated.exchange:.1f}, gradients and parameters "
        f"{1e3 * simulated.reduction:.1f}",
        f"  busiest links over the step: {busy or 'none'}",
    ]
