"""The start-up summary: what will run, where, and why."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.config.choices import facts_of
from swin_moe.config.variants import VARIANTS
from swin_moe.engine.base import Engine
from swin_moe.engine.precision import DTYPES
from swin_moe.layout import Chunk, even_split
from swin_moe.models.attention import fused_problem
from swin_moe.moe import MoELayer
from swin_moe.ops.attention.in_windows import choose
from swin_moe.ops.extension import cpu_capability
from swin_moe.ops.grouped_linear import use_grouped
from swin_moe.ops.linear import SMALLEST_ROWS, faster_products
from swin_moe.parallel.sharding import Degrees, describe_placement
from swin_moe.run.expert_load import moe_layers
from swin_moe.run.session import Session


def parameter_counts(layout: Mapping[str, tuple[tuple[int, ...], Chunk]], session: Session) -> tuple[int, int, int]:
    """Returns (total, active per image, this rank's before ZeRO cuts them) numbers of parameters.

    Active counts top_k experts of every MoE layer, as the papers do; all of them with soft MoE. What no gradient moves
    is left out, as in the official counts: the expert bias frozen at zero (model.mlp_fc2_bias=false), and the bias that
    balances.
    """
    total = active = local = 0
    moe = session.config.model.moe
    used = facts_of(moe).active_experts(moe)
    for name, (shape, chunk) in layout.items():
        frozen = name.endswith("experts.fc2_bias") and not session.config.model.mlp_fc2_bias
        if frozen or name.endswith("router.balance.bias"):
            continue
        numel = math.prod(shape)
        total += numel
        active += numel * used // moe.num_experts if ".experts." in name else numel
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
        yield f"experts    {moe.num_experts} in {len(layers)} layers, {describe_choice(moe, scope)}"
        yield f"balance    {describe_balance(moe, micro_batch * session.world_size)}"
        if moe.group_limit:
            yield f"limit      {describe_limit(moe, degrees, groups.hosts)}"
        yield (
            f"layout     {session.world_size} ranks = {degrees.expert} expert x {degrees.expert_shard} shard x "
            f"{degrees.expert_data} data; dispatch: {type(layers[0][1].dispatcher).__name__}"
        )
        if session.world_size > 1:
            yield f"placement  {describe_placement(degrees, groups.hosts)}"
        yield from (f"exchange   {line}" for line in describe_links([layer for _, layer in layers]))
    else:
        yield f"layout     {session.world_size} ranks, data parallel"
    if session.plan:
        yield f"plan       {session.plan}"
    yield (
        f"engine     {config.engine.name}, ZeRO-{config.parallel.zero}, {config.engine.precision} on {session.device}, "
        f"recompute {config.parallel.recompute}, compile {config.parallel.compile}"
    )
    yield (
        f"batch      {config.data.global_batch} images = {session.world_size} ranks x {micro_batch} x "
        f"{accumulation} accumulated"
    )
    yield f"kernels    {attention_path(config.model, session.device.type, DTYPES[config.engine.precision])}"
    products = linear_path(session.device.type, config.engine.precision)
    if products:
        yield f"           {products}"
    if layers:
        yield f"           {product_path(layers[0][1], session.device, config.engine.precision)}"
    yield f"run        {session.directory}"


def describe_choice(moe: MoEConfig, scope: str) -> str:
    """Returns how tokens and experts come together. scope: What a routing group is."""
    shared = f", {moe.shared_experts} shared" if moe.shared_experts else ""
    return facts_of(moe).describe(moe, scope) + shared


def describe_balance(moe: MoEConfig, images: int) -> str:
    """Returns what keeps the load even. images: Of all ranks in one forward."""
    scope = f" over the {images} images of a forward on all ranks" if moe.balance_scope == "global" else ""
    parts = [] if moe.balance_loss == "none" else [f"{moe.balance_loss}{scope} x {moe.aux_loss_weight}"]
    parts += [f"bias, {moe.bias_rate} a step"] if moe.bias_rate else []
    parts += [f"z-loss x {moe.z_loss_weight}"] if moe.z_loss_weight else []
    return ", ".join(parts) or "no loss"


def describe_limit(moe: MoEConfig, degrees: Degrees, hosts: Sequence[int]) -> str:
    """Returns how many expert groups a token uses, and whether those are nodes; rank r runs on node hosts[r]."""
    size, span = moe.num_experts // moe.expert_groups, degrees.expert * degrees.expert_shard
    text = f"a token uses {moe.group_limit} of {moe.expert_groups} groups of {size} experts, "
    held = even_split(moe.num_experts, degrees.expert)
    most, apart = 1, True  # the most nodes of one expert group; whether no node has experts of two of them
    for start in range(0, len(hosts), span):
        nodes: list[set[int]] = [set() for _ in range(moe.expert_groups)]
        for rank in range(span):
            first, count = held[rank // degrees.expert_shard]
            for expert in range(first, first + count):
                nodes[expert // size].add(hosts[start + rank])
        most = max(most, *map(len, nodes))
        apart &= sum(map(len, nodes)) == len(set.union(*nodes))
    if len(set(hosts)) == 1:
        return text + "all on one node"
    if most == 1 and apart:
        return text + f"each on a node of its own: its rows go to at most {moe.group_limit} nodes"
    return text + f"which are not the nodes: a group is on up to {most}, and a node may hold several"


def describe_links(layers: list[MoELayer]) -> list[str]:
    """Returns what rows between ranks travel through, and why: one line per choice; none where they do not travel."""
    links = [link for link in (getattr(layer.dispatcher, "link", None) for layer in layers) if link is not None]
    counted = Counter(f"{link}{f' ({link.reason})' if link.reason else ''}" for link in links)
    return [line if len(counted) == 1 else f"{count} layers: {line}" for line, count in counted.items()]


def attention_path(config: ModelConfig, device_type: str, dtype: torch.dtype) -> str:
    """Returns which attention path runs, and why. dtype: Of queries, keys and values, as autocast makes them."""
    if VARIANTS[config.name].mixer == "mlp":
        return f"token mixing: one product per head (model.name={config.name} has no attention)"
    table_dtype = torch.promote_types(dtype, torch.float32)
    training, evaluation = (choose(device_type, dtype, table_dtype, gradients=g) for g in (True, False))
    plain = training if training == evaluation else f"{training} in training, {evaluation} in evaluation"
    setting = f"model.attention={config.attention}"
    if config.attention_chunk or config.attn_drop_rate:
        name = "attention_chunk" if config.attention_chunk else "attn_drop_rate"
        own = plain if config.attention in ("auto", "fused") else config.attention
        return f"window attention: {own}, window by window (model.{name}, {setting})"
    if config.attention not in ("auto", "fused"):
        return f"window attention: {config.attention} ({setting})"
    problem = fused_problem(config, device_type=device_type, dtype=dtype)
    measured = ", or what measures over 10 % faster" if config.attention == "auto" else ""
    if problem:
        return f"window attention: {plain}{measured} ({setting}); not fused: {problem}"
    kind = f"CPU kernels {cpu_capability()}" if device_type == "cpu" else f"{device_type.upper()} kernels"
    return f"window attention: fused, {kind}{measured} ({setting})"


def linear_path(device_type: str, precision: str) -> str:
    """Returns what computes large linear layers and why, where it is not what PyTorch takes; "" where it is."""
    reason = faster_products() if device_type == "cpu" and precision == "fp32" else None
    return f"linear layers and experts of {SMALLEST_ROWS} rows or more: oneDNN ({reason})" if reason else ""


def product_path(layer: MoELayer, device: torch.device, precision: str) -> str:
    """Returns how the experts' matrix products are computed, and why."""
    if layer.config.backend in ("padded", "tutel"):
        return f"experts: one batched product over padded rows (model.moe.backend={layer.config.backend})"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if use_grouped(device, dtype, layer.experts.dim, layer.experts.hidden_dim):
        return "experts: one grouped product (grouped_mm, bfloat16 on CUDA)"
    if device.type == "cuda":
        return "experts: one product per expert (grouped_mm wants bfloat16 and channels in multiples of 8)"
    return "experts: one product per expert (grouped_mm takes the same time on a CPU)"
