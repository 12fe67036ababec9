"""Which networks other programs compute as we do: where their windows, padding or parts differ, no file is written.

Ours pads a map at the bottom and right to whole windows, shifts, and shrinks a window larger than its map to the
smaller side, without a shift then. Facts: microsoft/Swin-Transformer, models/swin*.py (no padding at all);
huggingface/pytorch-image-models, timm/models/swin_transformer*.py:SwinTransformerBlock (shifts, then pads; shrinks each
side by itself); huggingface/transformers, models/swin/modeling_swin.py (bias tables of the whole window, whatever the
map) and models/swinv2/modeling_swinv2.py (shrinks both sides to the height).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.formats.infer import window_of_stage
from checkpoint_tools.formats.official.layout import StageGeometry, stage_geometry
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.config.variants import VARIANTS


def check_geometry(path: Path, network: Mapping[str, Any], program: str) -> None:
    """Raises CheckpointError, naming the stage, for a network that `program` would compute otherwise than we do.

    Args:
        network: config.model as JSON; without image size or window nothing can be said, and is not.
        program: "official", "timm" or "transformers".
    """
    if "img_size" not in network or "window_size" not in network:
        return
    depths = network["depths"]
    stages = [stage_geometry(network, stage) for stage in range(len(depths))]
    if not all(map(all, stages)):
        size = "x".join(map(str, network["img_size"]))
        raise CheckpointError(f"{path}: its {len(stages)} stages leave no tokens of an image of {size} pixels")
    for stage, (depth, geometry) in enumerate(zip(depths, stages)):
        last = stage + 1 == len(depths)
        for why in _differences(network, geometry, program, depth=depth, last=last):
            size = f"a map of {geometry.height} x {geometry.width} and windows of {geometry.window} tokens"
            raise CheckpointError(f"{path}: stage {stage} has {size}, {why}")


def _differences(
    network: Mapping[str, Any], geometry: StageGeometry, program: str, *, depth: int, last: bool
) -> Iterator[str]:
    """Yields why a program would not compute a stage as we do."""
    height, width, window = geometry
    padded = height % window or width % window
    shrunk = min(height, width) <= network["window_size"]
    if program == "official":
        if padded:
            yield "but the official code does not pad maps to whole windows"
        if not last and (height % 2 or width % 2):
            yield "but the official code merges patches of even maps only"
    if program == "timm":
        if not last and (height % 2 or width % 2):
            yield "but timm rounds the next stage's map up where ours is measured rounded down"
        if padded and depth > 1 and not shrunk and window > 1:
            yield "but timm pads maps after the shift, and so computes something else"
        if shrunk and height != width:
            yield "but timm shrinks the windows of each side by itself"
    if program == "transformers":
        if window < network["window_size"] and network["name"] == "swin":
            yield f"but transformers' Swin has bias tables of the whole window of {network['window_size']} everywhere"
        if shrunk and width < height and network["name"] == "swinv2":
            yield "but transformers shrinks windows to the height of the map"


def check_given(path: Path, network: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError for sizes given with --set that the tensors contradict: nothing is resized by a tool.

    Args:
        network: config.model as JSON, with what was given; nothing is said where it is incomplete.
        shapes: Our names of the tensors -> their shapes.
    """
    remedy = f"; checkpoint.init={path} and swin_moe.load resize them"
    positions = shapes.get("absolute_pos_embed")
    if positions is not None and "img_size" in network:
        stored = math.prod(positions[2:] if len(positions) == 4 else positions[1:2])
        height, width = (size // patch for size, patch in zip(network["img_size"], network["patch_size"], strict=True))
        if stored != height * width:
            image = "x".join(map(str, network["img_size"]))
            raise CheckpointError(
                f"{path}: --set img_size: an image of {image} pixels has {height * width} tokens, and the absolute "
                f"positions are of {stored}{remedy}"
            )
    for stage in range(len(network.get("depths", ()))):
        stored, given = window_of_stage(shapes, stage), network.get("window_size", 0)
        wanted = stage_geometry(network, stage).window if given and "img_size" in network else min(stored, given)
        if stored and given and stored != wanted:
            resized = remedy if VARIANTS[network["name"]].mixer == "window" else ""
            raise CheckpointError(
                f"{path}: --set: the parameters of stage {stage} are of windows of {stored} tokens, and these sizes "
                f"make them {wanted}{resized}"
            )


def check_parts(path: Path, network: Mapping[str, Any], names: Iterable[str], program: str) -> None:
    """Raises CheckpointError, naming the option, for a network with a part that timm and transformers do not have."""
    names = set(names)
    absent = {
        "model.ape=true": network.get("ape"),
        "model.patch_norm=false": "patch_embed.norm.weight" not in names,
        f"model.qk_scale={network.get('qk_scale')}": network.get("qk_scale") is not None,
        "model.mlp_fc2_bias=false": not any(name.endswith(".mlp.fc2.bias") for name in names),
    }
    for option, is_so in absent.items():
        if is_so:
            raise CheckpointError(f"{path}: has {option}, which {program} has no option for")
