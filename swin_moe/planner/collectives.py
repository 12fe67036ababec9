"""What the ranks of a layout send each other in one optimizer step, by group; plain arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass

from swin_moe.config import Config
from swin_moe.planner.layouts import Layout
from swin_moe.planner.workload import Workload, rows_share, weight_dtype

_ENCODED = {"none": None, "bf16": 2, "fp8": 1}  # bytes of an element that travels


@dataclass(frozen=True)
class Collective:
    """Equal calls of one kind.

    bytes: Of one call: what a rank sends in an all-to-all, the whole of what is reduced or gathered else.
    stride: Ranks of the group are so many apart. beside: What it may run beside (backward, forward, experts, "" =
    nothing), and share: how much of that hides it.
    """

    kind: str  # one of hardware.KINDS
    phase: str  # exchange, reduction
    ranks: int
    stride: int
    bytes: float
    calls: int
    beside: str = ""
    share: float = 0.0


def collectives_of(config: Config, workload: Workload, layout: Layout) -> Iterator[Collective]:
    """Yields what is sent in a step. Passes of the network: forward, backward, and recomputed in backward."""
    forwards = (2 if layout.recompute == "block" else 1) * layout.accumulation
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
            calls = workload.blocks * _gatherings(layout, forwards)
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


def tensors_passed(workload: Workload, layout: Layout) -> int:
    """Returns how often in a step a library takes one weight into its hands, to gather it or to send its gradient."""
    if layout.world_size == 1 or not layout.cuts_weights:
        return 0
    forwards = (2 if layout.recompute == "block" else 1) * layout.accumulation
    tensors = workload.tensors(experts=False) + (workload.tensors(experts=True) if layout.expert_data > 1 else 0)
    return tensors * (_gatherings(layout, forwards) + 1)


def _gatherings(layout: Layout, forwards: int) -> int:
    """Returns how often a step gathers a weight that is cut."""
    return forwards + layout.accumulation if layout.zero == 3 else 1


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
