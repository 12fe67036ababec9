"""The one place that applies parallelism to a model, and the rule for expert gradients.

Why expert gradients are divided as they are. Let W ranks hold the batch, and let the whole loss be the mean of the
ranks' losses, L = (1/W) sum_r L_r (the trainer scales L_r so that this holds for unequal batches too).

* Dense: every rank has a copy of p and computes dL_r/dp. Averaging over the world gives (1/W) sum_r dL_r/dp = dL/dp.
* Expert: q exists once per expert-parallel group. Rank r's tokens reach q through the all-to-all, whose backward brings
  dL_r/dy of exactly those tokens back to q's owner. So backward leaves there sum_{r in group} dL_r/dq, already a *sum*
  over the group's ranks, and (where an expert is cut over ranks) the reduce-scatter of _GatherShards adds the shards'
  rows. Every rank is in exactly one such group, and the groups are the replicas over expert_data: an all-reduce *sum*
  over expert_data gives sum_r dL_r/dq over the world. Dividing by W gives dL/dq.

An engine that already averages over expert_data divides by expert x expert_shard only; hence `divisor`.
Checked by tests/equivalence/test_expert_parallel.py.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_moe.config import ParallelConfig
from swin_moe.layout import Chunk
from swin_moe.moe.dispatch import Dispatcher
from swin_moe.moe.experts import GroupedExperts
from swin_moe.moe.layer import MoELayer
from swin_moe.parallel.compile import compile_network
from swin_moe.parallel.exchange.all_to_all import ShardGather
from swin_moe.parallel.exchange.link import build_link
from swin_moe.parallel.groups import Groups
from swin_moe.parallel.rank_exchange import RankExchange
from swin_moe.parallel.sharding import local_chunk, placement
from swin_moe.registry import check_members, lookup

T = TypeVar("T", bound=Tensor)
M = TypeVar("M", bound=nn.Module)

# model.moe.backend -> builder(groups, number of experts, link) -> Dispatcher; link: what rows travel through, None
# where all experts are here. All take our routing, so that a routing group that spans ranks is nothing special to them.
DISPATCHERS = {
    "local": "swin_moe.parallel.exchange.all_to_all:local",
    "native": "swin_moe.parallel.exchange.all_to_all:native",
    "padded": "swin_moe.parallel.exchange.padded:padded",
    "tutel": "swin_moe.parallel.exchange.tutel:tutel",
}
BUCKET_BYTES = 32 * 2**20  # gradients reduced together: large enough to hide latency, small beside the experts


def _layers(model: nn.Module) -> Iterator[tuple[str, MoELayer]]:
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            yield name, module


def parallelize(model: M, parallel: ParallelConfig, groups: Groups) -> M:
    """Returns the model, changed in place: experts cut to this rank's part, rows dispatched over the expert group,
    routing decided over the routing group; then, as parallel.compile says, blocks or the network compiled.

    Works on meta, so that a rank never allocates experts of others; initialize or load afterwards or before.

    Raises:
        ValueError: The backend is unknown or cannot do it, the groups were built for other degrees, or the model is
            parallel already.
    """
    for value, kind in ((model, nn.Module), (parallel, ParallelConfig), (groups, Groups)):
        if not isinstance(value, kind):
            raise TypeError(f"parallelize(model, parallel, groups) takes a {kind.__name__}, got {type(value).__name__}")
    degrees = groups.degrees
    if parallel.expert not in (0, degrees.expert) or parallel.expert_shard not in (0, degrees.expert_shard):
        raise ValueError(f"groups of {degrees} do not fit {parallel}")
    exchange = None if groups.routing is None else RankExchange(groups.routing)
    for name, layer in _layers(model):
        layer.choice.exchange = exchange
        if layer.config.balance_scope == "global" and groups.world is not None:
            layer.choice.balance_exchange = RankExchange(groups.world)
        build = lookup(DISPATCHERS, layer.config.backend, key="model.moe.backend")
        layer.dispatcher = build(groups, layer.experts.num_experts, build_link(layer.config, groups))
        chosen = f"model.moe.backend={layer.config.backend}"
        check_members(layer.dispatcher, Dispatcher, chosen=chosen, where="swin_moe/moe/dispatch.py: Dispatcher")
        if groups.expert_size > 1:
            _cut_experts(name, layer.experts, groups)
    if parallel.compile != "none":
        hooked = parallel.zero >= 2 and groups.expert_data is not None  # FSDP2 gathers experts when they run
        compile_network(model, parallel.compile, sharded_experts=hooked)
    return model


def _cut_experts(name: str, experts: GroupedExperts, groups: Groups) -> None:
    """Keeps of a layer's experts what the sharding table gives this rank."""
    if experts.fc1_weight.shape != experts.global_shapes()["fc1_weight"]:
        shape = tuple(experts.fc1_weight.shape)
        raise ValueError(f"{name}.experts is cut to {shape} already; parallelize a model only once")
    chunks = {
        key: local_chunk(f"{name}.experts.{key}", shape, groups.coordinates)
        for key, shape in experts.global_shapes().items()
    }
    experts.keep({key: tuple(zip(chunk.offset, chunk.size)) for key, chunk in chunks.items()})
    if groups.shard is not None:
        experts.gather = ShardGather(groups, {key: shape[1] for key, shape in experts.global_shapes().items()})


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (name, parameter) of what differs between the ranks of an expert group."""
    return ((name, p) for name, p in model.named_parameters() if placement(name).is_expert)


def dense_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (name, parameter) of what every rank holds alike."""
    return ((name, p) for name, p in model.named_parameters() if not placement(name).is_expert)


def parameter_layout(model: nn.Module, groups: Groups) -> dict[str, tuple[tuple[int, ...], Chunk]]:
    """Returns name -> (global shape, the box of it that this rank holds) of every parameter, in the model's order."""
    shapes = {
        f"{name}.experts.{key}" if name else f"experts.{key}": shape
        for name, layer in _layers(model)
        for key, shape in layer.experts.global_shapes().items()
    }
    layout = {}
    for name, parameter in model.named_parameters():
        shape = shapes.get(name, tuple(parameter.shape))
        chunk = local_chunk(name, shape, groups.coordinates)
        assert chunk.size == tuple(parameter.shape), f"{name}: {tuple(parameter.shape)}, but {chunk} in the table"
        layout[name] = (shape, chunk)
    return layout


@torch.no_grad()
def reduce_expert_gradients(model: nn.Module, groups: Groups, divisor: float) -> None:
    """Sums expert gradients over the replicas of the experts and divides them; see the proof at the top of this file.

    Once per optimizer step, after the last backward. Collective: every rank calls it.

    Args:
        divisor: The world size, where nothing was averaged before.
    """
    gradients = [p.grad for _, p in expert_parameters(model) if p.grad is not None]
    if groups.expert_data is not None:
        for bucket in buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat, group=groups.expert_data)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket])):
                gradient.copy_(summed.view(gradient.shape))
    if divisor != 1 and gradients:
        torch._foreach_mul_(gradients, 1.0 / divisor)


def buckets(tensors: Sequence[T]) -> Iterator[list[T]]:
    """Yields runs of tensors that are reduced together, in order: of one dtype, at most BUCKET_BYTES or one larger
    tensor."""
    bucket: list[T] = []
    size = 0
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if bucket and (size + num_bytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += num_bytes
    if bucket:
        yield bucket
