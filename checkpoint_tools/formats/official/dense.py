"""Files of the official detection and segmentation repositories: {"meta", "state_dict"}, with the names of ours.

Facts: SwinTransformer/Swin-Transformer-Object-Detection and Swin-Transformer-Semantic-Segmentation, which save by
mmcv's runner. Position indices, and the number of batches that a batch norm saw, which nothing reads, are dropped when
read and built when written. An optimizer is left out: apex made it from another order of parameters.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.files.torch_writer import NewTensor, constant, num_bytes, write_torch
from checkpoint_tools.formats.infer import given_sizes, infer_model, merge_model
from checkpoint_tools.formats.official.layout import position_index
from checkpoint_tools.formats.plain_read import parameter_sizes, place_records
from checkpoint_tools.formats.plain_write import renamed
from checkpoint_tools.formats.rules import FROM_OFFICIAL, Rule
from checkpoint_tools.formats.state_dict import find_weights, open_file, peek
from checkpoint_tools.sources.assembled import AssembledSource
from checkpoint_tools.sources.base import Options, Source, split_kind
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import is_expert_tensor
from swin_moe.names.official import DENSE

PARTS = ("neck.", "rpn_head.", "roi_head.", "decode_head.", "auxiliary_head.")  # beside the backbone
# Finding the weights takes "backbone." off, as it takes off any prefix of a network's first tensor.
FROM_DENSE = (
    Rule(r"\bnum_batches_tracked$", None),
    *FROM_OFFICIAL,
    Rule(rf"^(?!{'|'.join(map(re.escape, (DENSE, *PARTS)))})", DENSE),
)
_CLASSES = {  # tensor whose rows are classes -> how many of them are background
    "roi_head.bbox_head.fc_cls.weight": 1,
    "roi_head.bbox_head.0.fc_cls.weight": 1,
    "decode_head.conv_seg.weight": 0,
}


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    names = peek(path)
    return "patch_embed.proj.weight" in names and any(name.startswith(PARTS) for name in names)


def open_dense(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the file `path`; see formats/__init__.py."""
    file = open_file(path)
    weights = find_weights(file.content, path)
    if isinstance(file.content, dict) and "optimizer" in file.content:
        options.report(f"{path}: its optimizer is not in the order of our parameters and is left out")
    parts = place_records(path, {name: (file, record) for name, record in weights.stored.items()}, FROM_DENSE)
    sizes = parameter_sizes(parts)
    config = {"model": network_of(path, sizes) | given_sizes(options.extra), "task": {"name": task_of(sizes)}}
    return AssembledSource("dense", path, parts, options, config=config, provenance={"source": {"format": "dense"}})


def task_of(sizes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns task.name of a network with these parameters."""
    return "segment" if any(name.startswith("decode_head.") for name in sizes) else "detect"


def network_of(path: Path, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns the options of config.model that the shapes of a dense network determine.

    Positions are (1, C, H, W) there, of any size.
    """
    backbone = {name.removeprefix(DENSE): shape for name, shape in sizes.items() if name.startswith(DENSE)}
    positions = backbone.pop("absolute_pos_embed", None)
    model = infer_model(path, backbone)
    if positions is not None and model:
        model |= {"ape": True, "img_size": [n * p for n, p in zip(positions[2:], model["patch_size"])]}
    rows = next(((sizes[name][0] - others) for name, others in _CLASSES.items() if name in sizes), None)
    return model if rows is None else model | {"num_classes": rows}


def write_dense(source: Source, path: Path, options: Options) -> None:
    """Writes one file that the official code loads strictly; see formats/__init__.py."""
    content = _content(source, options)

    def write(staging: Path) -> None:
        if options.comm.rank == 0:
            write_torch(staging / path.name, content, box_bytes=options.box_bytes, progress=options.progress)

    publish_files(path, num_bytes(content), write, comm=options.comm)


def plan_dense(source: Source, path: Path, options: Options) -> dict[str, int]:
    """Returns the file that write_dense would make, with about its bytes."""
    return {path.name: num_bytes(_content(source, options))}


def _content(source: Source, options: Options) -> dict[str, Any]:
    """Returns {"meta", "state_dict"} of a source.

    Raises:
        CheckpointError: It is no detector and no segmentor, has experts, or a backbone that the official code has not.
    """
    names = [name for name in source.tensors if split_kind(name)[0] == "weight"]
    shapes = {name: source.tensors[name].shape for name in names}
    if not any(name.startswith(PARTS) for name in names):
        raise CheckpointError(f"{source.path}: holds no detector and no segmentor; dense files are of these")
    network = merge_model(source.config, network_of(source.path, shapes)).get("model", {})
    beyond = next((name for name in names if is_expert_tensor(name)), None)
    beyond = beyond or next((name for name in names if not name.startswith((DENSE, *PARTS))), None)
    if beyond is not None or network.get("name") != "swin":
        what = f"tensor {beyond}" if beyond is not None else f"model.name={network.get('name')}"
        raise CheckpointError(f"{source.path}: {what}: the official code has dense networks of plain Swin alone")
    left = sorted({split_kind(tensor)[0] for tensor in source.tensors} - {"weight"})
    if left:
        options.report(f"{source.path}: dense files hold parameters only; left out: {', '.join(left)}")
    return {"meta": {}, "state_dict": renamed(source, {name: name for name in names}, ()) | _buffers(shapes)}


def _buffers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NewTensor]:
    """Returns what the official code keeps beside parameters."""
    found: dict[str, NewTensor] = {}
    for name, shape in shapes.items():
        prefix, _, last = name.rpartition(".")
        if last == "relative_position_bias_table":
            window = (int(round(shape[0] ** 0.5)) + 1) // 2
            found[f"{prefix}.relative_position_index"] = constant(position_index(window), "I64")
        elif last == "running_mean":
            found[f"{prefix}.num_batches_tracked"] = constant(np.array(0, np.int64), "I64")
    return found
