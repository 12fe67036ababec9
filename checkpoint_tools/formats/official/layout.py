"""The official module tree: order of its tensors, its buffers, and the parameter groups of its optimizer.

Facts: microsoft/Swin-Transformer, models/swin_transformer*.py, optimizer.py (set_weight_decay,
get_finetune_param_groups); microsoft/Tutel, tutel/impls/moe_layer.py.

Shape legend: N tokens of a window, W windows of a feature map.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.config.variants import VARIANTS

# A module's own parameters and buffers come before its children; one order serves every level.
_ORDER = (
    "absolute_pos_embed", "mask_token", "encoder", "patch_embed", "layers", "blocks", "attn_mask", "norm1",
    "logit_scale", "q_bias", "v_bias", "relative_position_bias_table", "relative_coords_table",
    "relative_position_index", "cpb_mlp", "qkv", "attn", "spatial_mlp", "norm2", "mlp", "fc1", "fc2", "router",
    "_moe_layer", "_num_global_experts", "experts", "gates", "batched_fc1_w", "batched_fc2_w", "batched_fc1_bias",
    "batched_fc2_bias", "temperature", "sim_matrix", "projector", "cosine_projector", "wg", "fc1_weight",
    "fc1_bias", "fc2_weight", "fc2_bias", "enorm", "proj", "reduction", "weight", "bias", "downsample", "norm", "head",
    "decoder",
)  # fmt: skip
_BUFFERS = ("attn_mask", "relative_coords_table", "relative_position_index", "_num_global_experts")
_MASKED = -100.0  # what the official mask adds instead of minus infinity


def module_order(name: str) -> tuple:
    """Returns a key that sorts official names as state_dict() and named_parameters() list them."""
    unknown = len(_ORDER)
    return tuple(
        (0, int(p), "") if p.isdecimal() else (1, _ORDER.index(p) if p in _ORDER else unknown, p)
        for p in name.split(".")
    )


def is_buffer(name: str) -> bool:
    """Returns whether an official name is a buffer, which the optimizer never sees."""
    return name.rpartition(".")[2] in _BUFFERS


def frozen_bias(name: str) -> bool:
    """Returns whether a parameter, by its official name or ours, is one that MLP_FC2_BIAS=False freezes."""
    return name.endswith(("experts.batched_fc2_bias", "experts.fc2_bias"))


class StageGeometry(NamedTuple):
    """Sides of a stage in tokens, and its window."""

    height: int
    width: int
    window: int


def stage_geometry(model: Mapping[str, Any], stage: int) -> StageGeometry:
    """Returns the geometry at the nominal image size; a window larger than the map shrinks to it."""
    height, width = (size // patch >> stage for size, patch in zip(model["img_size"], model["patch_size"], strict=True))
    return StageGeometry(height, width, min(height, width, model["window_size"]))


def official_buffers(model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns every buffer of the dense part of an official model under its official name.

    Args:
        model: config.model as JSON; img_size and window_size must be known.
    """
    buffers: dict[str, np.ndarray] = {}
    variant = VARIANTS[model["name"]]
    if variant.mixer == "mlp":
        return buffers
    pretrained = [*model.get("pretrained_window_sizes", ()), *(0 for _ in model["depths"])]
    for stage, depth in enumerate(model["depths"]):
        geometry = stage_geometry(model, stage)
        index, table = position_index(geometry.window), coordinates(geometry.window, pretrained[stage])
        mask = shift_mask(geometry)
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            buffers[f"{prefix}.attn.relative_position_index"] = index
            if variant.bias == "log_cpb":
                buffers[f"{prefix}.attn.relative_coords_table"] = table
            if block % 2 and mask is not None:
                buffers[f"{prefix}.attn_mask"] = mask
    return buffers


def position_index(window: int) -> np.ndarray:
    """Returns (N, N) int64: the row of the bias table for each pair of tokens of a window."""
    rows, columns = (axis.reshape(-1) for axis in np.indices((window, window)))
    height = rows[:, None] - rows[None, :] + window - 1
    width = columns[:, None] - columns[None, :] + window - 1
    return height * (2 * window - 1) + width


def coordinates(window: int, pretrained: int) -> np.ndarray:
    """Returns (1, 2w-1, 2w-1, 2) float32, the inputs of the bias network: sign(x) log2(|x| + 1) / 3, x in [-8, 8].

    Equal to torch's to within one unit in the last place: the logarithm of float32 depends on the processor there.
    """
    axis = np.arange(-(window - 1), window, dtype=np.float32)
    table = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)[None]
    scaled = table / np.float32(max((pretrained or window) - 1, 1)) * np.float32(8)
    return (np.sign(scaled) * np.log2(np.abs(scaled) + np.float32(1)) / np.float32(3)).astype(np.float32)


def shift_mask(geometry: StageGeometry) -> np.ndarray | None:
    """Returns (W, N, N) float32 of 0 and -100 for a shifted block; None where one window covers the map."""
    height, width, window = geometry
    if min(height, width) <= window:
        return None
    shift = window // 2
    region = np.zeros((height, width), np.int64)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        region[rows, columns] = number
    tiles = region.reshape(height // window, window, width // window, window).transpose(0, 2, 1, 3)
    numbers = tiles.reshape(-1, window * window)
    return np.where(numbers[:, :, None] == numbers[:, None, :], 0.0, _MASKED).astype(np.float32)


# Of all families: no family has a parameter that only another one excludes. Ours: router.projector.
_KEYWORDS = (
    "cpb_mlp",
    "logit_scale",
    "relative_position_bias_table",
    "fc1_bias",
    "fc2_bias",
    "temperature",
    "cosine_projector",
    "router.projector",
    "sim_matrix",
)


def has_decay(name: str, num_dims: int) -> bool:
    """Returns whether weight decay applies to a parameter of an official name, or of ours.

    The rule of optimizer.py:set_weight_decay there. SimMIM's names begin with "encoder.", which that rule forgets for
    keywords: those parameters do decay.
    """
    inner = name.removeprefix("encoder.")
    if num_dims == 1 or name.endswith(".bias") or inner in ("absolute_pos_embed", "mask_token"):
        return False
    return inner != name or not any(keyword in name for keyword in _KEYWORDS)


def layer_number(name: str, depths: list[int]) -> int:
    """Returns the layer of a parameter in the official layer-wise decay; optimizer.py:get_swin_layer there."""
    match = re.match(r"(?:encoder\.)?layers\.(\d+)\.(?:blocks\.(\d+)\.)?", name)
    if match is None:
        early = name.removeprefix("encoder.").startswith(("patch_embed", "mask_token"))
        return 0 if early else sum(depths) + 1
    stage = int(match[1])
    if match[2] is None:
        return sum(depths[: stage + 1])
    return sum(depths[:stage]) + int(match[2]) + 1


def plan_groups(parameters: Mapping[str, tuple[int, ...]], *, layered: bool) -> dict[str, list[str]]:
    """Returns the names of each group of an official optimizer, in its order, by the group's name.

    Args:
        parameters: Official name -> shape of the trainable parameters, in module order.
        layered: With layer-wise decay (SimMIM fine-tuning): a group per layer, in the order of their first parameters.
    """
    named: dict[str, list[str]] = {} if layered else {"decay": [], "no_decay": []}
    depths = stage_depths(parameters)
    for name, shape in parameters.items():
        kind = "decay" if has_decay(name, len(shape)) else "no_decay"
        named.setdefault(f"layer_{layer_number(name, depths)}_{kind}" if layered else kind, []).append(name)
    return named


def group_names(groups: list[Mapping[str, Any]], parameters: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Returns, for each group of an official optimizer, the names of its parameters in order.

    Args:
        groups: `param_groups` of its state dict.
        parameters: As for plan_groups.

    Raises:
        CheckpointError: The groups do not have as many parameters as the rule gives them.
    """
    layered = all("group_name" in group for group in groups)
    found = list(plan_groups(parameters, layered=layered).values())
    if not layered and len(groups) == 1:
        found = [list(parameters)]
    counts, wanted = [len(names) for names in found], [len(group["params"]) for group in groups]
    if counts != wanted:
        raise CheckpointError(
            f"the optimizer's groups have {wanted} parameters, the official rule gives {counts}: its moments cannot be "
            f"told apart"
        )
    return found


def stage_depths(names: Iterable[str]) -> list[int]:
    """Returns the number of blocks of each stage that official names speak of."""
    depths: dict[int, int] = {}
    for name in names:
        match = re.search(r"(?:^|\.)layers\.(\d+)\.blocks\.(\d+)\.", name)
        if match:
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    return [depths[stage] for stage in sorted(depths)]


def in_module_order(names: Iterable[str]) -> list[str]:
    """Returns official names in the order of the official state_dict()."""
    return sorted(names, key=module_order)
