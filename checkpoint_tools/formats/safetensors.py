"""What `export --to safetensors` writes: parameters under our names, and beside them what the network is.

The text `swin_moe` in the file's metadata is JSON: `config` (its section model, and of data how an image becomes the
network's input), `step`, and `classes` where they are known. `model.save_pretrained` writes the same as
model.safetensors into a folder, beside config.json and preprocessor_config.json. A file without it, which may be
anyone's, is read as official, fairscale, timm or hf by its names.
"""

import json
from pathlib import Path
from typing import Any

from checkpoint_tools.formats.images import READING
from checkpoint_tools.formats.infer import given_sizes, infer_model, merge_model
from checkpoint_tools.formats.state_dict import is_safetensors, open_file
from checkpoint_tools.sources.assembled import AssembledSource, Leaf, Part
from checkpoint_tools.sources.base import Options, Source
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.layout import Chunk
from swin_moe.names.official import inner_name

KEY = "swin_moe"
WEIGHTS = "model.safetensors"


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    path = _file_of(path)
    try:
        if not is_safetensors(path):
            return False
        file = open_file(path)
        file.files.close()
    except (CheckpointError, OSError):
        return False
    return KEY in file.metadata


def open_safetensors(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the file or folder `path`; see formats/__init__.py."""
    path = _file_of(path)
    file = open_file(path)
    config, known = described(file.metadata, path), _content(file.metadata, path)
    # Names are ours, also those of tasks that the formats of others know nothing of.
    parts = {name: [Part(Chunk.whole(record.shape), (Leaf(file, record),))] for name, record in file.content.items()}
    sizes = {inner_name(name): record.shape for name, record in file.content.items()}
    inferred = infer_model(path, sizes)
    config = merge_model(config, inferred, given_sizes(options.extra)) if inferred else config
    step = known["step"] if type(known.get("step")) is int and known["step"] >= 0 else 0
    state = {"classes": known["classes"]} if isinstance(known.get("classes"), list) else {}
    provenance = {"source": {"format": "safetensors", "files": 1}}
    return AssembledSource(
        "safetensors", path, parts, options, step=step, state=state, config=config, provenance=provenance
    )


def describe(source: Source) -> dict[str, str]:
    """Returns the metadata that says what a source's network is."""
    return metadata_of(source.config, step=source.step, classes=source.state.get("classes"))


def metadata_of(config: dict[str, Any], *, step: int, classes: list[str] | None) -> dict[str, str]:
    """Returns the metadata of a file whose network has this config, as JSON."""
    content: dict[str, Any] = {"config": {key: config[key] for key in ("model",) if key in config}}
    reading = {key: value for key, value in config.get("data", {}).items() if key in READING}
    content["config"] |= {"data": reading} if reading else {}
    content["step"] = step
    if classes is not None:
        content["classes"] = classes
    return {"format": "pt", KEY: json.dumps(content, sort_keys=True)}


def _file_of(path: Path) -> Path:
    """Returns the file itself, or the one in a folder."""
    return path / WEIGHTS if path.is_dir() else path


def described(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """Returns the config in a file's metadata.

    Raises:
        CheckpointError: It is none.
    """
    config = _content(metadata, path).get("config", {})
    if not isinstance(config, dict) or not all(isinstance(config.get(key, {}), dict) for key in ("model", "data")):
        raise CheckpointError(f"{path}: its metadata {KEY!r} holds no config")
    return config


def _content(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    try:
        content = json.loads(metadata.get(KEY, "{}"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its metadata {KEY!r} is no JSON object")
    return content
