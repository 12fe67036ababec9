"""Files that hold one state dict: read from torch.save or safetensors files, written to either by the path's ending."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.files.record_file import OpenFiles, TensorRecord, contiguous_boxes
from checkpoint_tools.files.safetensors_file import SafetensorsFile
from checkpoint_tools.files.torch_file import TorchFile
from checkpoint_tools.files.torch_writer import NewTensor, num_bytes, write_torch
from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.checkpoint.plan import encode_header
from swin_moe.names import state_dict as state_dict_names
from swin_moe.names.state_dict import Weights, unknown_prefix


def open_file(path: Path, files: OpenFiles | None = None) -> TorchFile | SafetensorsFile:
    """Returns the opened file; its `content` has TensorRecords for tensors. What it holds decides, not its name.

    Raises:
        CheckpointError: It is neither a file of torch.save nor a safetensors file, or is refused.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'does not exist'}")
    if not path.stat().st_size:
        raise CorruptionError(f"{path}: is empty")
    if kind := packed_by(path):
        raise CheckpointError(f"{path}: is packed by {kind}; unpack it first")
    return SafetensorsFile(path, files) if is_safetensors(path) else TorchFile(path, files)


_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def packed_by(path: Path) -> str:
    """Returns the program that packed a file, by its first bytes or as a tar archive; "" for none."""
    with open(path, "rb") as stream:
        head = stream.read(262)
    if head[257:] == b"ustar":
        return "tar"
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), "")


def is_safetensors(path: Path) -> bool:
    """Returns whether a file begins as a safetensors file does."""
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        head = stream.read(9)
    named = path.suffix == ".safetensors" and head[:2] not in (b"PK", b"\x80\x02")
    return named or head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def state_dict(content: Any, path: Path) -> dict[str, TensorRecord]:
    """Returns the tensors of a file by name; see find_weights."""
    return find_weights(content, path).records


def find_weights(content: Any, path: Path) -> Weights[TensorRecord]:
    """Returns the tensors of a file; see state_dict_names.find_weights.

    Raises:
        CheckpointError: It holds something else; names it.
    """
    try:
        found = state_dict_names.find_weights(content, lambda value: isinstance(value, TensorRecord))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return found._replace(records=_tensors(found.records), averaged=_tensors(found.averaged))


def _tensors(found: Mapping[str, TensorRecord | int]) -> dict[str, TensorRecord]:
    return {name: record for name, record in found.items() if isinstance(record, TensorRecord)}


def peek(path: Path) -> frozenset[str]:
    """Returns the names of the tensors of a file, to recognize its format; nothing if it cannot be read."""
    try:
        return _peek(path, path.stat().st_mtime_ns)[0] if path.is_file() else frozenset()
    except (CheckpointError, OSError):
        return frozenset()


def taken_off(path: Path) -> str:
    """Returns what was taken off the content and the names of a file, and what else was read; see Weights.note."""
    try:
        return _peek(path, path.stat().st_mtime_ns)[1] if path.is_file() else ""
    except (CheckpointError, OSError):
        return ""


@functools.lru_cache(maxsize=4)
def _peek(path: Path, modified: int) -> tuple[frozenset[str], str]:
    file = open_file(path)
    file.files.close()
    weights = find_weights(file.content, path)
    return frozenset(weights.records), weights.note


def why_unknown(path: Path) -> str:
    """Returns why a file is of no known format.

    Raises:
        CheckpointError: It cannot be read at all, which says more.
    """
    file = open_file(path)
    file.files.close()
    names = sorted(find_weights(file.content, path).records)
    if clause := unknown_prefix(names):
        return clause
    shown = ", ".join(name[:60] for name in names[:3])
    return f"its {len(names)} tensors ({shown}, ...) are no Swin network's" if names else "it holds no tensors"


def write_state_dict(
    path: Path, tensors: Mapping[str, NewTensor], options: Options, averages: Mapping[str, NewTensor] | None = None
) -> None:
    """Writes one state dict at `path`; rank 0 writes, every rank calls it.

    averages: Written beside it, by the keys of timm's training loop; not for safetensors, which hold one.
    """
    safe = path.suffix == ".safetensors"
    content = {"state_dict": dict(tensors), "state_dict_ema": dict(averages)} if averages else dict(tensors)

    def write(staging: Path) -> None:
        if options.comm.rank == 0 and safe:
            stream_safetensors(staging / path.name, tensors, options)
        elif options.comm.rank == 0:
            write_torch(staging / path.name, content, box_bytes=options.box_bytes, progress=options.progress)

    publish_files(path, num_bytes(content), write, comm=options.comm)


def stream_safetensors(path: Path, tensors: Mapping[str, NewTensor], options: Options) -> None:
    """Writes a safetensors file box by box; wider elements first, as the format aligns them."""
    names = sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))
    end, entries = 0, {}
    for name in names:
        start, end = end, end + tensors[name].num_bytes
        entries[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    with open(path, "wb") as file:
        file.write(encode_header(entries, {"format": "pt"}))
        for name in names:
            item = DTYPE_BYTES[tensors[name].dtype]
            for box in contiguous_boxes(tensors[name].shape, options.box_bytes // item):
                data = np.empty(box.size, RAW[item])
                tensors[name].fill(box, data)
                file.write(memoryview(data.reshape(-1).view(np.uint8)))
                options.progress(data.nbytes)
