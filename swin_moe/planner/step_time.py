"""Seconds of one optimizer step of a layout: a roofline per block and phase, and communication that nothing hides.

A block takes as long as its products (arithmetic or bytes, whichever is slower), its other passes over memory, or the
host that starts its operators. Where the hardware file has what calibration found of this precision, it is the sum of
its operators by their measured rates instead. Figures are the hardware file's; nothing is fitted here.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from swin_moe.config import Config
from swin_moe.planner.collectives import Collective, collectives_of
from swin_moe.planner.hardware import Hardware, Link
from swin_moe.planner.layouts import Layout
from swin_moe.planner.memory import predict_states
from swin_moe.planner.operators import PRODUCTS
from swin_moe.planner.rates import UPDATE, UPDATE_EXPERTS, Rates
from swin_moe.planner.trace import Segment
from swin_moe.planner.workload import Workload

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
    update: float
    bounds: dict[str, float]  # one of BOUNDS -> seconds that it decides

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.forward + self.backward + self.exchange + self.reduction + self.update

    @property
    def bound_by(self) -> str:
        """What most of the step is spent on."""
        return max(self.bounds, key=lambda name: self.bounds[name])


def predict_time(
    config: Config, hardware: Hardware, workload: Workload, layout: Layout, segments: Iterable[Segment]
) -> StepTime:
    """Returns the time of a step with this layout. segments: Of its micro-step (micro_step.py)."""
    bounds = dict.fromkeys(BOUNDS, 0.0)
    if config.engine.precision in hardware.rates:
        forward, backward = _measured(hardware, config.engine.precision, segments, bounds)
    else:
        forward, backward = _computation(config, hardware, workload, layout, list(segments), bounds)
    micro_steps = layout.accumulation
    forward, backward = forward * micro_steps, backward * micro_steps
    for name in bounds:
        bounds[name] *= micro_steps
    experts = expert_seconds(config, hardware, workload, layout) * micro_steps
    exposed = {"exchange": 0.0, "reduction": 0.0}
    hidden = 0.0
    cover = {"backward": backward / micro_steps, "forward": forward, "experts": experts, "": 0.0}
    for collective in collectives_of(config, workload, layout):
        seconds, bound = _seconds(collective, hardware, layout)
        free = min(seconds, cover[collective.beside] * collective.share)
        cover[collective.beside] -= free if collective.share else 0.0
        hidden += free
        exposed[collective.phase] += seconds - free
        bounds[bound] += seconds - free
    update = _update(config, hardware, workload, layout)
    bounds["memory"] += update
    return StepTime(forward, backward, exposed["exchange"], exposed["reduction"], hidden, update, bounds)


def _computation(
    config: Config,
    hardware: Hardware,
    workload: Workload,
    layout: Layout,
    segments: list[Segment],
    bounds: dict[str, float],
) -> tuple[float, float]:
    """Returns (forward, backward) seconds of a micro-step, and adds what they are bound by."""
    macs = _macs_by_block(config, workload, layout)
    seconds = [0.0, 0.0]
    for segment in segments:
        own = macs.get(segment.name, 0.0)
        passes = 1.0 if not segment.backward else 2.0 + (layout.recompute == "block" and "blocks" in segment.name)
        if segment.backward:
            own = macs.get(segment.name.rstrip("-"), own) if segment.name.endswith("-") else own
        arithmetic = 2 * own * passes / hardware.matrix_rate(config.engine.precision)
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
        launches[backward] += hardware.launch_seconds * len(rows)
    if hardware.device == "cpu":
        bounds["launches"] += sum(launches)
        return seconds[0] + launches[0], seconds[1] + launches[1]
    bounds["launches"] += sum(max(0.0, b - a) for a, b in zip(seconds, launches))
    return max(seconds[0], launches[0]), max(seconds[1], launches[1])


def _macs_by_block(config: Config, workload: Workload, layout: Layout) -> dict[str, float]:
    """Returns segment -> multiply-accumulates of a micro-batch; what lies between blocks goes to the one before."""
    factor = _padding(config)
    layers = {layer.name for layer in workload.moe}
    found: dict[str, float] = {}
    last = ""
    for module, macs in workload.macs:
        words = module.split(".")
        if "blocks" in words:
            last = ".".join(words[: words.index("blocks") + 2])
            name = last
            if words[-1] == "mlp" and last in layers:
                macs *= factor
        else:
            name = f"{last}+" if last else ""
        found[name] = found.get(name, 0.0) + macs * layout.micro_batch
    # In backward what comes after the last block has the name of no block.
    found["+"] = found.get(f"{last}+", 0.0)
    return found


def _padding(config: Config) -> float:
    """Returns by what padded rows multiply the experts' arithmetic; 1 where none are padded."""
    moe = config.model.moe
    padded = moe.has_blocks and moe.backend in ("padded", "tutel")
    return max(moe.capacity_factor, 1.0) if padded else 1.0


def expert_seconds(config: Config, hardware: Hardware, workload: Workload, layout: Layout) -> float:
    """Returns seconds of the experts' products in a micro-step, beside which slices travel."""
    macs = sum(2.0 * layer.rows * layer.dim * layer.hidden for layer in workload.moe) * layout.micro_batch
    passes = 3 + (layout.recompute == "block")
    return 2 * macs * passes * _padding(config) / hardware.matrix_rate(config.engine.precision)


def _update(config: Config, hardware: Hardware, workload: Workload, layout: Layout) -> float:
    """Returns seconds of norm, clipping and optimizer."""
    states = predict_states(config, workload, layout)
    moments = {"adamw": 2, "sgd": 1}[config.optim.name]
    rates = hardware.rates.get(config.engine.precision)
    if rates is not None and UPDATE in rates.operators:
        return _measured_update(config, rates, workload, layout) + 3 * states.averages / hardware.memory_rate
    elements = (states.optimizer or states.gradients * moments) / moments
    traffic = elements * _UPDATE_PASSES[config.optim.name] + 3 * states.gradients + 3 * states.averages
    return traffic / hardware.memory_rate + 20 * hardware.launch_seconds


def update_bytes(config: Config, workload: Workload, layout: Layout) -> tuple[float, float]:
    """Returns bytes of weights that this rank updates: (of what all ranks hold, of experts)."""
    dense, experts = workload.numel(experts=False, trained=True), workload.numel(experts=True, trained=True)
    item = 8.0 if config.engine.precision == "fp64" else 4.0
    shards, replicas = (layout.world_size, layout.expert_data) if layout.zero else (1, 1)
    return item * dense / shards, item * experts / (layout.expert * layout.expert_shard * replicas)


def _measured_update(config: Config, rates: Rates, workload: Workload, layout: Layout) -> float:
    """Returns seconds of norm, clipping and optimizer by measured rates, which were AdamW's; others by their passes."""
    dense, experts = update_bytes(config, workload, layout)
    found = rates.operators[UPDATE].seconds(1, dense, 0) + rates.operators[UPDATE_EXPERTS].seconds(0, experts, 0)
    return found * _UPDATE_PASSES[config.optim.name] / _UPDATE_PASSES["adamw"]


def _seconds(collective: Collective, hardware: Hardware, layout: Layout) -> tuple[float, str]:
    """Returns (seconds of all its calls, link or network: which of them decides)."""
    ranks, stride = collective.ranks, collective.stride
    if ranks <= 1:
        return 0.0, "link"
    here = max(1, min(ranks, hardware.ranks_per_node // stride))  # of the group, on one node
    nodes = math.ceil(ranks / here)
    inside = _bandwidth(hardware.inside, hardware)
    between = _bandwidth(hardware.between, hardware)
    hops = hardware.inside.latency * math.ceil(math.log2(here)) + hardware.between.latency * math.ceil(math.log2(nodes))
    size = collective.bytes
    if collective.kind == "all_to_all":
        hops = (hardware.between if nodes > 1 else hardware.inside).latency
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
