"""Files of torch.save from before torch 1.6: four pickles, then the storages one after another.

Layout: torch/serialization.py:_legacy_save (pytorch).
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.files.pickle_reader import read_pickle
from checkpoint_tools.files.record_file import Storage
from checkpoint_tools.files.torch_tensors import MAX_COUNT, storage_of
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.pieces import DTYPE_BYTES

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def is_legacy(path: Path) -> bool:
    """Returns whether a file begins as torch.save wrote it before torch 1.6: protocol 2, then the magic number."""
    with open(path, "rb") as stream:
        return stream.read(14) == b"\x80\x02\x8a\n" + _MAGIC.to_bytes(10, "little")


def read_legacy(
    path: Path, builders: Mapping[str, Callable[..., Any]], inert: Collection[str]
) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Returns (the object with TensorRecords, storage key -> (first byte, bytes)).

    Raises:
        CheckpointError: It is no such file. CorruptionError: It is cut off.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: does not exist")
    if not is_legacy(path):
        raise CheckpointError(f"{path}: is neither a file of torch.save nor a safetensors file")
    kinds: dict[str, Storage] = {}

    def remember(reference: Any) -> Storage:
        storage = storage_of(reference)
        kinds[storage.key] = storage
        return storage

    size = path.stat().st_size
    with open(path, "rb") as stream:
        read_pickle(stream, path)
        system = (read_pickle(stream, path), read_pickle(stream, path))
        if system[0] != _PROTOCOL or not isinstance(system[1], dict) or system[1].get("little_endian") is not True:
            raise CheckpointError(f"{path}: was written with a protocol or byte order that is not supported")
        content = read_pickle(stream, path, builders=builders, inert=inert, persistent=remember)
        keys = read_pickle(stream, path)
        places: dict[str, tuple[int, int]] = {}
        begin = stream.tell()
        for key in keys if isinstance(keys, list) else []:
            if key not in kinds:
                raise CorruptionError(f"{path}: storage {key!r} belongs to no tensor")
            stream.seek(begin)
            count = int.from_bytes(stream.read(8), "little")
            length = count * DTYPE_BYTES[kinds[key].dtype]
            if count > MAX_COUNT or begin + 8 + length > size:
                raise CorruptionError(f"{path}: storage {key!r} reaches beyond the end of the file")
            places[key] = (begin + 8, length)
            begin += 8 + length
    return content, places
