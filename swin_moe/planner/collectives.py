"""What the ranks of a layout send each other in one optimizer step, by group; plain arithmetic."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from swin_moe.config import Config
from swin_moe.parallel.apply import BUCKET_BYTES
from swin_moe.planner.layouts import Layout
from swin_moe.planner.workload import PADDED, Workload, rows_share, weight_dtype

_ENCODED = {"none": None, "bf16": 2, "fp8": 1}  # bytes of an element that travels
_DDP_BUCKETS = (2**20, 25 * 2**20)  # bytes of the first one, and of others at most: torch's defaults


@dataclass(frozen=True)
class Collective:
    """Equal calls of one kind.

    bytes: Of one call: what a rank sends in an all-to-all, the whole of what is reduced or gathered else.
    stride: Ranks of the group are so many apart. beside: What it may run beside (backward, forward, experts, "" =
    nothing), and share: how much of that hides it.
    """

    kind: str  # one of hardware.KINDS
    phase: str  # exchange, reduction, update
    ranks: int
    stride: int
    bytes: float
    calls: int
    beside: str = ""
    share: float = 0.0


def collectives_of(config: Config, workload: Workload, layout: Layout) -> Iterator[Collective]:
    """Yields what is sent in a step. Passes of the network: forward, backward, and recomputed in backward."""
    forwards = _forwards(layout)
    yield from _rows(config, workload, layout, forwards)
    if layout.world_size == 1:
        return
    item = weight_dtype(config).itemsize
    dense = float(item * workload.numel(experts=False, trained=True))
    local = float(item * workload.numel(experts=True, trained=True) / (layout.expert * layout.expert_shard))
    stride = layout.expert * layout.expert_shard
    world, replicas = (layout.world_size, 1), (layout.expert_data, stride)
    for is_expert, size, (ranks, apart) in ((False, dense, world), (True, local, replicas)):
        if ranks == 1 or not size:
            continue
        if layout.cuts_weights:
            calls = workload.blocks * _gatherings(layout)
            yield Collective("all_gather", "reduction", ranks, apart, size / workload.blocks, calls, "forward", 0.8)
            yield Collective(
                "reduce_scatter", "reduction", ranks, apart, size / workload.blocks, workload.blocks, "backward", 0.8
            )
        elif layout.zero == 0:
            yield Collective("all_reduce", "reduction", ranks, apart, size, 1, "backward", 0.8)
        else:
            scattered = layout.engine == "deepspeed" or layout.zero == 2
            kind, hides = ("reduce_scatter", 0.0) if scattered else ("all_reduce", 0.8)
            yield Collective(kind, "reduction", ranks, apart, size, 1, "backward", hides)
            # torch's ZeroRedundancyOptimizer sends one weight after another.
            one_by_one = layout.engine == "torch" and layout.zero == 1
            calls = workload.tensors(experts=is_expert) if one_by_one else 1
            kind = "broadcast" if one_by_one else "all_gather"
            yield Collective(kind, "reduction", ranks, apart, size / calls, calls)


def small_collectives_of(config: Config, workload: Workload, layout: Layout) -> Iterator[Collective]:
    """Yields what is sent beside rows, gradients and parameters: few bytes, or none where what collectives_of has as
    one call leaves in several, of those after the first. What they take is their latency."""
    if layout.world_size == 1:
        return
    everyone, held = layout.world_size, layout.expert * layout.expert_shard
    if held > 1 and workload.moe:  # how many rows come, or how many a padded slot has to hold
        calls = _forwards(layout) * len(workload.moe)
        if config.model.moe.backend not in PADDED:
            yield Collective("all_to_all", "exchange", held, 1, 8.0 * config.model.moe.num_experts, calls)
        elif not config.model.moe.capacity_factor:
            yield Collective("all_reduce", "exchange", held, 1, 8.0, calls)
    yield Collective("all_reduce", "update", everyone, 1, 8.0, 1)  # the norm of gradients
    if layout.engine == "torch" and layout.cuts_weights:  # what is outside of blocks
        steps = layout.accumulation if layout.zero == 3 else 1
        yield Collective("all_gather", "reduction", everyone, 1, 0.0, steps)
        yield Collective("reduce_scatter", "reduction", everyone, 1, 0.0, 1)
        return
    if not weights_replicated(workload, layout):
        return
    yield Collective("all_reduce", "reduction", everyone, 1, 8.0, 1)  # which weights were used (engine/replicated.py)
    item, (first, other) = weight_dtype(config).itemsize, _DDP_BUCKETS
    more = max(0, -(-(item * workload.numel(experts=False, trained=True) - first) // other))
    yield Collective("all_reduce", "reduction", everyone, 1, 0.0, more, "backward", 0.8)
    if layout.expert_data > 1:
        sizes = (item * p.numel // held for p in workload.parameters if p.is_expert and p.trained)
        more = max(0, _buckets(sizes) - 1)
        yield Collective("all_reduce", "reduction", layout.expert_data, held, 0.0, more, "backward", 0.8)


def _buckets(sizes: Iterable[int]) -> int:
    """Returns how many buckets parallel/apply.py deals tensors of these bytes into."""
    count, filled = 0, 0
    for size in sizes:
        if not filled or filled + size > BUCKET_BYTES:
            count, filled = count + 1, 0
        filled += size
    return count


def weights_handled(workload: Workload, layout: Layout, item: int) -> tuple[int, float]:
    """Returns how often in a step FSDP2 takes one weight into its hands, to gather it or to send its gradient, and the
    bytes of all these. item: Bytes of an element."""
    if layout.world_size == 1 or not layout.cuts_weights:
        return 0, 0.0
    times = _gatherings(layout) + 1
    cut = [False] + [True] * (layout.expert_data > 1)
    local = [workload.numel(experts=e, trained=True) / (layout.expert * layout.expert_shard if e else 1) for e in cut]
    return times * sum(workload.tensors(experts=e) for e in cut), float(item * times * sum(local))


def weights_replicated(workload: Workload, layout: Layout) -> int:
    """Returns how many weights' gradients DDP reduces, or FairScale's or DeepSpeed's hooks in its place."""
    return workload.tensors(experts=False) if layout.world_size > 1 and not layout.cuts_weights else 0


def weights_of_library(workload: Workload, layout: Layout, item: int) -> tuple[int, float]:
    """Returns how often in a step FairScale or DeepSpeed takes one weight into its hands, and the bytes of all these.
    item: Bytes of an element."""
    times = _gatherings(layout) + 1 if layout.zero == 3 else 1
    experts = workload.numel(experts=True, trained=True) / (layout.expert * layout.expert_shard)
    local = workload.numel(experts=False, trained=True) + experts
    return times * (workload.tensors(experts=False) + workload.tensors(experts=True)), float(item * times * local)


def exchanges(workload: Workload, layout: Layout) -> int:
    """Returns how often in a step rows go to the experts of a layer and back, forward or backward."""
    is_spread = layout.expert * layout.expert_shard > 1
    return len(workload.moe) * (_forwards(layout) + layout.accumulation) * is_spread


def _forwards(layout: Layout) -> int:
    """Returns how often a step runs a block forward."""
    return (2 if layout.recompute == "block" else 1) * layout.accumulation


def _gatherings(layout: Layout) -> int:
    """Returns how often a step gathers a weight that is cut. FSDP2 gathers a block ahead of its backward, and has it
    there when it is computed again; DeepSpeed's modules gather by themselves."""
    if layout.zero != 3:
        return 1
    return layout.accumulation + (layout.accumulation if layout.engine == "torch" else _forwards(layout))


def _rows(config: Config, workload: Workload, layout: Layout, forwards: int) -> Iterator[Collective]:
    """Yields rows to the experts and back, their gradients, and shards of experts."""
    ranks = layout.expert * layout.expert_shard
    if ranks == 1:
        return
    item, share = bytes_of_channel(workload, layout), rows_share(config.model.moe)
    ways = 2 * (forwards + layout.accumulation)
    hides = (layout.overlap - 1) / layout.overlap
    for layer in workload.moe:
        size = float(layer.rows * layer.dim * item * layout.micro_batch) * share
        calls = ways * layout.overlap
        yield Collective("all_to_all", "exchange", ranks, 1, size / layout.overlap, calls, "experts", hides)
        if layout.expert_shard > 1:
            whole = 4.0 * layer.weights / layout.expert
            yield Collective("all_gather", "exchange", layout.expert_shard, 1, whole, forwards)
            yield Collective("reduce_scatter", "exchange", layout.expert_shard, 1, whole, layout.accumulation)


def bytes_of_channel(workload: Workload, layout: Layout) -> int:
    """Returns bytes of one channel of a row on its way."""
    return _ENCODED[layout.payload] or workload.row_bytes
