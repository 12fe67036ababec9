"""The start-up summary: what will run, where, and why."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from swin_moe.engine.base import Engine
from swin_moe.expert_load import moe_layers
from swin_moe.layout import Chunk
from swin_moe.moe import MoELayer
from swin_moe.parallel.sharding import describe_placement
from swin_moe.session import Session


def parameter_counts(layout: Mapping[str, tuple[tuple[int, ...], Chunk]], session: Session) -> tuple[int, int, int]:
    """Returns (total, active per image, this rank's before ZeRO cuts them) numbers of parameters.

    Active counts top_k experts of every MoE layer, as the papers do. The expert bias that is frozen at zero
    (model.mlp_fc2_bias=false) is left out, as in the official counts.
    """
    total = active = local = 0
    moe = session.config.model.moe
    for name, (shape, chunk) in layout.items():
        if name.endswith("experts.fc2_bias") and not session.config.model.mlp_fc2_bias:
            continue
        numel = math.prod(shape)
        total += numel
        active += numel * moe.top_k // moe.num_experts if ".experts." in name else numel
        local += chunk.numel
    return total, active, local


def describe(session: Session, engine: Engine) -> Iterator[str]:
    """Yields the lines of the summary."""
    config, groups, model = session.config, session.groups, engine.local_model
    total, active, local = parameter_counts(engine.layout, session)
    cut = " (before sharding)" if config.parallel.zero >= 2 and session.world_size > 1 else ""
    micro_batch, accumulation = config.accumulation(session.world_size)
    yield (
        f"model      {config.model.name}, {total:,} parameters, {active:,} active, {local:,} on this rank{cut}, "
        f"{model.flops() / 1e9:.3f} GMACs per image ({model.active_flops() / 1e9:.3f} active)"
    )
    layers = moe_layers(model)
    if layers:
        moe, degrees = config.model.moe, groups.degrees
        scope = f"{moe.group_images} images" if moe.capacity_scope == "images" else "a rank's micro-batch"
        ranks = config.routing_ranks(session.world_size)
        scope += f" on {ranks} ranks" if ranks > 1 else ""
        yield (
            f"experts    {moe.num_experts} in {len(layers)} layers, top-{moe.top_k}, capacity factor "
            f"{moe.capacity_factor} within {scope}; evaluation {moe.eval_capacity_factor}"
        )
        yield (
            f"layout     {session.world_size} ranks = {degrees.expert} expert x {degrees.expert_shard} shard x "
            f"{degrees.expert_data} data; dispatch: {type(layers[0][1].dispatcher).__name__}"
        )
        if session.world_size > 1:
            yield f"placement  {describe_placement(degrees, groups.hosts)}"
        yield from (f"exchange   {line}" for line in describe_links([layer for _, layer in layers]))
    else:
        yield f"layout     {session.world_size} ranks, data parallel"
    yield (
        f"engine     {config.engine.name}, ZeRO-{config.parallel.zero}, {config.engine.precision} on {session.device}, "
        f"recompute {config.parallel.recompute}"
    )
    yield (
        f"batch      {config.data.global_batch} images = {session.world_size} ranks x {micro_batch} x "
        f"{accumulation} accumulated"
    )
    yield f"kernels    {attention_path(session.device, config.engine.precision)}"
    yield f"run        {session.directory}"


def describe_links(layers: list[MoELayer]) -> list[str]:
    """Returns what rows between ranks travel through, and why: one line per choice; none where they do not travel."""
    links = [link for link in (getattr(layer.dispatcher, "link", None) for layer in layers) if link is not None]
    counted = Counter(f"{link}{f' ({link.reason})' if link.reason else ''}" for link in links)
    return [line if len(counted) == 1 else f"{count} layers: {line}" for line, count in counted.items()]


def attention_path(device: torch.device, precision: str) -> str:
    """Returns which attention implementation runs, and why."""
    if device.type == "cuda":
        return "window attention: scaled_dot_product_attention (CUDA device); no compiled extension in this version"
    if precision in ("bf16", "fp16"):
        return "window attention: eager (half precision on CPU, where torch's fused kernel is slower)"
    return "window attention: analytic backward in training, scaled_dot_product_attention in evaluation (CPU)"
