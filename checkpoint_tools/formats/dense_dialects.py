"""Detectors and segmentors under names of other programs: mmdetection's and mmsegmentation's own port, transformers.

Facts: open-mmlab/mmdetection, mmdet/models/backbones/swin.py and mmdet/models/layers/transformer/utils.py (from 2.16
on), open-mmlab/mmsegmentation, mmseg/models/backbones/swin.py (from 0.18 on); huggingface/transformers,
models/upernet/modeling_upernet.py and models/swin/modeling_swin.py. Heads have their official names in the former.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from checkpoint_tools.formats.rules import FROM_DENSE, FROM_HF_UPERNET, FROM_OPEN_MMLAB, Rule
from checkpoint_tools.sources.assembled import Leaf, Part
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.layout import Chunk
from swin_moe.names.official import DENSE, DENSE_PARTS, STUDENT


class Dialect(NamedTuple):
    """Names of one program."""

    program: str
    first: str  # of a tensor that every one of its backbones has, without prefix
    rules: tuple[Rule, ...]
    unfolds: bool = False  # patch merging orders its inputs by channel, then by place


DIALECTS = (
    Dialect("the official code", "patch_embed.proj.weight", FROM_DENSE),
    Dialect("open-mmlab", "patch_embed.projection.weight", FROM_OPEN_MMLAB, unfolds=True),
    Dialect("transformers", "embeddings.patch_embeddings.projection.weight", FROM_HF_UPERNET),
)
_OTHERS = (".position_embeddings", ".absolute_pos_embed", ".logit_scale")
_MERGED = re.compile(r"\.downsample\.(reduction|norm)\.(weight|bias)$")
# The four tokens of a merge in the official order, upper left, lower left, upper right, lower right, are these of
# torch.nn.Unfold, which goes along rows.
_PLACES = (0, 2, 1, 3)


def dialect_of(names: Collection[str]) -> Dialect | None:
    """Returns the dialect of a network with a backbone and something beside it; None where it is no such."""
    names = {name.removeprefix(STUDENT) for name in names}
    if not any(name.startswith(DENSE_PARTS) for name in names):
        return None
    return next((d for d in DIALECTS if any(f"{DENSE}{inner}{d.first}" in names for inner in ("", "swin."))), None)


def check_backbone(path: Path, dialect: Dialect, names: Collection[str]) -> None:
    """Checks that a backbone of another dialect is one that ours computes alike.

    Raises:
        CheckpointError: It has absolute positions, or is a SwinV2; names the tensor.
    """
    for name in sorted(names) if dialect is not DIALECTS[0] else ():
        if name.endswith(_OTHERS):
            raise CheckpointError(
                f"{path}: tensor {name[:100]!r}: of {dialect.program} only SwinV1 without absolute positions is read"
            )


def in_official_order(path: Path, parts: Mapping[str, list[Part]]) -> dict[str, list[Part]]:
    """Returns the parts of our tensors with the inputs of patch merging as ours are ordered: by place, then by channel.

    Nothing is copied: every place is a part of its own, each fourth element of a row of the file.

    Raises:
        CheckpointError: Patch merging of inputs that are no four tokens; names the tensor.
    """
    return {name: _quarters(path, name, found) if _MERGED.search(name) else found for name, found in parts.items()}


def _quarters(path: Path, name: str, parts: list[Part]) -> list[Part]:
    ((_, (leaf,)),) = parts  # no rule joins these
    record = leaf.record
    if not record.shape or record.shape[-1] % 4:
        raise CheckpointError(f"{path}: tensor {name}: its shape {list(record.shape)} is none of patch merging")
    count, step = record.shape[-1] // 4, record.stride[-1]
    shape, stride = (*record.shape[:-1], count), (*record.stride[:-1], 4 * step)
    found = []
    for quarter, place in enumerate(_PLACES):
        start = (*(0 for _ in shape[:-1]), quarter * count)
        own = replace(record, offset=record.offset + place * step, shape=shape, stride=stride)
        found.append(Part(Chunk(start, shape), (Leaf(leaf.file, own),)))
    return found
