"""Files that hold one state dict: read from torch.save or safetensors files, written to either by the path's ending."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_tools.publish import publish_files
from checkpoint_tools.record_file import OpenFiles, TensorRecord, contiguous_boxes
from checkpoint_tools.safetensors_file import SafetensorsFile
from checkpoint_tools.source import Options
from checkpoint_tools.torch_file import TorchFile
from checkpoint_tools.torch_writer import NewTensor, num_bytes, write_torch
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.checkpoint.plan import encode_header

_WRAPPERS = ("model", "state_dict", "module", "model_state")


def open_file(path: Path, files: OpenFiles | None = None) -> TorchFile | SafetensorsFile:
    """Returns the opened file; its `content` has TensorRecords for tensors.

    Raises:
        CheckpointError: It is neither a file of torch.save nor a safetensors file, or is refused.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: does not exist, or is no file")
    return SafetensorsFile(path, files) if path.suffix == ".safetensors" else TorchFile(path, files)


def state_dict(content: Any, path: Path) -> dict[str, TensorRecord]:
    """Returns the tensors of a file by name: the file itself, or what a training loop wrapped in "model", ...

    Raises:
        CheckpointError: It holds something else; names it.
    """
    wrapped = content
    if isinstance(content, dict):
        wrapped = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(wrapped, dict) or not wrapped:
        raise CheckpointError(f"{path}: holds no state dict")
    result = {}
    for name, value in wrapped.items():
        # Tutel's gather stores the number of experts as a plain number.
        if isinstance(value, TensorRecord):
            result[str(name)] = value
        elif not (isinstance(value, int) and str(name).endswith("_num_global_experts")):
            raise CheckpointError(f"{path}: {str(name)[:100]!r} is a {type(value).__name__}, not a tensor")
    return result


def peek(path: Path) -> frozenset[str]:
    """Returns the names of the tensors of a file, to recognize its format; nothing if it cannot be read."""
    try:
        return _peek(path, path.stat().st_mtime_ns) if path.is_file() else frozenset()
    except (CheckpointError, OSError):
        return frozenset()


@functools.lru_cache(maxsize=4)
def _peek(path: Path, modified: int) -> frozenset[str]:
    file = open_file(path)
    file.files.close()
    return frozenset(state_dict(file.content, path))


def write_state_dict(path: Path, tensors: Mapping[str, NewTensor], options: Options) -> None:
    """Writes one state dict at `path`; rank 0 writes, every rank calls it."""
    safe = path.suffix == ".safetensors"

    def write(staging: Path) -> None:
        if options.comm.rank == 0 and safe:
            stream_safetensors(staging / path.name, tensors, options)
        elif options.comm.rank == 0:
            write_torch(staging / path.name, dict(tensors), box_bytes=options.box_bytes, progress=options.progress)

    publish_files(path, num_bytes(dict(tensors)), write, comm=options.comm)


def stream_safetensors(path: Path, tensors: Mapping[str, NewTensor], options: Options) -> None:
    """Writes a safetensors file box by box; wider elements first, as the format aligns them."""
    names = sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))
    end, entries = 0, {}
    for name in names:
        start, end = end, end + tensors[name].num_bytes
        entries[name] = {
            "dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end],
        }  # fmt: skip
    with open(path, "wb") as file:
        file.write(encode_header(entries, {"format": "pt"}))
        for name in names:
            item = DTYPE_BYTES[tensors[name].dtype]
            for box in contiguous_boxes(tensors[name].shape, options.box_bytes // item):
                data = np.empty(box.size, RAW[item])
                tensors[name].fill(box, data)
                file.write(memoryview(data.reshape(-1).view(np.uint8)))
                options.progress(data.nbytes)

