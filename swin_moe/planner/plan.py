"""Plans: every layout of a config on N ranks of a machine with its memory and time, best first; and why others fail."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from swin_moe.config import Config
from swin_moe.engine.weight_copies import are_kept
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.layouts import Layout, Rejected, check_candidate, enumerate_layouts
from swin_moe.planner.memory import Memory, predict_memory
from swin_moe.planner.micro_step import MicroStep, trace_micro_step
from swin_moe.planner.step_time import StepTime, predict_time
from swin_moe.planner.trace import Segment
from swin_moe.planner.workload import Workload, build_workload

MOST_GPUS = 1 << 20  # that commands take: layouts of still more would be looked through for hours
_EACH = 3  # sizes of micro-batch that are looked at for one layout: the largest that fit


@dataclass(frozen=True)
class Planned:
    """A layout that fits."""

    layout: Layout
    memory: Memory
    time: StepTime
    images_per_second: float
    model_flops_share: float  # of the machine's peak, from active multiply-accumulates, forward and backward

    def as_dict(self) -> dict[str, Any]:
        """Returns it as JSON types; see docs/planner.md."""
        return {
            "degrees": {
                "world": self.layout.world_size,
                "expert": self.layout.expert,
                "expert_shard": self.layout.expert_shard,
                "expert_data": self.layout.expert_data,
            },
            "options": self.layout.options(),
            "accumulation": self.layout.accumulation,
            "images_per_second": self.images_per_second,
            "step_seconds": self.time.seconds,
            "memory_bytes": self.memory.total,
            "bound_by": self.time.bound_by,
            "memory": asdict(self.memory),
            "time": asdict(self.time),
            "mfu": self.model_flops_share,
        }


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found."""

    layouts: list[Planned]  # best first
    rejected: list[Rejected]
    workload: Workload


def make_plan(config: Config, hardware: Hardware, ranks: int, traces: "Traces | None" = None) -> Plan:
    """Returns the layouts of a config on so many ranks of a machine, by images per second.

    traces: Of this config, shared by plans of several worlds.

    Raises:
        ValueError: No layout fits, with what would; or the machine cannot run the precision.
    """
    hardware.matrix_rate(config.engine.precision)
    candidates, rejected = enumerate_layouts(config, ranks, hardware.ranks_per_node)
    workload = build_workload(config)
    traces = traces or Traces(config)
    found: list[Planned] = []
    too_large: list[tuple[Layout, Memory]] = []
    fitting: Counter[tuple] = Counter()
    # Larger micro-batches first: where some fit, smaller ones only start more kernels.
    for layout in sorted(candidates, key=lambda c: -c.micro_batch):
        kind = tuple(value for key, value in asdict(layout).items() if key not in ("micro_batch", "accumulation"))
        if fitting[kind] >= _EACH:
            continue
        segments = traces.of(layout)
        chosen = layout.apply(config)
        memory = predict_memory(chosen, workload, layout, segments)
        if memory.total > hardware.memory_bytes:
            too_large.append((layout, memory))
            continue
        fitting[kind] += 1
        time = predict_time(chosen, hardware, workload, layout, segments)
        found.append(_planned(config, hardware, workload, layout, memory, time))
    rejected += _without_room(too_large, hardware)
    if not found:
        raise ValueError(_nothing_fits(too_large, hardware, ranks))
    found.sort(key=lambda planned: (-planned.images_per_second, planned.memory.total))
    return Plan(_checked(config, found, rejected), rejected, workload)


class Traces:
    """Micro-steps by what they depend on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._steps: dict[tuple, MicroStep] = {}
        self._segments: dict[tuple, list[Segment]] = {}

    def of(self, layout: Layout) -> list[Segment]:
        """Returns the segments of a layout's micro-step."""
        config = layout.apply(self.config)
        key: tuple = (
            layout.recompute,
            layout.attention_chunk,
            layout.expert,
            layout.expert_shard,
            layout.payload,
            layout.world_size == 1,
            are_kept(config, layout.world_size),  # what autocast casts instead lives until backward
        )
        # Attention in turns has as many operators as there are turns: no line leads to another micro-batch.
        images = layout.micro_batch if layout.attention_chunk else 0
        key = (*key, images)
        if key not in self._steps:
            self._steps[key] = trace_micro_step(config, layout.degrees, images=images)
        whole = (*key, layout.micro_batch)
        if whole not in self._segments:
            self._segments[whole] = self._steps[key].at(layout.micro_batch)
        return self._segments[whole]


def _planned(
    config: Config, hardware: Hardware, workload: Workload, layout: Layout, memory: Memory, time: StepTime
) -> Planned:
    rate = config.data.global_batch / time.seconds
    work = 6 * workload.active_flops * rate / layout.world_size
    return Planned(layout, memory, time, rate, work / hardware.flops[config.engine.precision])


def _checked(config: Config, found: Iterable[Planned], rejected: list[Rejected]) -> list[Planned]:
    """Returns those that training's own check of the whole config passes, too."""
    passed = []
    for planned in found:
        try:
            check_candidate(config, planned.layout)
        except ValueError as error:
            rejected.append(Rejected(planned.layout.options(), str(error)))
        else:
            passed.append(planned)
    return passed


def _without_room(too_large: list[tuple[Layout, Memory]], hardware: Hardware) -> list[Rejected]:
    """Returns a rejection of every candidate that does not fit."""
    return [
        Rejected(
            layout.options(),
            f"a rank would hold {_gib(memory.total)} of {_gib(hardware.memory_bytes)}: {_largest(memory)}",
        )
        for layout, memory in too_large
    ]


def _largest(memory: Memory) -> str:
    parts = sorted(asdict(memory).items(), key=lambda row: -row[1])[:3]
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _nothing_fits(too_large: list[tuple[Layout, Memory]], hardware: Hardware, ranks: int) -> str:
    layout, memory = min(too_large, key=lambda row: row[1].total)
    options = " ".join(f"{key}={value}" for key, value in layout.options().items())
    return (
        f"no layout fits {ranks} ranks of {hardware.name} with {_gib(hardware.memory_bytes)} each: the smallest needs "
        f"{_gib(memory.total)} ({_largest(memory)}) with {options}; use more ranks, a machine with more memory, or "
        f"engine.offload=optimizer"
    )
