"""Bytes that the fullest rank of a layout holds, by what they are; states follow from the sharding table by arithmetic,
activations from the segments of a micro-step."""

import heapq
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from swin_moe.config import Config
from swin_moe.engine.weight_copies import are_kept
from swin_moe.parallel.apply import BUCKET_BYTES
from swin_moe.parallel.sharding import Degrees, cut_dim, local_chunk
from swin_moe.planner.layouts import Layout
from swin_moe.planner.trace import Segment, over_time
from swin_moe.planner.workload import Parameter, Workload, moments_of, weight_dtype

_BUCKET = 4 * 2**24  # bytes that DeepSpeed reduces together (engine/deepspeed/start.py)
_REUSED = 4 * 10**9  # bytes of weights that its stage 3 keeps whole from forward to backward
_ALIGNED = 2  # elements of a rank's part of its flat buffers: a multiple


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment when it holds most, and what they are."""

    parameters: float
    gradients: float
    optimizer: float  # moments, and masters that are not the parameters themselves
    averages: float  # of weights, optim.ema
    activations: float  # all that lives between forward and backward, and what operators make on the way
    gathered: float  # parameters and gradients of other ranks' shards, while they are whole
    workspace: float  # buffers that DeepSpeed reduces gradients in

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


def predict_memory(
    config: Config, workload: Workload, layout: Layout, segments: Iterable[Segment], states: Memory | None = None
) -> Memory:
    """Returns what a rank holds at its peak, in training with this layout. states: predict_states, where known."""
    states = predict_states(config, workload, layout) if states is None else states
    segments = list(segments)
    live, produced = over_time(segments)
    gathered = _whole(config, workload, layout, segments)
    if layout.engine == "deepspeed" and layout.zero < 3:
        gradients, workspace = _reduced_by_deepspeed(layout, states, produced)
        live, gathered = np.append(live, live[-1]), np.append(gathered, gathered[-1])
    else:
        gradients = _gradients_over_time(layout, states, produced)
        workspace = np.full_like(produced, states.workspace)
    peak = int(np.argmax(live + gradients + gathered + workspace))
    return Memory(
        parameters=states.parameters,
        gradients=float(gradients[peak]),
        optimizer=states.optimizer,
        averages=states.averages,
        activations=float(live[peak]),
        gathered=float(gathered[peak]),
        workspace=float(workspace[peak]),
    )


def _gradients_over_time(layout: Layout, states: Memory, produced: np.ndarray) -> np.ndarray:
    """Returns bytes of gradients after every operator. produced: Of those that this micro-step has made by then."""
    whole = float(produced[-1])
    if layout.engine == "deepspeed":  # stage 3: in the bucket at once, or whole while micro-batches add up
        return np.full_like(produced, states.gradients + whole * (layout.accumulation > 1))
    if layout.zero >= 2 and layout.world_size > 1 and layout.engine == "torch":
        return np.full_like(produced, states.gradients)
    return np.maximum(produced, states.gradients) if _keeps_gradients(layout) else np.minimum(produced, whole)


def _reduced_by_deepspeed(layout: Layout, states: Memory, produced: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (bytes of gradients, bytes of buffers they are reduced in) under DeepSpeed, stages 1 and 2: after every
    operator of the last micro-step, and, last, at most while what is left is reduced after it.

    As deepspeed/runtime/zero/stage_1_and_2.py of version 0.19.8 (setup_buckets, reduce_ipg_grads, average_tensor,
    copy_grads_in_partition), and engine.py (_flush_coalesced_reduction_zero12): the bucket is made by the first
    gradient that is to be reduced and dropped with the last. A gradient that lies in it is let go of. A full one is
    copied flat to be sent; then the own part of all gradients comes to be, for the rest of the step.
    """
    whole, own = float(produced[-1]), 0.0 if layout.offload != "none" else states.gradients
    steps = np.diff(produced, prepend=0.0)
    # A gradient is not yet told from activations by the operator before: then it is looked for a place.
    arrivals = [(max(int(at) - 1, 0), float(steps[at])) for at in np.flatnonzero(steps >= 1)]
    kept, buffers = np.zeros(len(produced) + 1), np.zeros(len(produced) + 1)
    if layout.accumulation > 1 or layout.zero == 1:  # after the backward of the last micro-batch
        kept[:-1] = whole if layout.accumulation > 1 else produced
        kept[-1], buffers[-1] = whole, max(_BUCKET, own) if whole > _BUCKET else _BUCKET
        if layout.accumulation == 1 and arrivals:
            buffers[arrivals[0][0] : -1] = _BUCKET
        return kept, buffers
    if arrivals:
        buffers[arrivals[0][0] :] = _BUCKET
    filled = 0.0
    for at, size in [*arrivals, (len(produced), _BUCKET)]:  # last: the rest
        if filled and filled + size > _BUCKET:
            buffers[at] += filled if kept[at] else max(filled - own, 0.0)
            kept[at:], filled = own, 0.0
        filled += size
    return kept, buffers


def activations_over_time(config: Config, workload: Workload, layout: Layout, segments: list[Segment]) -> np.ndarray:
    """Returns bytes of activations and of what is gathered or reduced, after every operator of a micro-step."""
    return over_time(segments)[0] + _whole(config, workload, layout, segments)


def predict_states(config: Config, workload: Workload, layout: Layout) -> Memory:
    """Returns what a rank holds between steps, and all its gradients; nothing of a micro-step."""
    item = weight_dtype(config).itemsize
    held = sum(n for _, n in held_elements(workload, layout))
    trained = sum(n for p, n in held_elements(workload, layout) if p.trained)
    if layout.engine == "deepspeed":
        return _flat_states(config, workload, layout)
    updated, tensors = max(_updated(workload, layout))
    moments = moments_of(config.optim)
    copies = 0.0
    if are_kept(layout.apply(config), layout.world_size):
        copies = 2.0 * sum(p.numel for p in workload.parameters if p.copied)
    count = 4 * tensors if config.optim.name == "adamw" else 0  # of steps, one each
    return Memory(
        parameters=item * held + copies,
        gradients=item * trained,
        optimizer=(0 if layout.offload != "none" else item * moments * updated) + count,
        averages=item * held if config.optim.ema and layout.offload == "none" else 0.0,
        activations=0.0,
        gathered=0.0,
        workspace=0.0,
    )


def _flat_states(config: Config, workload: Workload, layout: Layout) -> Memory:
    """Returns what DeepSpeed's flat buffers hold: of every group of parameters, dense ones and experts apart, whole
    weights and the own part's masters and moments; in stage 3 parts of weights and gradients, too."""
    item, moments = weight_dtype(config).itemsize, moments_of(config.optim)
    whole: dict[tuple[int, bool], int] = {}  # elements of a buffer
    frozen = part = 0
    for p, numel in _held_with(workload, layout.degrees, False):
        spread = p.is_expert and layout.expert * layout.expert_shard > 1
        ranks = layout.expert_data if spread else layout.world_size
        if layout.zero == 3:
            numel = -(-numel // ranks)
        if p.trained:
            whole[p.group, spread] = whole.get((p.group, spread), 0) + numel
        else:
            frozen += numel
    for (group, spread), numel in whole.items():
        ranks = layout.expert_data if spread else layout.world_size
        if layout.zero < 3:
            numel = -(-numel // (_ALIGNED * ranks)) * _ALIGNED * ranks
            whole[group, spread] = numel
        part += numel if layout.zero == 3 else numel // ranks
    count = 4 * len(whole) if config.optim.name == "adamw" else 0
    return Memory(
        parameters=item * (sum(whole.values()) + frozen),
        gradients=item * part,
        optimizer=(0 if layout.offload != "none" else item * (moments + 1) * part) + count,
        averages=0.0,
        activations=0.0,
        gathered=0.0,
        workspace=_BUCKET if layout.zero == 3 else 0.0,
    )


def held_elements(workload: Workload, layout: Layout) -> list[tuple[Parameter, int]]:
    """Returns (parameter, elements of it that rank 0 keeps between steps)."""
    cuts = layout.world_size > 1 and layout.cuts_weights
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


def _updated(workload: Workload, layout: Layout) -> list[tuple[int, int]]:
    """Returns (elements, parameters) of rank after rank whose optimizer state it keeps; of one rank where all keep as
    many."""
    held = [(p, n) for p, n in held_elements(workload, layout) if p.trained]
    if layout.zero == 0 or layout.world_size == 1 or layout.cuts_weights:
        return [(sum(n for _, n in held), len(held))]
    largest_first = layout.engine == "torch"
    shares = []
    for is_expert, ranks in ((False, layout.world_size), (True, layout.expert_data)):
        sizes = tuple((p.group, n) for p, n in held if p.is_expert == is_expert)
        shares.append(_dealt_out(sizes, ranks, largest_first=largest_first))
    # Ranks that hold the same experts are so many apart.
    apart = layout.expert * layout.expert_shard
    return [
        (shares[0][r][0] + shares[1][r // apart][0], shares[0][r][1] + shares[1][r // apart][1])
        for r in range(layout.world_size)
    ]


@lru_cache(maxsize=64)
def _dealt_out(sizes: tuple[tuple[int, int], ...], ranks: int, *, largest_first: bool) -> list[tuple[int, int]]:
    """Returns (elements, parameters) that every rank gets where whole parameters are dealt out, each to the rank that
    has least; group after group, as ZeroRedundancyOptimizer and FairScale's OSS do it.

    sizes: (group, elements) in the order of the model.
    """
    loads = [(0, rank, 0) for rank in range(ranks)]
    for _, size in sorted(sizes, key=lambda row: (row[0], -row[1] * largest_first)):
        load, rank, count = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, rank, count + 1))
    return [(load, count) for _, load, count in sorted((rank, load, count) for load, rank, count in loads)]


def _keeps_gradients(layout: Layout) -> bool:
    """Returns whether gradients are whole from the first operator of the last micro-step on: they add up over several,
    or lie in buckets that are there from the start (DDP)."""
    return layout.accumulation > 1 or (layout.engine == "torch" and layout.zero <= 1 and layout.world_size > 1)


def _whole(config: Config, workload: Workload, layout: Layout, segments: list[Segment]) -> np.ndarray:
    return _gathered(config, workload, layout, segments) + _in_buckets(config, workload, layout, segments)


def _in_buckets(config: Config, workload: Workload, layout: Layout, segments: list[Segment]) -> np.ndarray:
    """Returns, after every operator, bytes of buckets into which expert gradients are copied before they are summed
    over replicas (parallel/expert_reduction.py): one sets out in the backward of its first layer."""
    over = [np.zeros(len(s.live)) for s in segments]
    ours = layout.engine != "deepspeed" and not (layout.engine == "torch" and layout.zero >= 2)
    if not ours or layout.expert_data == 1:
        return np.concatenate(over)
    item = weight_dtype(config).itemsize
    sizes: dict[str, float] = {}
    first, filled = "", 0.0
    for p, numel in held_elements(workload, layout):
        if p.trained and p.is_expert:
            if not filled or filled + item * numel > BUCKET_BYTES:
                first, filled = _block_of(p.name), 0.0
            filled += item * numel
            sizes[first] = max(sizes.get(first, 0.0), filled)
    for segment, extra in zip(segments, over):
        if segment.backward and segment.name in sizes:
            steps = np.diff(segment.gradients, prepend=0.0)
            # When the experts' first weight gets its own: that is not yet told from activations then.
            last = int(np.flatnonzero(steps >= 0.5 * steps.max())[-1])
            extra[max(last - 1, 0)] = sizes[segment.name]
    return np.concatenate(over)


def _block_of(name: str) -> str:
    """Returns the block that a parameter is in; "" for one outside."""
    words = name.split(".")
    return ".".join(words[: words.index("blocks") + 2]) if "blocks" in words else ""


def _gathered(config: Config, workload: Workload, layout: Layout, segments: list[Segment]) -> np.ndarray:
    """Returns, after every operator, bytes of what is whole on a rank that keeps a shard of it: parameters, the buffer
    that they came in, their gradients, and the buffer that these leave in. As torch's FSDP2 does it."""
    if not layout.cuts_weights or layout.world_size == 1:
        return np.zeros(sum(len(s.live) for s in segments))
    whole = _whole_blocks(config, workload, layout)
    if layout.engine == "deepspeed":
        return _gathered_by_deepspeed(whole, segments)
    root, keeps = whole.pop("", 0.0), layout.zero == 2
    before = dict(zip(list(whole)[1:], whole.values()))  # block -> bytes of the one before, which is gathered early
    # Kept: whole from forward to backward. Buffer: of the last gathering, or of the last reduction.
    kept, buffer, last, root_gradients = 0.0, root, 0.0, 0.0
    waiting = sum(whole.values()) + root if layout.accumulation > 1 else 0.0  # gradients of earlier micro-batches
    over = []
    for segment in segments:
        own, count = whole.get(segment.name, 0.0), len(segment.live)
        if not segment.backward:
            buffer, kept = own or buffer, kept + own * keeps
            over.append(np.full(count, root + (kept if keeps else own) + buffer + waiting))
            continue
        if segment.name == "+":
            # Nothing is gathered in this backward, so that the last buffer stays.
            last, buffer = buffer * keeps, 0.0
        produced = np.minimum(segment.gradients, own) if own else segment.gradients
        parameters = kept if keeps else own + before.get(segment.name, 0.0)
        alive = root + last + parameters + buffer + root_gradients + produced + waiting
        if own:  # resharded, then copied to the buffer of the reduction
            alive[-1] = root + last + parameters - own + root_gradients + 2 * own + waiting
            kept, buffer = kept - own * keeps, own
            waiting -= min(own, waiting)
        else:
            root_gradients += float(produced[-1])
        over.append(alive)
    over[-1][-1] += root
    return np.concatenate(over)


def _gathered_by_deepspeed(whole: dict[str, float], segments: list[Segment]) -> np.ndarray:
    """Returns, after every operator, bytes of parameters that are whole. Stage 3 lets go of what a module gathered only
    where the next use is far or too much is there (1e9 elements each by default): others stay until their backward."""
    stays = sum(whole.values()) <= _REUSED
    kept, over = whole.get("", 0.0), []
    for segment in segments:
        own = whole.get(segment.name, 0.0) if segment.name else 0.0  # "": what `kept` starts with
        here = kept + own * (not segment.backward or not stays)
        over.append(np.full(len(segment.live), here))
        if own and stays:
            kept += -own if segment.backward else own
    return np.concatenate(over)


@lru_cache(maxsize=32)
def _blocks_of(workload: Workload, key: tuple) -> tuple[tuple[str, int], ...]:
    expert, shard, data, is_deepspeed = key
    coordinates = {"expert": (0, expert), "expert_shard": (0, shard), "expert_data": (0, data)}
    found: dict[str, int] = {}
    for p in workload.parameters:
        if p.is_expert and data == 1 and not is_deepspeed:
            continue  # cut over nobody; DeepSpeed copies what it gathers also from one rank
        block = _block_of(p.name)
        found[block] = found.get(block, 0) + local_chunk(p.name, p.shape, coordinates).numel
    return tuple(found.items())


def _whole_blocks(config: Config, workload: Workload, layout: Layout) -> dict[str, float]:
    """Returns block -> bytes of its parameters once they are gathered; "" = those outside of blocks."""
    item = weight_dtype(config).itemsize
    key = layout.expert, layout.expert_shard, layout.expert_data, layout.engine == "deepspeed"
    return {name: float(item * numel) for name, numel in _blocks_of(workload, key)}
