"""Networks as folders that are shared: config.json, model.safetensors and preprocessor_config.json of Hugging Face."""

import dataclasses
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from swin_moe.config import DataConfig
from swin_moe.models.build import build_model
from swin_moe.models.swin import SwinTransformer
from swin_moe.weights.pretrained import load

_log = logging.getLogger(__name__)


def save_pretrained(
    model: SwinTransformer,
    folder: str | Path,
    *,
    classes: Sequence[str] = (),
    data: DataConfig | None = None,
    layout: Literal["auto", "transformers", "swin_moe"] = "auto",
) -> str:
    """Returns the layout in which a network was written: what from_pretrained, swin_moe.load, checkpoint.init and
    `checkpoint convert` read, and of a dense Swin or SwinV2 transformers' AutoModelForImageClassification.

    Args:
        folder: A new one.
        classes: Names in the order of outputs; of a network from swin_moe.load its own, where none are given.
        data: How images become its input (interpolation, eval_crop, exif); likewise.
        layout: "transformers", "swin_moe" (every network, with experts too), or the first where it has the network.

    Raises:
        ValueError: The folder is there, names do not fit the outputs, the model holds a part of its experts only, or
            transformers has no such network and was asked for.
    """
    from checkpoint_tools.weights import metadata_of, write_folder

    if not isinstance(folder, str | os.PathLike) or not Path(folder).name:
        raise ValueError(f"save_pretrained: folder must name a new folder, as text or a Path, got {folder!r}")
    folder = Path(folder).expanduser()
    names, reading = list(classes) or list(model.classes), data or model.reading
    if names and len(names) != model.num_classes:
        raise ValueError(f"save_pretrained: {len(names)} classes, the network has {model.num_classes} outputs")
    with torch.device("meta"):
        whole = {name: p.shape for name, p in build_model(model.config).named_parameters()}
    own = dict(model.named_parameters())
    if any(p.is_meta for p in own.values()) or {name: p.shape for name, p in own.items()} != whole:
        raise ValueError("save_pretrained: the model has to hold all of its parameters, also experts of other ranks")
    config: dict[str, Any] = {"model": dataclasses.asdict(model.config)}
    config |= {"data": dataclasses.asdict(reading)} if reading is not None else {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        file = Path(staging) / "model.safetensors"
        tensors = {name: p.detach().cpu().contiguous() for name, p in own.items()}
        save_file(tensors, file, metadata=metadata_of(config, step=0, classes=names or None))
        written = write_folder(file, folder, layout=layout)
    _log.info("%s: written as %s", folder, written)
    return written


def from_pretrained(folder: str | Path, **overrides: Any) -> SwinTransformer:
    """Returns the network of a folder, in eval mode; see swin_moe.load, which gives classes and preprocessing too."""
    return load(folder, **overrides).model
