"""Files of the official detectors and segmentors: names are ours, experts apart; classes stand in `meta`.

Facts: SwinTransformer/Swin-Transformer-Object-Detection and -Semantic-Segmentation, whose files are mmcv's:
{"meta", "state_dict", "optimizer"}; so are microsoft/SoftTeacher's, of a student and a teacher. The optimizer is left
out. Indices of position biases and counts of batches are dropped when read and built when written, so that the official
code loads the file strictly.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.files.torch_writer import NewTensor, constant, num_bytes, write_torch
from checkpoint_tools.formats.images import CLASSES
from checkpoint_tools.formats.infer import given_sizes, infer_model, merge_model
from checkpoint_tools.formats.official.layout import position_index
from checkpoint_tools.formats.plain_read import parameter_sizes, place_records
from checkpoint_tools.formats.rules import FROM_DENSE, TO_OFFICIAL, TO_SOFT_TEACHER, from_ours
from checkpoint_tools.formats.state_dict import find_weights, open_file, peek
from checkpoint_tools.sources.assembled import AssembledSource
from checkpoint_tools.sources.base import Options, Source, split_kind
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.names.official import DENSE, DENSE_PARTS, STUDENT, TEACHER, inner_name

_TABLE, _VARIANCE = "relative_position_bias_table", ".bn.running_var"
# The last layer of each kind of head, and its outputs that are no class.
_CLASSIFIERS = {
    "decode_head.conv_seg.bias": 0,
    "roi_head.bbox_head.fc_cls.bias": 1,
    "roi_head.bbox_head.0.fc_cls.bias": 1,
}


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    names = {name.removeprefix(STUDENT) for name in peek(path)}
    return f"{DENSE}patch_embed.proj.weight" in names and any(name.startswith(DENSE_PARTS) for name in names)


def open_dense(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the file `path`; see formats/__init__.py."""
    file = open_file(path)
    records = {name: (file, record) for name, record in find_weights(file.content, path).records.items()}
    parts = place_records(path, records, FROM_DENSE)
    sizes = parameter_sizes(parts)
    own = {inner_name(name): shape for name, shape in sizes.items() if not name.startswith(TEACHER)}
    inferred: dict[str, Any] = infer_model(path, own)
    for name, beside in _CLASSIFIERS.items():
        if name in sizes and inferred:
            inferred["num_classes"] = sizes[name][0] - beside
    positions = sizes.get(f"{DENSE}absolute_pos_embed", ())
    if len(positions) == 4 and inferred:  # a map of them, of any shape
        inferred["img_size"] = [side * patch for side, patch in zip(positions[2:], inferred["patch_size"])]
    if isinstance(file.content, dict) and file.content.get("optimizer"):
        options.report(f"{path}: its optimizer is left out")
    names = _class_names(file.content)
    return AssembledSource(
        "dense",
        path,
        parts,
        options,
        state={CLASSES: names} if names else {},
        config=merge_model({}, inferred | given_sizes(options.extra)) if inferred else {},
        provenance={"source": {"format": "dense", "files": 1}},
    )


def write_dense(source: Source, path: Path, options: Options) -> None:
    """Writes one file that the official code loads; see formats/__init__.py."""
    names = [name for name in source.tensors if split_kind(name)[0] == "weight"]
    if not any(name.startswith(DENSE) for name in names):
        raise CheckpointError(f"{source.path}: holds no detector or segmentor: no tensor's name begins with {DENSE}")
    left = sorted({split_kind(name)[0] for name in source.tensors} - {"weight"})
    if left:
        options.report(f"{source.path}: dense files hold parameters only; left out: {', '.join(left)}")
    rules = TO_SOFT_TEACHER if any(name.startswith(TEACHER) for name in names) else TO_OFFICIAL
    tensors: dict[str, NewTensor] = {}
    for name in sorted(names):
        (official,) = from_ours(name, rules)
        shape, dtype = source.tensors[name]
        tensors[official] = NewTensor(shape, dtype, partial(source.read, name))
        if name.endswith(_TABLE):
            window = (math.isqrt(shape[0]) + 1) // 2
            index = constant(position_index(window), "I64")
            tensors[official.removesuffix(_TABLE) + "relative_position_index"] = index
        elif name.endswith(_VARIANCE):
            count = constant(np.array(0, np.int64), "I64")
            tensors[official.removesuffix("running_var") + "num_batches_tracked"] = count
    classes = source.state.get(CLASSES)
    content = {"meta": {"CLASSES": list(classes)} if classes else {}, "state_dict": tensors}

    def write(staging: Path) -> None:
        if options.comm.rank == 0:
            write_torch(staging / path.name, content, box_bytes=options.box_bytes, progress=options.progress)

    publish_files(path, num_bytes(content), write, comm=options.comm)


def _class_names(content: Any) -> list[str]:
    """Returns what `meta` says of the classes; [] where it says nothing that can be used."""
    meta = content.get("meta") if isinstance(content, dict) else None
    found = meta.get("CLASSES") if isinstance(meta, dict) else None
    usable = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return list(found) if usable and found else []
