"""What the names and shapes of a checkpoint's tensors say about its network, for formats that keep no configuration."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.config.variants import VARIANTS

Shapes = Mapping[str, tuple[int, ...]]


def infer_model(path: Path, shapes: Shapes, buffers: Shapes | None = None) -> dict[str, Any]:
    """Returns the options of config.model that the shapes determine, as JSON; `moe` holds those of config.model.moe.

    Args:
        path: Of the checkpoint, for errors.
        shapes: Our name -> shape, of parameters; other tensors are passed over.
        buffers: The same of an official file's masks, tables and indices, which tell window and image size.

    Raises:
        CheckpointError: A shape is none of a Swin network's.
    """
    if "patch_embed.proj.weight" not in shapes:
        return {}
    try:
        return _infer(shapes, buffers or {})
    except (ValueError, IndexError, ZeroDivisionError):
        raise CheckpointError(f"{path}: the shapes of its tensors are not those of a Swin network") from None


def _infer(shapes: Shapes, buffers: Shapes) -> dict[str, Any]:
    embed_dim, channels, *patch = shapes["patch_embed.proj.weight"]
    depths = _depths(shapes)
    model: dict[str, Any] = {
        "name": _family(shapes),
        "patch_size": list(patch),
        "in_chans": channels,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": [_heads(shapes, stage) for stage in range(len(depths))],
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        "ape": "absolute_pos_embed" in shapes,
        "patch_norm": "patch_embed.norm.weight" in shapes,
    }
    if VARIANTS[_family(shapes)].mixer == "window":
        model["qkv_bias"] = any(name.endswith((".attn.qkv.bias", ".attn.q_bias")) for name in shapes)
    first = next((shapes[name] for name in sorted(shapes) if name.endswith("0.mlp.fc1.weight")), None)
    if first is not None:
        model["mlp_ratio"] = first[0] / first[1]
        model["mlp_fc2_bias"] = any(name.endswith(".mlp.fc2.bias") for name in shapes)
    window = _window(shapes, buffers)
    if window:
        model["window_size"] = window
    side = _image_side(shapes, buffers)
    if side:
        model["img_size"] = [side * n for n in patch]
    every = [int(m[1]) + 1 for name in shapes if (m := re.search(r"blocks\.(\d{1,4})\.enorm\.weight$", name))]
    if every:
        model["extra_norm_every"] = min(every)
    moe = _infer_moe(shapes, len(depths))
    return model | ({"moe": moe} if moe else {})


def _depths(shapes: Shapes) -> list[int]:
    blocks = [re.match(r"layers\.(\d{1,2})\.blocks\.(\d{1,4})\.", name) for name in shapes]
    found: dict[int, int] = {}
    for match in filter(None, blocks):
        found[int(match[1])] = max(found.get(int(match[1]), 0), int(match[2]) + 1)
    return [found.get(stage, 0) for stage in range(max(found, default=-1) + 1)]


def _family(shapes: Shapes) -> str:
    """Returns model.name: the families differ in the parameters of their mixers; of two that do not, the first."""
    endings = {name.rpartition("blocks.")[2].partition(".")[2] for name in shapes}
    biases = {"attn.relative_position_bias_table": "table", "attn.cpb_mlp.0.weight": "log_cpb"}
    bias = next((kind for ending, kind in biases.items() if ending in endings), "none")
    cosine = "attn.logit_scale" in endings
    found = [name for name in VARIANTS if _mixer_parameters(name) == (bias, cosine)]
    if not found:
        raise ValueError("a mixture of families")
    return found[0]


def _mixer_parameters(family: object) -> tuple[str, bool] | None:
    """Returns what tells a family by its tensors: (kind of position bias, whether scores have a scale)."""
    variant = VARIANTS.get(family) if isinstance(family, str) else None
    return None if variant is None else (variant.bias, variant.scores == "cosine")


def _heads(shapes: Shapes, stage: int) -> int:
    block = f"layers.{stage}.blocks.0"
    for name, dim in (("logit_scale", 0), ("relative_position_bias_table", 1), ("cpb_mlp.2.weight", 0)):
        shape = shapes.get(f"{block}.attn.{name}")
        if shape:
            return shape[dim]
    rows, tokens, _ = shapes.get(f"{block}.spatial_mlp.weight", (0, 1, 1))
    return rows // tokens


def _window(shapes: Shapes, buffers: Shapes) -> int:
    """Returns the window of the first stage; 0 where nothing tells it."""
    index = buffers.get("layers.0.blocks.0.attn.relative_position_index")
    return window_of_stage(shapes, 0) or (math.isqrt(index[0]) if index else 0)


def window_of_stage(shapes: Shapes, stage: int) -> int:
    """Returns the window that the parameters of a stage are of; 0 where they are of any, or not there."""
    block = f"layers.{stage}.blocks.0"
    table = shapes.get(f"{block}.attn.relative_position_bias_table")
    if table:
        return (math.isqrt(table[0]) + 1) // 2
    mixer = shapes.get(f"{block}.spatial_mlp.weight")
    return math.isqrt(mixer[1]) if mixer else 0


def _image_side(shapes: Shapes, buffers: Shapes) -> int:
    """Returns the side of a square image in patches; 0 where nothing tells it, or what does is of no square."""
    if len(shapes.get("absolute_pos_embed", ())) == 4:  # of a backbone of dense tasks: (1, C, H, W)
        return shapes["absolute_pos_embed"][2] if len(set(shapes["absolute_pos_embed"][2:])) == 1 else 0
    if "absolute_pos_embed" in shapes:
        return _exact_root(shapes["absolute_pos_embed"][1])
    for name, shape in sorted(buffers.items()):
        match = re.match(r"layers\.(\d{1,2})\.blocks\.\d{1,4}\.attn_mask$", name)
        if match:
            return _exact_root(shape[0] * shape[1]) << int(match[1])
    return 0


def _exact_root(number: int) -> int:
    """Returns the square root of a square number, else 0."""
    root = math.isqrt(number)
    return root if root * root == number else 0


def _infer_moe(shapes: Shapes, stages: int) -> dict[str, Any]:
    blocks: list[list[int]] = [[] for _ in range(stages)]
    moe: dict[str, Any] = {}
    for name, shape in shapes.items():
        match = re.match(r"layers\.(\d{1,2})\.blocks\.(\d{1,4})\.mlp\.experts\.fc1_weight$", name)
        if match:
            blocks[int(match[1])].append(int(match[2]))
            moe["num_experts"] = shape[0]
        if name.endswith(".mlp.router.sim_matrix"):
            moe |= {"router": "cosine", "cosine_dim": shape[0]}
        elif name.endswith(".mlp.router.weight"):
            moe["router"] = "linear"
    if "num_experts" not in moe:
        return {}
    return moe | {"blocks": [sorted(stage) or [-1] for stage in blocks]}


def merge_model(
    config: Mapping[str, Any], inferred: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns a config whose model section agrees with what the tensors are; all else is kept.

    An image that is stated counts: tensors tell how many tokens it has, and not whether it is a square. So does a
    family whose parameters are those of the one found. Above both stands what was `given` with --set.
    """
    model = dict(config.get("model", {}))
    inferred = {key: value for key, value in inferred.items() if key != "img_size" or not _is_stated(model, value)}
    if "name" in inferred and _mixer_parameters(model.get("name")) == _mixer_parameters(inferred["name"]):
        del inferred["name"]
    moe = {**model.get("moe", {}), **inferred.get("moe", {})}
    model |= {key: value for key, value in inferred.items() if key != "moe"} | dict(given or {})
    return {**config, "model": model | ({"moe": moe} if moe else {})}


def _is_stated(model: Mapping[str, Any], found: list[int]) -> bool:
    """Returns whether a model section names an image of as many pixels as the square that was found."""
    stated = model.get("img_size")
    return isinstance(stated, list | tuple) and len(stated) == 2 and math.prod(stated) == math.prod(found)


def known_step(path: Path, step: int | None, options: Options) -> tuple[int, bool]:
    """Returns (optimizer steps: those found, else those given with --set; whether nobody knows them).

    Raises:
        CheckpointError: What is given is no number, or not what was found.
    """
    given = options.extra.get("step")
    if given is not None and not given.isdecimal():
        raise CheckpointError(f"--set step must be a number of optimizer steps, got {given!r}")
    if given is not None and step and int(given) != step:
        raise CheckpointError(f"{path}: --set step={given} is for files that do not tell it; this one is of {step}")
    if given is not None:
        return int(given), False
    return step or 0, step is None


def given_sizes(extra: Mapping[str, str]) -> dict[str, Any]:
    """Returns the sizes given with --set, for sources that do not tell them."""
    sizes: dict[str, Any] = {}
    for key in ("img_size", "window_size"):
        if key in extra:
            sides = extra[key].split(",", 1) if key == "img_size" else [extra[key]]
            if not all(side.isdecimal() and int(side) for side in sides):
                of = "pixels, or two: H,W" if key == "img_size" else "tokens"
                raise CheckpointError(f"--set {key} must be a number of {of}, got {extra[key]!r}")
            sizes[key] = [int(sides[0]), int(sides[-1])] if key == "img_size" else int(extra[key])
    return sizes
