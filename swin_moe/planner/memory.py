"""Bytes that the fullest rank of a layout holds, by what they are; states follow from the sharding table by arithmetic,
activations from the segments of a micro-step."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from swin_moe.config import Config
from swin_moe.parallel.sharding import Degrees, cut_dim, local_chunk
from swin_moe.planner.layouts import Layout
from swin_moe.planner.trace import Segment, over_time
from swin_moe.planner.workload import Parameter, Workload

_STATES = {"adamw": 2, "sgd": 1}  # tensors of an optimizer as large as a parameter
_BUCKET = 4 * 2**24  # bytes that DeepSpeed reduces together (engine/deepspeed/start.py)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment when it holds most, and what they are."""

    parameters: float
    gradients: float
    optimizer: float  # moments, and masters that are not the parameters themselves
    averages: float  # of weights, optim.ema
    activations: float  # all that lives between forward and backward, and what operators make on the way
    gathered: float  # parameters and gradients of other ranks' shards, while they are whole
    workspace: float  # buffers that are kept between steps

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


def predict_memory(config: Config, workload: Workload, layout: Layout, segments: Iterable[Segment]) -> Memory:
    """Returns what a rank holds at its peak, in training with this layout."""
    states = predict_states(config, workload, layout)
    segments = list(segments)
    live, produced = over_time(segments)
    whole_gradients = float(produced[-1])
    gathered = _gathered(config, workload, layout, segments)
    gradients = np.maximum(produced, states.gradients) if _keeps_gradients(layout) else np.minimum(
        produced, whole_gradients
    )  # fmt: skip
    if layout.zero >= 2 and layout.world_size > 1 and layout.engine == "torch":
        gradients = np.full_like(live, states.gradients)
    peak = int(np.argmax(live + gradients + gathered))
    return Memory(
        parameters=states.parameters,
        gradients=float(gradients[peak]),
        optimizer=states.optimizer,
        averages=states.averages,
        activations=float(live[peak]),
        gathered=float(gathered[peak]),
        workspace=states.workspace,
    )


def predict_states(config: Config, workload: Workload, layout: Layout) -> Memory:
    """Returns what a rank holds between steps, and all its gradients; nothing of a micro-step."""
    item = 8 if config.engine.precision == "fp64" else 4
    half = config.engine.precision in ("bf16", "fp16")
    held = sum(n for _, n in _held(workload, layout))
    trained = sum(n for p, n in _held(workload, layout) if p.trained)
    updated = _updated(config, workload, layout)
    moments = _STATES[config.optim.name] * (config.optim.name != "sgd" or config.optim.momentum > 0)
    copies = 0.0
    if half and layout.world_size == 1 and layout.engine != "deepspeed" and layout.offload == "none":
        copies = 2.0 * sum(p.numel for p in workload.parameters if p.copied)
    count = 4 * sum(p.trained for p in workload.parameters) if config.optim.name == "adamw" else 0
    return Memory(
        parameters=item * held + copies,
        gradients=item * trained,
        optimizer=(0 if layout.offload != "none" else item * moments * updated) + count,
        averages=item * held if config.optim.ema and layout.offload == "none" else 0.0,
        activations=0.0,
        gathered=0.0,
        workspace=_BUCKET if layout.engine == "deepspeed" else 0.0,
    )


def _held(workload: Workload, layout: Layout) -> list[tuple[Parameter, int]]:
    """Returns (parameter, elements of it that rank 0 keeps between steps)."""
    cuts = layout.world_size > 1 and (layout.zero == 3 or (layout.zero == 2 and layout.engine == "torch"))
    return _held_with(workload, layout.degrees, cuts)


@lru_cache(maxsize=256)
def _held_with(workload: Workload, degrees: Degrees, cuts: bool) -> list[tuple[Parameter, int]]:
    coordinates = degrees.coordinates(0)
    held = []
    for p in workload.parameters:
        size = local_chunk(p.name, p.shape, coordinates).size
        ranks = degrees.expert_data if p.is_expert else degrees.world_size
        if cuts and ranks > 1 and size:
            dim = cut_dim(size, ranks) if p.is_expert else 0
            size = (*size[:dim], -(-size[dim] // ranks), *size[dim + 1 :])
        held.append((p, math.prod(size)))
    return held


def _updated(config: Config, workload: Workload, layout: Layout) -> float:
    """Returns the elements whose optimizer state the fullest rank keeps."""
    held = [(p, n) for p, n in _held(workload, layout) if p.trained]
    if (
        layout.zero == 0
        or layout.world_size == 1
        or layout.zero == 3
        or (layout.zero == 2 and layout.engine == "torch")
    ):
        return sum(n for _, n in held)
    if layout.engine == "deepspeed":  # flat buffers, cut anywhere
        dense = sum(n for p, n in held if not p.is_expert)
        experts = sum(n for p, n in held if p.is_expert)
        return -(-dense // layout.world_size) + -(-experts // layout.expert_data)
    total = 0.0
    for is_expert, ranks in ((False, layout.world_size), (True, layout.expert_data)):
        sizes = [n for p, n in held if p.is_expert == is_expert]
        total += _dealt_out(tuple(sizes), ranks, largest_first=layout.engine == "torch")
    return total


@lru_cache(maxsize=64)
def _dealt_out(sizes: tuple[int, ...], ranks: int, *, largest_first: bool) -> int:
    """Returns what the fullest rank gets where whole parameters are dealt out, each to the rank that has least."""
    loads = [0] * min(ranks, max(len(sizes), 1))
    for size in sorted(sizes, reverse=True) if largest_first else sizes:
        least = min(range(len(loads)), key=loads.__getitem__)
        loads[least] += size
    return max(loads)


def _keeps_gradients(layout: Layout) -> bool:
    """Returns whether gradients are whole from the first operator of the last micro-step on: they add up over several,
    or lie in buckets that are there from the start (DDP)."""
    return layout.accumulation > 1 or (layout.engine == "torch" and layout.zero <= 1 and layout.world_size > 1)


def _gathered(config: Config, workload: Workload, layout: Layout, segments: list[Segment]) -> np.ndarray:
    """Returns, after every operator, bytes of parameters that are whole on a rank which keeps a shard of them."""
    lengths = [len(s.live) for s in segments]
    if layout.zero < 2 or layout.world_size == 1 or (layout.zero == 2 and layout.engine != "torch"):
        return np.zeros(sum(lengths))
    whole = _whole_blocks(config, workload, layout)
    rest, sizes = whole.get("", 0.0), []
    gathered_before, seen = 0.0, set()
    for segment in segments:
        name = segment.name.rstrip("+-")
        own = whole.get(name, 0.0) if segment.name == name else 0.0
        if layout.zero == 3:
            now = own
        elif segment.backward:
            now, gathered_before = gathered_before, gathered_before - own
        else:
            gathered_before += own if segment.name not in seen else 0.0
            now = gathered_before
        seen.add(segment.name)
        sizes.append(rest + now + (2 * own if segment.backward else own))  # gradients and their buffer; the buffer
    return np.repeat(np.array(sizes), lengths)


@lru_cache(maxsize=32)
def _blocks_of(workload: Workload, key: tuple) -> tuple[tuple[str, int], ...]:
    expert, shard, data = key
    coordinates = {"expert": (0, expert), "expert_shard": (0, shard), "expert_data": (0, data)}
    found: dict[str, int] = {}
    for p in workload.parameters:
        if p.is_expert and data == 1:
            continue  # cut over nobody
        words = p.name.split(".")
        inside = "blocks" in words
        block = ".".join(words[: words.index("blocks") + 2]) if inside else ""
        found[block] = found.get(block, 0) + local_chunk(p.name, p.shape, coordinates).numel
    return tuple(found.items())


def _whole_blocks(config: Config, workload: Workload, layout: Layout) -> dict[str, float]:
    """Returns block -> bytes of its parameters once they are gathered; "" = those outside of blocks."""
    item = 8 if config.engine.precision == "fp64" else 4
    key = layout.expert, layout.expert_shard, layout.expert_data
    return {name: float(item * numel) for name, numel in _blocks_of(workload, key)}
