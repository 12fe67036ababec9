"""Plans: every layout of a config on N ranks of a machine with its memory and time, best first; and why others fail."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from swin_moe.config import Config
from swin_moe.engine.weight_copies import are_kept
from swin_moe.parallel.sharding import Degrees
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.layouts import Layout, Rejected, check_candidate, enumerate_layouts
from swin_moe.planner.memory import Memory, predict_memory, predict_states
from swin_moe.planner.micro_step import MicroStep, trace_micro_step
from swin_moe.planner.step_time import Computation, StepTime, add_communication, predict_computation, predict_update
from swin_moe.planner.trace import Segment
from swin_moe.planner.workload import Workload, build_workload

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
    predictions = _Predictions(config, hardware, workload, traces or Traces(config, kernels=hardware.device == "cuda"))
    found: list[Planned] = []
    too_large: list[tuple[Layout, Memory]] = []
    fitting: Counter[Layout] = Counter()
    # Larger micro-batches first: where some fit, smaller ones only start more kernels.
    for layout in sorted(candidates, key=lambda c: -c.micro_batch):
        kind = replace(layout, micro_batch=0, accumulation=0)
        if fitting[kind] >= _EACH:
            continue
        memory = predictions.memory(layout)
        if memory.total > hardware.memory_bytes:
            too_large.append((layout, memory))
            continue
        fitting[kind] += 1
        found.append(_planned(config, hardware, workload, layout, memory, predictions.time(layout)))
    rejected += _without_room(too_large, hardware)
    if not found:
        raise ValueError(_nothing_fits(*_smallest(too_large, predictions), hardware, ranks))
    found.sort(key=lambda planned: (-planned.images_per_second, planned.memory.total))
    return Plan(_checked(config, found, rejected), rejected, workload)


class _Predictions:
    """Memory and time of candidates, where what does not differ between them is found once."""

    def __init__(self, config: Config, hardware: Hardware, workload: Workload, traces: "Traces") -> None:
        self.config, self.hardware, self.workload, self.traces = config, hardware, workload, traces
        self._configs: dict[Layout, Config] = {}
        self._states: dict[Layout, Memory] = {}
        self._memory: dict[Layout, Memory] = {}
        self._computation: dict[tuple, Computation] = {}
        self._update: dict[Layout, float] = {}

    def memory(self, layout: Layout) -> Memory:
        """Returns what a rank holds; of what does not fit without any activation, that alone."""
        held = _as_held(layout)
        if held not in self._states:
            self._configs[held] = layout.apply(self.config)
            self._states[held] = predict_states(self._configs[held], self.workload, layout)
        states = self._states[held]
        least = replace(states, gradients=0.0)
        return least if least.total > self.hardware.memory_bytes else self.whole_memory(layout)

    def whole_memory(self, layout: Layout) -> Memory:
        """Returns what a rank holds with a layout for which `memory` was asked, whether it fits or not."""
        once = replace(layout, overlap=1, transport="linear")
        if once not in self._memory:
            held, segments = _as_held(layout), self.traces.of(layout)
            states = self._states[held]
            self._memory[once] = predict_memory(self._configs[held], self.workload, layout, segments, states)
        return self._memory[once]

    def time(self, layout: Layout) -> StepTime:
        """Returns the time of a layout whose memory was asked for."""
        here = self.hardware.times_operators(self.config.engine.precision)
        held, key = _as_held(layout), self.traces.key(layout, here=here)
        common = self._configs[held], self.hardware, self.workload, layout
        if key not in self._computation:
            self._computation[key] = predict_computation(*common, self.traces.of(layout, here=here))
        if held not in self._update:
            self._update[held] = predict_update(*common, self._states[held])
        return add_communication(*common, self._computation[key], self._update[held])


def _as_held(layout: Layout) -> Layout:
    """Returns a layout with nothing but what decides what a rank holds between steps."""
    return replace(
        layout,
        micro_batch=1,
        accumulation=1,
        recompute="none",
        attention_chunk=0,
        overlap=1,
        transport="linear",
        payload="none",
    )


class Traces:
    """Micro-steps by what they depend on. kernels: Attention runs by compiled kernels wherever the plan is made."""

    def __init__(self, config: Config, *, kernels: bool = False) -> None:
        self.config, self.kernels = config, kernels
        self._whole: dict[tuple, MicroStep] = {}  # of one layout of the experts each
        self._steps: dict[tuple, MicroStep] = {}
        self._segments: dict[tuple, list[Segment]] = {}
        self._kept: dict[tuple, bool] = {}

    def of(self, layout: Layout, *, here: bool = False) -> list[Segment]:
        """Returns the segments of a layout's micro-step. here: By the operators that this processor chooses."""
        key = self.key(layout, here=here)
        if key not in self._segments:
            step = self._step(layout.apply(self.config), layout.degrees, key[:-3])
            self._segments[key] = step.at(layout.micro_batch)
        return self._segments[key]

    def key(self, layout: Layout, *, here: bool = False) -> tuple:
        """Returns all that segments depend on; degrees and micro-batch come last."""
        by = layout.engine, layout.zero, layout.offload, layout.world_size
        if by not in self._kept:  # what autocast casts instead lives until backward
            self._kept[by] = are_kept(layout.apply(self.config), layout.world_size)
        # Attention in turns has as many operators as there are turns, and this processor chooses kernels by sizes: no
        # line leads to another micro-batch.
        images = layout.micro_batch if layout.attention_chunk or here else 0
        kind = layout.recompute, layout.attention_chunk, layout.payload, layout.world_size == 1, self._kept[by]
        return (*kind, here, images, layout.expert, layout.expert_shard, layout.micro_batch)

    def _step(self, config: Config, degrees: Degrees, kind: tuple) -> MicroStep:
        """Returns the micro-step of a layout of experts. The first one is traced; of others the MoE blocks are, or lie
        on a line between two: bytes grow evenly with what a rank holds of the experts."""
        key = (*kind, degrees.expert, degrees.expert_shard)
        if key in self._steps:
            return self._steps[key]
        *_, here, images = kind
        how = {"kernels": self.kernels, "here": here}
        ends = _ends(config, degrees)
        if ends:
            (low, high), share = ends
            step = self._step(config, low, kind).between(self._step(config, high, kind), share)
        elif kind in self._whole:
            experts = trace_micro_step(config, degrees, images=images, experts_only=True, **how)
            step = self._whole[kind].with_experts(experts)
        else:
            step = self._whole[kind] = trace_micro_step(config, degrees, images=images, **how)
        self._steps[key] = step
        return step


def _ends(config: Config, degrees: Degrees) -> tuple[tuple[Degrees, Degrees], float] | None:
    """Returns (two layouts of the experts, where between them this one lies); None where there are no two.

    Ranks with several experts do the same whatever their number, and so do those with a cut of one, where it is even.
    """
    experts, world = config.model.moe.num_experts, degrees.world_size
    hidden = [
        int(config.model.embed_dim * 2**stage * config.model.mlp_ratio) for stage in range(len(config.model.depths))
    ]
    if degrees.expert_shard > 1:
        sizes = range(2, world // experts + 1)
        even = (s for s in sizes if world // experts % s == 0 and all(length % s == 0 for length in hidden))
        family = [Degrees(experts, s, world // (experts * s)) for s in even]
    else:
        family = [Degrees(e, 1, world // e) for e in range(2, experts) if experts % e == 0 == world % e]
    if degrees not in family[1:-1]:
        return None
    low, high, this = (1 / (d.expert * d.expert_shard) for d in (family[0], family[-1], degrees))
    return (family[0], family[-1]), (this - low) / (high - low)


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


def _smallest(too_large: list[tuple[Layout, Memory]], predictions: _Predictions) -> tuple[Layout, Memory]:
    """Returns the layout that needs least, with all that it needs. too_large: With what each holds at least."""
    best: tuple[Layout, Memory] | None = None
    for layout, least in sorted(too_large, key=lambda row: row[1].total):
        if best is not None and least.total >= best[1].total:
            break
        whole = predictions.whole_memory(layout)
        best = (layout, whole) if best is None or whole.total < best[1].total else best
    assert best is not None  # there are candidates, and none fits
    return best


def _nothing_fits(layout: Layout, memory: Memory, hardware: Hardware, ranks: int) -> str:
    options = " ".join(f"{key}={value}" for key, value in layout.options().items())
    return (
        f"no layout fits {ranks} ranks of {hardware.name} with {_gib(hardware.memory_bytes)} each: the smallest needs "
        f"{_gib(memory.total)} ({_largest(memory)}) with {options}; use more ranks, a machine with more memory, or "
        f"engine.offload=optimizer"
    )
