"""Files of the official detectors and segmentors: names are ours, experts apart; classes stand in `meta`. What other
programs write of the same networks is read (dense_dialects.py).

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
from checkpoint_tools.formats.dense_dialects import DIALECTS, check_backbone, dialect_of, in_official_order
from checkpoint_tools.formats.hf import config_json, stored_records
from checkpoint_tools.formats.images import CLASSES, named_classes
from checkpoint_tools.formats.infer import given_sizes, infer_model, merge_model
from checkpoint_tools.formats.official.layout import position_index
from checkpoint_tools.formats.plain_read import parameter_sizes, place_records
from checkpoint_tools.formats.rules import TO_OFFICIAL, TO_SOFT_TEACHER, Rule, from_ours
from checkpoint_tools.formats.state_dict import find_weights, open_file, peek
from checkpoint_tools.sources.assembled import AssembledSource
from checkpoint_tools.sources.base import Options, Source, split_kind
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.names.official import DENSE, TEACHER, inner_name

_TABLE, _VARIANCE = "relative_position_bias_table", ".bn.running_var"
_CONTROLLER = "bbox_head.controller.weight"  # of RepPoints V2 with masks
_REACH = (64, 128, 256, 512, 1024)  # pixels, of its levels: swin_moe/models/reppoints/masks.py, LARGEST
# The last layer of each kind of head, and its outputs that are no class.
_CLASSIFIERS = {
    "decode_head.conv_seg.bias": 0,
    "roi_head.bbox_head.fc_cls.bias": 1,
    "roi_head.bbox_head.0.fc_cls.bias": 1,
    "bbox_head.reppoints_cls_out.bias": 0,
}


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    if path.is_dir():
        config = config_json(path)
        backbone = config.get("backbone_config")
        return (
            config.get("model_type") == "upernet"
            and isinstance(backbone, dict)
            and backbone.get("model_type") == "swin"
        )
    return dialect_of(peek(path)) is not None


def open_dense(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the file `path`, or in a directory of transformers; see formats/__init__.py."""
    file = None if path.is_dir() else open_file(path)
    if file is None:
        records = stored_records(path)
    else:
        records = {name: (file, record) for name, record in find_weights(file.content, path).records.items()}
    dialect = dialect_of(records) or DIALECTS[0]
    check_backbone(path, dialect, records)
    parts = place_records(path, records, dialect.rules)
    if dialect.unfolds:
        parts = in_official_order(path, parts)
    content = None if file is None else file.content
    if isinstance(content, dict) and content.get("optimizer"):
        options.report(f"{path}: its optimizer is left out")
    inferred = _network_of(path, parameter_sizes(parts))
    names = _class_names(content) or named_classes(config_json(path if file is None else path.parent))
    return AssembledSource(
        "dense",
        path,
        parts,
        options,
        state={CLASSES: names} if names else {},
        config=merge_model({}, inferred | given_sizes(options.extra)) if inferred else {},
        provenance={"source": {"format": "dense", "files": 1}},
    )


def _network_of(path: Path, sizes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns the options of config.model that the shapes tell; {} where they tell none."""
    own = {inner_name(name): shape for name, shape in sizes.items() if not name.startswith(TEACHER)}
    inferred: dict[str, Any] = infer_model(path, own)
    for name, beside in _CLASSIFIERS.items():
        if name in sizes and inferred:
            inferred["num_classes"] = sizes[name][0] - beside
    positions = sizes.get(f"{DENSE}absolute_pos_embed", ())
    if len(positions) == 4 and inferred:  # a map of them, of any shape
        inferred["img_size"] = [side * patch for side, patch in zip(positions[2:], inferred["patch_size"])]
    return inferred


def write_dense(source: Source, path: Path, options: Options) -> None:
    """Writes one file that the official code loads; see formats/__init__.py."""
    names = [name for name in source.tensors if split_kind(name)[0] == "weight"]
    if not any(name.startswith(DENSE) for name in names):
        raise CheckpointError(f"{source.path}: holds no detector or segmentor: no tensor's name begins with {DENSE}")
    left = sorted({split_kind(name)[0] for name in source.tensors} - {"weight"})
    if left:
        options.report(f"{source.path}: dense files hold parameters only; left out: {', '.join(left)}")
    names, rules = _one_network(source, names, options)
    tensors: dict[str, NewTensor] = {}
    for name in sorted(names):
        (official,) = from_ours(name.removeprefix(TEACHER) if rules is TO_OFFICIAL else name, rules)
        shape, dtype = source.tensors[name]
        tensors[official] = NewTensor(shape, dtype, partial(source.read, name))
        if name.endswith(_TABLE):
            window = (math.isqrt(shape[0]) + 1) // 2
            index = constant(position_index(window), "I64")
            tensors[official.removesuffix(_TABLE) + "relative_position_index"] = index
        elif name.endswith(_VARIANCE):
            count = constant(np.array(0, np.int64), "I64")
            tensors[official.removesuffix("running_var") + "num_batches_tracked"] = count
        elif name.endswith(_CONTROLLER):
            reach = constant(np.array(_REACH, np.int64), "I64")
            tensors[official.removesuffix("controller.weight") + "mask_head.head.sizes_of_interest"] = reach
    classes = source.state.get(CLASSES)
    content = {"meta": {"CLASSES": list(classes)} if classes else {}, "state_dict": tensors}

    def write(staging: Path) -> None:
        if options.comm.rank == 0:
            write_torch(staging / path.name, content, box_bytes=options.box_bytes, progress=options.progress)

    publish_files(path, num_bytes(content), write, comm=options.comm)


def _one_network(source: Source, names: list[str], options: Options) -> tuple[list[str], tuple[Rule, ...]]:
    """Returns the names that are written, and by which rules: of Soft Teacher both detectors, or the one that
    --set network says.

    Raises:
        CheckpointError: It says another, or the source holds no two.
    """
    teacher, wanted = [name for name in names if name.startswith(TEACHER)], options.extra.get("network")
    if wanted is None:
        return names, TO_SOFT_TEACHER if teacher else TO_OFFICIAL
    if wanted not in ("student", "teacher"):
        raise CheckpointError(f"--set network must be student or teacher, got {wanted!r}")
    if not teacher:
        raise CheckpointError(f"{source.path}: holds no student and teacher but one network; leave out --set network")
    return teacher if wanted == "teacher" else sorted(set(names) - set(teacher)), TO_OFFICIAL


def _class_names(content: Any) -> list[str]:
    """Returns what `meta` says of the classes, as the official code or mmengine has it; [] where it is unusable."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return []
    later = meta.get("dataset_meta")
    found = meta.get("CLASSES") or (later.get("classes") or later.get("CLASSES") if isinstance(later, dict) else None)
    usable = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return list(found) if usable and found else []
