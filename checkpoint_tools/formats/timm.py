"""timm's Swin and SwinV2 files: one state dict, torch.save or safetensors by the path's ending.

With averages a file of torch.save is {"state_dict", "state_dict_ema"}, as timm's training loop saves it and of which
timm's load_checkpoint takes the averages; a safetensors file holds the weights alone.

Since timm 0.9 patch merging opens its stage and the class head is `head.fc`; older files have official names and are
read as such (huggingface/pytorch-image-models, timm/models/swin_transformer*.py:checkpoint_filter_fn). Optimizer state
and options are not part of the format; --set img_size=N and window_size=N say what the tensors do not.
"""

from pathlib import Path

from checkpoint_tools.formats.infer import given_sizes, infer_model
from checkpoint_tools.formats.plain_read import parameter_sizes, place_records
from checkpoint_tools.formats.plain_write import averages_of, plain_tensors, renamed
from checkpoint_tools.formats.rules import FROM_TIMM, TO_TIMM
from checkpoint_tools.formats.state_dict import find_weights, open_file, peek, write_state_dict
from checkpoint_tools.sources.assembled import AssembledSource
from checkpoint_tools.sources.base import Options, Source, split_kind
from swin_moe.checkpoint.errors import CheckpointError


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    names = peek(path)
    return "patch_embed.proj.weight" in names and (
        "head.fc.weight" in names
        or not any(name.startswith("layers.0.downsample.") for name in names)
        and any(name.startswith("layers.1.downsample.") for name in names)
    )


def open_timm(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the file `path`; see formats/__init__.py."""
    file = open_file(path)
    weights = find_weights(file.content, path)
    records = weights.records
    if any(name.startswith("stages.") for name in records):
        raise CheckpointError(f"{path}: is timm's swinv2_cr, another network than the official SwinV2")
    closing = any(name.startswith("layers.0.downsample.") for name in records)
    parts = place_records(path, {name: (file, record) for name, record in weights.stored.items()}, FROM_TIMM[closing:])
    buffers = {name: record.shape for name, record in records.items()}
    config = {"model": infer_model(path, parameter_sizes(parts), buffers) | given_sizes(options.extra)}
    return AssembledSource("timm", path, parts, options, config=config, provenance={"source": {"format": "timm"}})


def write_timm(source: Source, path: Path, options: Options) -> None:
    """Writes one file that timm.create_model(..., checkpoint_path=) loads; see formats/__init__.py."""
    averaged = path.suffix != ".safetensors" and any(split_kind(name)[0] == "ema" for name in source.tensors)
    tensors, _ = plain_tensors(
        source, options, lambda family: TO_TIMM, families=("swin", "swinv2"), name="timm", without=("ema",) * averaged
    )
    averages = renamed(source, averages_of(source), TO_TIMM) if averaged else None
    write_state_dict(path, tensors, options, averages)
