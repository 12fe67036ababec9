"""Checkpoints of any format as networks load them: the one door through which swin_moe reads what is not its own, and
writes what other programs load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.formats import find_format, open_source, write_checkpoint
from checkpoint_tools.formats.images import labels, preprocessor
from checkpoint_tools.formats.official.simmim import is_moby
from checkpoint_tools.formats.safetensors import WEIGHTS, metadata_of
from checkpoint_tools.formats.state_dict import peek
from checkpoint_tools.sources.assembled import AssembledSource
from checkpoint_tools.sources.base import Options, Source
from swin_moe.checkpoint.errors import CheckpointError

__all__ = ["metadata_of", "open_weights", "prefix_of", "with_tables", "write_folder"]
FolderLayout = Literal["auto", "transformers", "swin_moe"]
PRETRAINED = "encoder."  # before the names of a file that was pre-trained without classes


def open_weights(path: Path, *, report: Callable[[str], None]) -> Source:
    """Returns the opened checkpoint at `path`, whose tensors have our names.

    Files of SimMIM and MoBY keep "encoder." before the backbone's names, and SimMIM's its decoder and mask token. Where
    ranks hold copies that differ, the first counts, and is told when it is read.

    Args:
        report: Called with sentences for the user.

    Raises:
        CheckpointError: It is of no known format, or refused.
        CorruptionError: It is cut off or contradicts itself.
    """
    form = find_format(path, advice=False)
    kept = form == "simmim" and not is_moby(peek(path))
    options = Options(on_drift="first", extra={"encoder": "keep"} if kept else {}, report=report)
    return open_source(path, options, form)


def with_tables(source: Source) -> AssembledSource | None:
    """Returns the source itself where it has coordinate tables, which tell the windows it was trained with."""
    return source if isinstance(source, AssembledSource) and source.tables else None


def prefix_of(source: Source) -> str:
    """Returns what has to stand before a source's names, so that they tell how it was trained."""
    pretrained = source.format == "simmim" and not any(name.startswith(PRETRAINED) for name in source.tensors)
    return PRETRAINED if pretrained else ""


def write_folder(file: Path, folder: Path, *, layout: FolderLayout = "auto") -> str:
    """Returns the layout in which a network was written as a folder: config.json, model.safetensors and
    preprocessor_config.json.

    Args:
        file: Its weights, as `checkpoint export --to safetensors` writes them.
        layout: "transformers" names and splits tensors as its Swin and Swinv2 do; "swin_moe" keeps ours, for every
            network; "auto" is the first where transformers has the network.

    Raises:
        CheckpointError: Something is at `folder`, the disk is too small, or transformers has no such network.
    """
    options = Options(report=lambda sentence: None)
    with open_source(file, options, "safetensors") as source:
        if layout != "swin_moe" and (layout == "transformers" or not folder.exists()):
            try:
                write_checkpoint(source, folder, options, "hf")
                return "transformers"
            except CheckpointError:
                if layout == "transformers":
                    raise
        files = _described(source)

    def write(staging: Path) -> None:
        directory = staging / folder.name
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(file, directory / WEIGHTS)

    publish_files(
        folder, file.stat().st_size + sum(len(json.dumps(content, indent=2)) for content in files.values()), write
    )
    return "swin_moe"


def _described(source: Source) -> dict[str, dict[str, Any]]:
    """Returns the JSON files beside our own weights."""
    network = source.config["model"]
    config = {
        "model_type": "swin_moe",
        "architectures": ["SwinTransformer"],
        "image_size": network["img_size"],
        **labels(source, network.get("num_classes", 0)),
        "swin_moe": {"model": network},
    }
    return {"config.json": config, "preprocessor_config.json": preprocessor(source.config, tuple(network["img_size"]))}
