"""Runs one micro-step of a rank on fake tensors and returns its segments (trace.py), for any micro-batch."""

import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from swin_moe.config import Config, ModelConfig
from swin_moe.data.batch import Batch
from swin_moe.engine.precision import autocast
from swin_moe.engine.weight_copies import copies_of
from swin_moe.models.attention import stage_geometry
from swin_moe.models.network import Network
from swin_moe.models.swin import Block, SwinTransformer
from swin_moe.moe import MoELayer
from swin_moe.ops.attention.choice import Measuring
from swin_moe.ops.attention.geometry import Kept
from swin_moe.ops.linear import Ordinary
from swin_moe.optim import frozen_parameters
from swin_moe.parallel.sharding import Degrees, local_chunk
from swin_moe.planner.exchange import EvenDispatcher
from swin_moe.planner.layouts import Layout
from swin_moe.planner.trace import LiveBytes, Segment
from swin_moe.planner.workload import task_to_count, weight_dtype
from swin_moe.tasks.base import StepContext, Task

Blocks = tuple[tuple[int, ...], ...]  # some of each stage, ascending

_TRACED = (2, 3)  # images; with one image some reshapes give views that copy with more
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class MicroStep:
    """The segments of one micro-step for one or two micro-batches, from which those of others follow."""

    traced: Mapping[int, list[Segment]]  # images -> segments
    config: ModelConfig
    blocks: Blocks  # that were traced

    def at(self, images: int) -> list[Segment]:
        """Returns the segments of a whole network for a micro-batch of this size, in order of time."""
        found = self.traced.get(images)
        if found is None:
            (low, first), (high, second) = self.traced.items()
            share = (images - low) / (high - low)
            found = [_between(a, b, share) for a, b in zip(first, second)]
        return list(_repeated(found, self.config, self.blocks))

    def with_experts(self, other: "MicroStep") -> "MicroStep":
        """Returns the micro-step whose MoE blocks are another's, which need not have more of the network than these."""
        moe = self.config.moe.blocks
        traced = {}
        for images, segments in self.traced.items():
            others = {(s.name, s.backward): s for s in other.traced[images] if _is_of(moe, s.name)}
            traced[images] = [others.get((s.name, s.backward), s) for s in segments]
        return replace(self, traced=traced)

    def between(self, other: "MicroStep", share: float) -> "MicroStep":
        """Returns what lies on the line through two of the same blocks, share 0 = this, 1 = the other."""
        traced = {n: [_between(a, b, share) for a, b in zip(s, other.traced[n])] for n, s in self.traced.items()}
        return replace(self, traced=traced)


def trace_micro_step(
    config: Config,
    degrees: Degrees,
    rows: float = 1.0,
    *,
    images: int = 0,
    experts_only: bool = False,
    kernels: bool = False,
    here: bool = False,
) -> MicroStep:
    """Returns the micro-step of rank 0, which holds as much as any.

    Args:
        rows: Rows that arrive for this rank's experts, in shares of those that it sends; 1 = an even load.
        images: The only micro-batch that will be asked for; 0 = any.
        kernels: Attention by compiled kernels, as on a GPU, also where this machine has none.
        here: Operators that this processor would run, which it chooses by their sizes; only with `images`.
        experts_only: No other blocks than those with experts are wanted (MicroStep.with_experts).
    """
    blocks = _blocks_to_trace(config.model)
    if experts_only:
        blocks = tuple(
            tuple(b for b in chosen if b in moe) or chosen[:1]
            for chosen, moe in zip(blocks, (*config.model.moe.blocks, *((),) * len(blocks)))
        )
    elif degrees.world_size == 1 and config.engine.precision in ("bf16", "fp16"):
        # What one rank copies of weights (engine/weight_copies.py) comes together at the end, of all blocks.
        blocks = tuple(tuple(range(depth)) for depth in config.model.depths)
    sizes = [images] if images else _TRACED
    assert images or not here, "no line leads from one size's operators to another's"
    traced = {size: trace_exactly(config, degrees, size, rows, blocks, kernels=kernels, here=here) for size in sizes}
    return MicroStep(traced, config.model, blocks)


def micro_step_here(config: Config, layout: Layout) -> list[Segment]:
    """Returns the segments of a layout's micro-step with the operators that this processor would run."""
    images = layout.micro_batch
    return trace_micro_step(config, layout.degrees, images=images, here=True).at(images)


def trace_exactly(
    config: Config,
    degrees: Degrees,
    images: int,
    rows: float = 1.0,
    blocks: Blocks = (),
    *,
    kernels: bool = False,
    here: bool = False,
) -> list[Segment]:
    """Returns the segments of a micro-step with this many images, every block of the config run, or those given."""
    task = task_to_count(config)
    with torch.device("meta"):
        model = task.build_network()
    frozen = frozen_parameters(model, config.optim.freeze)
    if blocks:
        _leave(model, blocks)
    with FakeTensorMode():
        _hold(model, config, degrees, rows, frozen, here=here)
        copies = copies_of(model, config, world_size=degrees.world_size)
        known = [*model.parameters(), *model.buffers()]
        if copies is not None:
            known += [*copies.masters.values(), *copies.copies.values()]
        used = nullcontext() if copies is None else copies.used()
        chosen = _chosen(kernels=kernels, here=here)
        with chosen, LiveBytes(known) as bytes_alive, _watched(model, bytes_alive), used:
            batch = example_batch(config, images, task)
            precision = config.engine.precision
            context = StepContext(
                config, 1, degrees.world_size, config.data.global_batch, lambda: autocast(precision, _CPU), weight=1.0
            )
            loss = task.loss(model, batch, context)
            bytes_alive.mark("+", backward=True)
            loss.total.backward()
            if copies is not None:
                copies.collect()
                for master in copies.masters.values():
                    if master.grad is not None:
                        bytes_alive.is_gradient(master.grad)
            bytes_alive.end()
        return bytes_alive.segments


@contextmanager
def _chosen(*, kernels: bool, here: bool) -> Iterator[None]:
    """Counts compiled kernels of attention as there, where that is asked for; or lets tensors without memory choose all
    kernels of this processor, and find made what a process makes once."""
    before, Measuring.kernels = Measuring.kernels, kernels
    types = Ordinary.types
    Ordinary.types, Kept.fakes = ((*types, FakeTensor), {}) if here else (types, None)
    try:
        yield
    finally:
        Measuring.kernels, Ordinary.types, Kept.fakes = before, types, None


def example_batch(config: Config, images: int, task: Task) -> Batch:
    dtype = weight_dtype(config)
    size = (images, config.model.in_chans, *config.model.img_size)
    batch: Any = {
        "image": torch.empty(size, dtype=dtype),
        "target": torch.empty(images, dtype=torch.int64),
        "sample": torch.empty(images, dtype=torch.int64),
        "epoch": 0,
        "step": 1,
    }
    if task.needs_partners:  # neighbours, which are here, as an even micro-batch has them
        batch |= {"partner": torch.empty(images, dtype=torch.int64), "extra_target": torch.empty(0, dtype=torch.int64)}
        batch["extra_image"] = torch.empty((0, *size[1:]), dtype=dtype)
    if task.needs_views:
        batch["view"] = torch.empty(size, dtype=dtype)
    return batch


def _leave(model: Network, blocks: Blocks) -> None:
    """Takes the other blocks out of a network; those that stay keep their names."""
    for network in (m for m in model.modules() if isinstance(m, SwinTransformer)):
        layer = 0  # drop path has a factor for each block that is there
        for stage, chosen in zip(network.layers, blocks):
            for name, block in zip(list(stage.blocks._modules), list(stage.blocks)):
                if int(name) in chosen:
                    block.layer, layer = layer, layer + 1
                else:
                    del stage.blocks._modules[name]  # del of a list would name the others anew


def _hold(
    model: Network, config: Config, degrees: Degrees, rows: float, frozen: Collection[str], *, here: bool
) -> None:
    """Gives a network on meta this rank's parameters as fake tensors, and its MoE layers a dispatcher of even loads."""
    dtype = weight_dtype(config)
    coordinates = degrees.coordinates(0)
    model.train()
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{key}" if name else key
            shape = local_chunk(full, tuple(parameter.shape), coordinates).size
            wanted = parameter.requires_grad and full not in frozen
            setattr(module, key, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=wanted))
        for key, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if isinstance(module, MoELayer):
            module.dispatcher = EvenDispatcher(module.config, degrees, rows, in_one=here)
            if degrees.expert_shard > 1:
                module.experts.gather = module.dispatcher.gather_shards(module.experts.global_shapes())


@contextmanager
def _watched(model: Network, bytes_alive: LiveBytes) -> Iterator[None]:
    """Marks where blocks begin and end, in forward and in backward, and what becomes a parameter's gradient."""
    handles: list[Any] = []
    last: list[Any] = [lambda: None]  # the last block's output: its hook is where the next block's backward ends

    def begins(name: str) -> Any:
        def hook(block: nn.Module, inputs: tuple) -> None:
            x = inputs[0]
            if bytes_alive.backward:
                return  # computed again in backward
            bytes_alive.mark(name, backward=False)
            if x.requires_grad and x is not last[0]():
                x.register_hook(lambda _: bytes_alive.mark(f"{name}-", backward=True))

        return hook

    def ends(name: str) -> Any:
        def hook(block: nn.Module, inputs: tuple, outputs: tuple) -> None:
            if bytes_alive.backward:
                return
            bytes_alive.is_output(outputs[0])
            if outputs[0].requires_grad:
                outputs[0].register_hook(lambda _: bytes_alive.mark(name, backward=True))
                last[0] = weakref.ref(outputs[0])
            bytes_alive.mark(f"{name}+", backward=False)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Block):
            handles.append(module.register_forward_pre_hook(begins(name)))
            handles.append(module.register_forward_hook(ends(name)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            handles.append(
                parameter.register_post_accumulate_grad_hook(
                    lambda p: None if p.grad is None else bytes_alive.is_gradient(p.grad)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Blocks that do the same.


def _kinds(config: ModelConfig, stage: int) -> list[tuple]:
    """Returns what tells the blocks of a stage apart, in order."""
    shrunk, every = stage_geometry(config, stage).shrunk, config.extra_norm_every
    moe = config.moe.blocks[stage] if stage < len(config.moe.blocks) else ()
    return [
        (not shrunk and b % 2 == 1, b in moe, every > 0 and (b + 1) % every == 0) for b in range(config.depths[stage])
    ]


def _blocks_to_trace(config: ModelConfig) -> Blocks:
    """Returns the first block of every kind in each stage; and the very first block, which drops no path."""
    chosen = []
    for stage, depth in enumerate(config.depths):
        kinds, first = _kinds(config, stage), 1 if stage == 0 and depth > 1 else 0
        blocks = {kinds.index(kind, first) for kind in kinds[first:]}
        chosen.append(tuple(sorted({*blocks, 0} if first else blocks)))
    return tuple(chosen)


def _is_of(moe: Sequence[Sequence[int]], name: str) -> bool:
    """Returns whether a segment's name is that of a block with experts. moe: Such blocks of every stage."""
    place = _place(name)
    return place is not None and not place[3] and place[1] < len(moe) and place[2] in moe[place[1]]


def _place(name: str) -> tuple[str, int, int, str] | None:
    """Returns (what stands before "layers", stage, block, "" within it or what follows) of a segment's name."""
    words = name.rstrip("+-").split(".")
    if "layers" not in words:
        return None
    start = words.index("layers")
    tail = name[len(name.rstrip("+-")) :]
    return ".".join(words[:start]), int(words[start + 1]), int(words[start + 3]), tail


def _repeated(traced: list[Segment], config: ModelConfig, blocks: Blocks) -> Iterator[Segment]:
    """Yields the segments with those of blocks that were left out, after the traced block before them in forward and
    ahead of it in backward."""
    within = {(*place[:3], s.backward): s for s in traced if (place := _place(s.name)) and not place[3]}
    times: Counter[str] = Counter()  # name of a traced block -> blocks that are left out and do the same
    for segment in traced:
        place, copies = _place(segment.name), []
        if place is not None and not place[3]:
            prefix, stage, last, _ = place
            kinds, chosen = _kinds(config, stage), blocks[stage]
            for block in range(last + 1, next((b for b in chosen if b > last), config.depths[stage])):
                twin = max(b for b in chosen if kinds[b] == kinds[block])
                found, name = within[(prefix, stage, twin, segment.backward)], segment.name.removesuffix(str(last))
                times[found.name] += not segment.backward
                copies.append(replace(found, name=name + str(block)))
        whole = _with_deaths(segment, times)
        yield from (*reversed(copies), whole) if segment.backward else (whole, *copies)


def _with_deaths(segment: Segment, times: Mapping[str, int]) -> Segment:
    """Returns the segment in which what dies of a traced block also dies of those that do the same."""
    live = segment.live.copy()
    for (index, born), size in segment.deaths.items():
        if born != segment.name:
            live[index:] -= times.get(born, 0) * size
    return replace(segment, live=live)


def _between(a: Segment, b: Segment, share: float) -> Segment:
    """Returns the segment on the line through two, share 0 = a, 1 = b; by its ends and peaks where the number of
    operators depends on the images."""
    assert (a.name, a.backward) == (b.name, b.backward)
    if len(a.live) != len(b.live):
        a, b = _at_peak(a), _at_peak(b)
    fields = ("live", "gradients", "launches", "moved", "moved_by_products")
    values = {f: getattr(a, f) + share * (getattr(b, f) - getattr(a, f)) for f in fields}
    deaths = {key: size + share * (b.deaths.get(key, size) - size) for key, size in a.deaths.items()}
    operators, work = _work_between(a, b, share)
    return Segment(a.name, a.backward, deaths=deaths, operators=operators, work=work, **values)


def _work_between(a: Segment, b: Segment, share: float) -> tuple[tuple[tuple[str, str], ...], np.ndarray]:
    """Returns (operators, their work) on the line through two segments; by its sums where operators differ."""
    if a.operators == b.operators:
        return b.operators, a.work + share * (b.work - a.work)
    sums = a.work.sum(axis=0) + share * (b.work.sum(axis=0) - a.work.sum(axis=0))
    return b.operators, b.work * (sums / np.maximum(b.work.sum(axis=0), 1.0))


def _at_peak(segment: Segment) -> Segment:
    moments = [int(np.argmax(segment.live + segment.gradients)), -1]
    deaths: Counter[tuple[int, str]] = Counter()
    for (_, born), size in segment.deaths.items():
        deaths[1, born] += size  # type: ignore[assignment]
    return replace(segment, live=segment.live[moments], gradients=segment.gradients[moments], deaths=deaths)
