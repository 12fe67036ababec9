"""Seconds of one optimizer step of a layout: a roofline per block and phase, and communication that nothing hides.

A block takes as long as its products (arithmetic or bytes, whichever is slower), its other passes over memory, or the
host that starts its operators. Where the hardware file has what calibration found of this precision, it is the sum of
its operators by their measured rates instead. Figures are the hardware file's; nothing is fitted here.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from swin_moe.config import Config
from swin_moe.planner.arithmetic import macs_of_segments
from swin_moe.planner.collectives import (
    Collective,
    collectives_of,
    exchanges,
    small_collectives_of,
    weights_handled,
    weights_of_library,
    weights_replicated,
)
from swin_moe.planner.hardware import Hardware, Link
from swin_moe.planner.layouts import Layout
from swin_moe.planner.memory import Memory, held_elements, predict_states
from swin_moe.planner.operators import BYTES, PRODUCTS
from swin_moe.planner.rates import HOST, UPDATE, Rates, moved_by_update
from swin_moe.planner.trace import Segment
from swin_moe.planner.workload import Workload, moments_of, rows_share, weight_dtype

BOUNDS = ("compute", "memory", "launches", "link", "network")
_UPDATE_PASSES = {"adamw": 7, "sgd": 5}  # reads and writes of an element: weight, gradient, moments


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and what they are spent on."""

    forward: float
    backward: float  # with recomputation
    exchange: float  # of rows, that computation does not hide
    reduction: float  # of gradients, and gathering of parameters, that computation does not hide
    hidden: float  # communication beside computation
    update: float  # with the norm of gradients over all ranks
    bounds: dict[str, float]  # one of BOUNDS -> seconds that it decides

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.forward + self.backward + self.exchange + self.reduction + self.update

    @property
    def bound_by(self) -> str:
        """What most of the step is spent on."""
        return max(self.bounds, key=lambda name: self.bounds[name])


@dataclass(frozen=True)
class Computation:
    """Seconds of one micro-step without what ranks send each other."""

    forward: float
    backward: float
    bounds: dict[str, float]  # one of BOUNDS -> seconds that it decides


def predict_time(
    config: Config,
    hardware: Hardware,
    workload: Workload,
    layout: Layout,
    segments: Iterable[Segment],
    macs: Sequence[float] | None = None,
) -> StepTime:
    """Returns the time of a step with this layout.

    Args:
        segments: Of its micro-step (micro_step.py).
        macs: Multiply-accumulates of each, where not all segments are given; else arithmetic.py counts them.
    """
    computation = predict_computation(config, hardware, workload, layout, segments, macs)
    update = predict_update(config, hardware, workload, layout, predict_states(config, workload, layout))
    return add_communication(config, hardware, workload, layout, computation, update)


def predict_computation(
    config: Config,
    hardware: Hardware,
    workload: Workload,
    layout: Layout,
    segments: Iterable[Segment],
    macs: Sequence[float] | None = None,
) -> Computation:
    """Returns the time of a micro-step's operators; see predict_time."""
    bounds = dict.fromkeys(BOUNDS, 0.0)
    if config.engine.precision in hardware.rates:
        segments = list(segments)
        forward, backward = _measured(hardware, config.engine.precision, segments, bounds)
        hooks = _recomputing(hardware, layout, segments)
        backward, bounds["launches"] = backward + hooks, bounds["launches"] + hooks
    else:
        segments = list(segments)
        macs = macs_of_segments(config, workload, layout, segments) if macs is None else macs
        forward, backward = _computation(config, hardware, segments, macs, bounds)
    return Computation(forward, backward, bounds)


def add_communication(
    config: Config, hardware: Hardware, workload: Workload, layout: Layout, computation: Computation, update: float
) -> StepTime:
    """Returns the time of a step of which computation and update are known."""
    micro_steps = layout.accumulation
    forward, backward = computation.forward * micro_steps, computation.backward * micro_steps
    bounds = {name: seconds * micro_steps for name, seconds in computation.bounds.items()}
    adding = (micro_steps - 1) * _adding(config, hardware, workload, layout)
    backward, bounds["memory"] = backward + adding, bounds["memory"] + adding
    experts = expert_seconds(config, hardware, workload, layout) * micro_steps
    exposed = {"exchange": 0.0, "reduction": 0.0, "update": 0.0}
    hidden = 0.0
    cover = {"backward": computation.backward, "forward": forward, "experts": experts, "": 0.0}
    sent = itertools.chain(collectives_of(config, workload, layout), small_collectives_of(config, workload, layout))
    for collective in sent:
        seconds, bound = seconds_of_collective(collective, hardware)
        # CPU ranks carry the bytes with the cores that compute.
        free = min(seconds, cover[collective.beside] * collective.share) if hardware.device != "cpu" else 0.0
        cover[collective.beside] -= free if collective.share else 0.0
        hidden += free
        exposed[collective.phase] += seconds - free
        bounds[bound] += seconds - free
    if hardware.device == "cpu":  # elsewhere the host runs ahead
        handling = handling_seconds(config, hardware, workload, layout)
        exchanging = hardware.exchanging_seconds * exchanges(workload, layout)
        exposed["reduction"] += handling
        exposed["exchange"] += exchanging
        bounds["launches"] += handling + exchanging
    bounds["memory"] += update
    update += exposed["update"]
    return StepTime(forward, backward, exposed["exchange"], exposed["reduction"], hidden, update, bounds)


def _adding(config: Config, hardware: Hardware, workload: Workload, layout: Layout) -> float:
    """Returns what it takes to add the gradients of a micro-step to those before, where calibration found that."""
    if not hardware.times_operators(config.engine.precision):
        return 0.0
    item = weight_dtype(config).itemsize
    work = np.zeros((len(workload.parameters), 5))
    work[:, BYTES] = [3.0 * item * elements * p.trained for p, elements in held_elements(workload, layout)]
    # Autograd calls them one after the other: the host's part is no Python.
    return float(hardware.rates[config.engine.precision].seconds("add_", work).sum()) / hardware.steps_share


def handling_seconds(config: Config, hardware: Hardware, workload: Workload, layout: Layout) -> float:
    """Returns what FSDP2, DDP or another engine takes of a CPU's host around weights in a step, beside what is sent."""
    library = hardware.libraries.get(f"{layout.engine}-{layout.zero}")
    if library is not None and layout.world_size > 1:
        times, moved = weights_of_library(workload, layout, weight_dtype(config).itemsize)
        return library.call * times + library.byte * moved
    weights, size = weights_handled(workload, layout, weight_dtype(config).itemsize)
    rate = hardware.handling_bytes_per_second
    replicated = hardware.replicating_seconds * weights_replicated(workload, layout)
    return hardware.handling_seconds * weights + (size / rate if rate else 0.0) + replicated


def _computation(
    config: Config, hardware: Hardware, segments: list[Segment], macs: Sequence[float], bounds: dict[str, float]
) -> tuple[float, float]:
    """Returns (forward, backward) seconds of a micro-step, and adds what they are bound by."""
    seconds = [0.0, 0.0]
    for segment, own in zip(segments, macs):
        arithmetic = 2 * own / hardware.matrix_rate(config.engine.precision)
        products = max(arithmetic, segment.moved_by_products / hardware.memory_rate)
        others = segment.moved / hardware.memory_rate
        launches = segment.launches * hardware.launch_seconds
        taken = max(products + others, launches)
        seconds[segment.backward] += taken
        parts = {"compute": arithmetic, "memory": products + others - arithmetic}
        bound = "launches" if launches > products + others else max(parts, key=lambda name: parts[name])
        bounds[bound] += taken
    return seconds[0], seconds[1]


def _measured(
    hardware: Hardware, precision: str, segments: Iterable[Segment], bounds: dict[str, float]
) -> tuple[float, float]:
    """Returns (forward, backward) seconds of a micro-step by the rates that calibration found, and adds what they are
    bound by. On the CPU the host runs the operators itself, so its time adds; elsewhere the longer decides."""
    by_operator: dict[tuple[str, str, bool], list[np.ndarray]] = {}
    for segment in segments:
        for (name, kind), work in zip(segment.operators, segment.work):
            by_operator.setdefault((name, kind, segment.backward), []).append(work)
    seconds, launches = [0.0, 0.0], [0.0, 0.0]
    for (name, kind, backward), rows in by_operator.items():
        rates = hardware.rates.get(kind, hardware.rates[precision])
        taken = float(rates.seconds(name, np.array(rows)).sum())
        bounds["compute" if name in PRODUCTS else "memory"] += taken
        seconds[backward] += taken
        launches[backward] += host_seconds(hardware, precision, np.array(rows))
    if hardware.device == "cpu":
        bounds["launches"] += sum(launches)
        for name in bounds:
            bounds[name] /= hardware.steps_share
        return (seconds[0] + launches[0]) / hardware.steps_share, (seconds[1] + launches[1]) / hardware.steps_share
    bounds["launches"] += sum(max(0.0, b - a) for a, b in zip(seconds, launches))
    return max(seconds[0], launches[0]), max(seconds[1], launches[1])


def operator_seconds(
    hardware: Hardware, precision: str, operators: Sequence[tuple[str, str]], work: np.ndarray
) -> float:
    """Returns seconds of operators by the rates that calibration found, with the host's around them.

    Args:
        operators: (name, precision) of each.
        work: (operators, 5), see operators.py.
    """
    by_operator: dict[tuple[str, str], list[np.ndarray]] = {}
    for operator, row in zip(operators, work):
        by_operator.setdefault(operator, []).append(row)
    seconds = host_seconds(hardware, precision, work)
    for (name, kind), rows in by_operator.items():
        seconds += float(hardware.rates.get(kind, hardware.rates[precision]).seconds(name, np.array(rows)).sum())
    return seconds


def host_seconds(hardware: Hardware, precision: str, work: np.ndarray) -> float:
    """Returns what the host takes around operators. work: (operators, 5), see operators.py."""
    rate = hardware.rates[precision].operators.get(HOST)
    return hardware.launch_seconds * len(work) if rate is None else float(rate.seconds(work[:, BYTES]).sum())


def _recomputing(hardware: Hardware, layout: Layout, segments: Sequence[Segment]) -> float:
    """Returns what operators of blocks that are computed again take of a CPU's host beyond those that are not."""
    if layout.recompute != "block" or hardware.device != "cpu" or not hardware.recomputing_seconds:
        return 0.0
    again = sum(len(s.operators) for s in segments if not s.backward and s.name and not s.name.endswith("+"))
    return again * (hardware.recomputing_seconds - hardware.launch_seconds)


def expert_seconds(config: Config, hardware: Hardware, workload: Workload, layout: Layout) -> float:
    """Returns seconds of the experts' products in a micro-step, beside which slices travel."""
    macs = sum(2.0 * layer.rows * layer.dim * layer.hidden for layer in workload.moe) * layout.micro_batch
    passes = 3 + (layout.recompute == "block")
    return 2 * macs * passes * rows_share(config.model.moe) / hardware.matrix_rate(config.engine.precision)


def predict_update(config: Config, hardware: Hardware, workload: Workload, layout: Layout, states: Memory) -> float:
    """Returns seconds of norm, clipping and optimizer. states: What the rank holds (predict_states)."""
    rates = hardware.rates.get(config.engine.precision)
    if rates is not None and UPDATE in rates.operators:
        measured = _measured_update(config, rates, workload, layout) / hardware.steps_share
        return measured + 3 * states.averages / hardware.memory_rate
    moments = moments_of(config.optim)
    kept = layout.offload == "none" and moments  # else the state does not tell what this rank updates
    masters = layout.engine == "deepspeed"  # are part of that state
    elements = states.optimizer / (moments + masters) if kept else sum(update_bytes(config, workload, layout))
    traffic = elements * _UPDATE_PASSES[config.optim.name] + 3 * states.gradients + 3 * states.averages
    return traffic / hardware.memory_rate + 20 * hardware.launch_seconds


def update_bytes(config: Config, workload: Workload, layout: Layout) -> tuple[float, float]:
    """Returns bytes of weights that this rank updates: (of what all ranks hold, of experts)."""
    dense, experts = workload.numel(experts=False, trained=True), workload.numel(experts=True, trained=True)
    item = weight_dtype(config).itemsize
    shards, replicas = (layout.world_size, layout.expert_data) if layout.zero else (1, 1)
    return item * dense / shards, item * experts / (layout.expert * layout.expert_shard * replicas)


def _measured_update(config: Config, rates: Rates, workload: Workload, layout: Layout) -> float:
    """Returns seconds of norm, clipping and optimizer by measured rates, which were AdamW's; others by their passes."""
    rate, item, found = rates.operators[UPDATE], weight_dtype(config).itemsize, 0.0
    whole = layout.zero == 0 or layout.cuts_weights  # else each rank updates some of the tensors
    for p, elements in held_elements(workload, layout):
        replicas = layout.expert_data if p.is_expert else layout.world_size
        if p.trained:
            found += float(rate.seconds(moved_by_update(np.array(item * elements)))) / (1 if whole else replicas)
    return found * _UPDATE_PASSES[config.optim.name] / _UPDATE_PASSES["adamw"]


def seconds_of_collective(collective: Collective, hardware: Hardware) -> tuple[float, str]:
    """Returns (seconds of all its calls, link or network: which of them decides)."""
    ranks, stride = collective.ranks, collective.stride
    if ranks <= 1:
        return 0.0, "link"
    here = max(1, min(ranks, hardware.ranks_per_node // stride))  # of the group, on one node
    nodes = math.ceil(ranks / here)
    near = hardware.collectives.get(collective.kind, hardware.inside)
    inside, between = _bandwidth(near, hardware), _bandwidth(hardware.between, hardware)
    hops = near.latency * math.ceil(math.log2(here)) + hardware.between.latency * math.ceil(math.log2(nodes))
    size = collective.bytes
    if collective.kind == "all_to_all":
        hops = (hardware.between if nodes > 1 else near).latency
        staying, leaving = size * (here - 1) / ranks, size * (ranks - here) / ranks
        times = {"link": staying / inside, "network": leaving / between}
    else:
        passes = 2 if collective.kind == "all_reduce" else 1
        times = {
            "link": passes * size * (here - 1) / here / inside,
            "network": passes * size * (nodes - 1) / nodes / (between * here),
        }
    bound = max(times, key=lambda name: times[name])
    return collective.calls * (hops + times[bound]), bound


def _bandwidth(link: Link, hardware: Hardware) -> float:
    return link.bytes_per_second * hardware.link_share
