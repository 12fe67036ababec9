"""transformers' Swin and Swinv2: a directory with config.json and its weights, or one file of weights.

Query, key and value are tensors of their own there; the rows of our qkv. Names: huggingface/transformers,
models/swin/modeling_swin.py and models/swinv2/modeling_swinv2.py. The pre-training decoder and mask token are dropped.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.files.record_file import OpenFiles, RecordFile, TensorRecord
from checkpoint_tools.formats.images import CLASSES, labels, named_classes, preprocessor, stated_reading
from checkpoint_tools.formats.infer import given_sizes, infer_model, merge_model
from checkpoint_tools.formats.plain_read import parameter_sizes, place_records
from checkpoint_tools.formats.plain_write import plain_tensors
from checkpoint_tools.formats.rules import FROM_HF, FROM_HF_V2, to_hf
from checkpoint_tools.formats.state_dict import find_weights, open_file, peek, stream_safetensors, write_state_dict
from checkpoint_tools.sources.assembled import AssembledSource
from checkpoint_tools.sources.base import Options, Source
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.sealed_json import MAX_BYTES

CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", ("model.safetensors", "pytorch_model.bin")
# transformers' option -> ours.
_SHARED = {
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "drop_path_rate": "drop_path_rate",
    "image_size": "img_size",
    "pretrained_window_sizes": "pretrained_window_sizes",
}
_PAIRS = ("img_size", "patch_size")


def detect(path: Path) -> bool:
    """See formats/__init__.py."""
    if path.is_dir():
        return config_json(path).get("model_type") in ("swin", "swinv2")
    return any("embeddings.patch_embeddings.projection.weight" in name for name in peek(path))


def open_hf(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the directory or file `path`; see formats/__init__.py."""
    records = stored_records(path)
    if any(name.endswith("embeddings.position_embeddings") for name in records):
        raise CheckpointError(f"{path}: has absolute positions with one row more than patches, which no other Swin has")
    second = any(name.endswith("attention.self.logit_scale") for name in records)
    parts = place_records(path, records, FROM_HF_V2 if second else FROM_HF)
    folder = path if path.is_dir() else path.parent
    given, reading = config_json(folder), stated_reading(config_json(folder, PREPROCESSOR))
    stated = {ours: given[key] for key, ours in _SHARED.items() if key in given}
    stated |= {key: [stated[key]] * 2 for key in _PAIRS if isinstance(stated.get(key), int)}
    buffers = {name: record.shape for name, (_, record) in records.items()}
    inferred = infer_model(path, parameter_sizes(parts), buffers)
    stated_config = {"model": stated, **({"data": reading} if reading else {})}
    config = merge_model(stated_config, inferred, given_sizes(options.extra))
    names = named_classes(given)
    state = {CLASSES: names} if names else {}
    provenance = {"source": {"format": "hf"}}
    return AssembledSource("hf", path, parts, options, state=state, config=config, provenance=provenance)


def write_hf(source: Source, path: Path, options: Options) -> None:
    """Writes a directory that from_pretrained loads, or one file of weights where the path ends like one.

    --set img_size=N, window_size=N: where the source does not tell them, for config.json.
    """
    tensors, network = plain_tensors(source, options, to_hf, families=("swin", "swinv2"), name="transformers")
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        write_state_dict(path, tensors, options)
        return
    size = tuple(network.get("img_size", (0, 0)))
    files = {CONFIG: _config(source, network), PREPROCESSOR: preprocessor(source.config, size)}

    def write(staging: Path) -> None:
        if options.comm.rank == 0:
            directory = staging / path.name
            directory.mkdir()
            for name, content in files.items():
                (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
            stream_safetensors(directory / WEIGHTS[0], tensors, options)

    publish_files(path, sum(t.num_bytes + 256 for t in tensors.values()) + 4096, write, comm=options.comm)


def _config(source: Source, network: Mapping[str, Any]) -> dict[str, Any]:
    missing = [key for key in ("img_size", "window_size") if key not in network]
    if missing:
        remedy = " ".join(f"--set {key}=N" for key in missing)
        raise CheckpointError(
            f"{source.path}: does not tell {' and '.join(missing)}, which config.json states; give {remedy}"
        )
    values = {key: network[ours] for key, ours in _SHARED.items() if ours in network}
    for key in ("image_size", "patch_size"):
        values[key] = values[key][0] if len(set(values[key])) == 1 else values[key]
    family, classes = network["name"], network.get("num_classes", 0)
    architecture = "ForImageClassification" if classes else "Model"
    return {
        **values,
        **labels(source, classes),
        "model_type": family,
        "architectures": [f"{family.capitalize()}{architecture}"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_absolute_embeddings": False,
    }


def config_json(directory: Path, name: str = CONFIG) -> dict[str, Any]:
    """Returns config.json of a directory, or another such file; {} where there is none that can be read."""
    path = directory / name
    try:
        content = json.loads(path.read_text()) if path.is_file() and path.stat().st_size < MAX_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def stored_records(path: Path) -> dict[str, tuple[RecordFile, TensorRecord]]:
    """Returns every tensor of the file, or of the files that a directory's index names; see Weights.stored."""
    files = OpenFiles()
    paths = [path]
    if path.is_dir():
        whole = [path / name for name in WEIGHTS if (path / name).is_file()]
        paths = whole[:1] or _listed(path)
    found: dict[str, tuple[RecordFile, TensorRecord]] = {}
    for one in paths:
        file = open_file(one, files)
        found |= {name: (file, record) for name, record in find_weights(file.content, one).stored.items()}
    return found


def _listed(directory: Path) -> list[Path]:
    """Returns the weight files that an index names; raises CheckpointError for a missing one or a path elsewhere."""
    for name in WEIGHTS:
        index = directory / f"{name}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                raise CheckpointError(f"{index}: is no index of weight files") from None
            if not all(isinstance(one, str) and Path(one).name == one for one in names):
                raise CheckpointError(f"{index}: names a file outside its directory, which is refused")
            return [directory / one for one in sorted(names)]
    raise CheckpointError(f"{directory}: holds neither {' nor '.join(WEIGHTS)}")
