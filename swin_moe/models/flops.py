"""Multiply-accumulates of one image, by the formulas of the official flops() methods, and parameter counts.

Source: microsoft/Swin-Transformer, models/*.py. Their conventions are kept, because published numbers rest on them:
norms count one operation per element, the final pooling divides by 2 ** stages, windows are counted as a fraction where
they do not divide the map, biases and softmax are free, a router costs nothing.
"""

from collections.abc import Iterator

from torch import nn

from swin_moe.config import ModelConfig
from swin_moe.config.choices import facts_of
from swin_moe.models.attention import StageGeometry, stage_geometry


def official_flops(config: ModelConfig, *, spatial_mlp: bool, norm_after: bool) -> float:
    """Returns multiply-accumulates of one image at the nominal size; a MoE network counts capacity factor x top-k.

    A capacity by need (factor <= 0) counts as factor 1: what every token then costs. What the official code does not
    have (expert choice, soft MoE, shared experts) counts what it really costs, as in active_flops.

    Args:
        spatial_mlp: The mixer is Swin-MLP's.
        norm_after: Patch merging normalizes the reduced tokens (SwinV2).
    """
    factor = config.moe.capacity_factor
    return _total(config, factor if factor > 0 else 1.0, spatial_mlp=spatial_mlp, norm_after=norm_after)


def active_flops(config: ModelConfig, *, spatial_mlp: bool, norm_after: bool) -> float:
    """Returns multiply-accumulates one image really costs: official_flops with every token computed top-k times.

    Where experts choose, capacity factor x top-k times on average; with soft MoE its slots, and the products that mix
    tokens and slots; shared experts once each.
    """
    return _total(config, 1.0, spatial_mlp=spatial_mlp, norm_after=norm_after)


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trained parameter elements, the official "number of params"; works on meta.

    Frozen ones, such as the zero fc2 biases of experts without a trained bias, are not counted.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _total(config: ModelConfig, capacity_factor: float, *, spatial_mlp: bool, norm_after: bool) -> float:
    parts = part_flops(config, capacity_factor, spatial_mlp=spatial_mlp, norm_after=norm_after)
    return sum((macs for _, macs in parts), 0.0)


def part_flops(
    config: ModelConfig, capacity_factor: float, *, spatial_mlp: bool, norm_after: bool
) -> Iterator[tuple[str, float]]:
    """Yields (module, multiply-accumulates of one image) in the network's order: embedding, every block with its
    mixer, feed-forward network and norms, merging, head. The counts are the sum of these, in this order.

    capacity_factor: By which the products of experts are counted; see official_flops.
    """
    stages = len(config.depths)
    height, width = stage_geometry(config, 0).resolution
    patch = config.patch_size[0] * config.patch_size[1]
    yield "patch_embed.proj", height * width * config.embed_dim * config.in_chans * patch
    yield "patch_embed.norm", config.patch_norm * height * width * config.embed_dim
    for stage, depth in enumerate(config.depths):
        geometry = stage_geometry(config, stage)
        moe_blocks = config.moe.blocks[stage] if stage < len(config.moe.blocks) else ()
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            mixer = _spatial_mlp(geometry, block) if spatial_mlp else _attention(geometry, config.num_heads[stage])
            experts = _passes(config, geometry, capacity_factor) if block in moe_blocks else 1.0
            extra = config.extra_norm_every > 0 and (block + 1) % config.extra_norm_every == 0
            yield f"{name}.mixer", mixer
            yield f"{name}.mlp", _feed_forward(geometry, config.mlp_ratio, experts)
            yield f"{name}.norms", (2 + extra) * _norm(geometry)
        if stage < stages - 1:
            yield f"layers.{stage}.downsample", _merging(geometry, norm_after)
    num_features = config.embed_dim * 2 ** (stages - 1)
    yield "norm", num_features * height * width // 2**stages
    yield "head", num_features * config.num_classes


def _norm(geometry: StageGeometry) -> int:
    height, width = geometry.resolution
    return geometry.dim * height * width


def _feed_forward(geometry: StageGeometry, mlp_ratio: float, experts: float) -> float:
    height, width = geometry.resolution
    return 2 * height * width * geometry.dim * geometry.dim * mlp_ratio * experts


def _passes(config: ModelConfig, geometry: StageGeometry, capacity_factor: float) -> float:
    """Returns what a MoE block's feed-forward network costs, in passes of all tokens through one expert."""
    moe, tokens = config.moe, geometry.resolution[0] * geometry.resolution[1]
    hidden = geometry.dim * config.mlp_ratio
    passes = facts_of(moe).passes(moe, capacity_factor, tokens=tokens, hidden=hidden)
    return passes + moe.shared_experts


def _attention(geometry: StageGeometry, heads: int) -> float:
    height, width = geometry.resolution
    dim, tokens = geometry.dim, geometry.window**2
    windows = height * width / geometry.window / geometry.window
    scores_and_values = 2 * heads * tokens * (dim // heads) * tokens
    return windows * (4 * tokens * dim * dim + scores_and_values)


def _spatial_mlp(geometry: StageGeometry, block: int) -> float:
    (height, width), window = geometry.resolution, geometry.window
    if block % 2 == 1 and not geometry.shrunk and window > 1:
        windows = (height / window + 1) * (width / window + 1)  # a shift pads by one window in each direction
    else:
        windows = height * width / window / window
    return windows * geometry.dim * window**4


def _merging(geometry: StageGeometry, norm_after: bool) -> int:
    height, width = geometry.resolution
    norm = height * width * geometry.dim // 2 if norm_after else height * width * geometry.dim
    return norm + (height // 2) * (width // 2) * 4 * geometry.dim * 2 * geometry.dim
