"""timm's Swin and SwinV2 files: a bare state dict, torch.save or safetensors by the path's ending.

Since timm 0.9 patch merging opens its stage and the class head is `head.fc`; older files have official names and are
read as such (huggingface/pytorch-image-models, timm/models/swin_transformer*.py:checkpoint_filter_fn). Optimizer state
and options are not part of the format; --set img_size=N and window_size=N say what the tensors do not.
"""

from pathlib import Path

from checkpoint_tools.formats.infer import given_sizes, infer_model
from checkpoint_tools.formats.plain_read import place_records, sizes_of
from checkpoint_tools.formats.plain_write import plain_tensors
from checkpoint_tools.formats.rules import FROM_TIMM, TO_TIMM
from checkpoint_tools.formats.state_dict import open_file, peek, state_dict, write_state_dict
from checkpoint_tools.sources.assembled import AssembledSource
from checkpoint_tools.sources.base import Options, Source
from swin_moe.checkpoint.errors import CheckpointError


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    names = peek(path)
    return "patch_embed.proj.weight" in names and (
        "head.fc.weight" in names or not any(name.startswith("layers.0.downsample.") for name in names)
        and any(name.startswith("layers.1.downsample.") for name in names)
    )  # fmt: skip


def open_timm(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the file `path`; see formats/__init__.py."""
    file = open_file(path)
    records = state_dict(file.content, path)
    if any(name.startswith("stages.") for name in records):
        raise CheckpointError(f"{path}: is timm's swinv2_cr, another network than the official SwinV2")
    closing = any(name.startswith("layers.0.downsample.") for name in records)
    parts = place_records(path, {name: (file, record) for name, record in records.items()}, FROM_TIMM[closing:])
    buffers = {name: record.shape for name, record in records.items()}
    config = {"model": infer_model(path, sizes_of(parts), buffers) | given_sizes(options.extra)}
    return AssembledSource("timm", path, parts, options, config=config, provenance={"source": {"format": "timm"}})


def write_timm(source: Source, path: Path, options: Options) -> None:
    """Writes one file that timm.create_model(..., checkpoint_path=) loads; see formats/__init__.py."""
    tensors, _ = plain_tensors(source, options, lambda family: TO_TIMM, families=("swin", "swinv2"), name="timm")
    write_state_dict(path, tensors, options)
