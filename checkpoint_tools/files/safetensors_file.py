"""Foreign safetensors files (timm and transformers write them): a JSON header, then the tensors. No torch.

Layout: huggingface/safetensors README.md, "Format".
"""

import json
import math
from pathlib import Path
from typing import TypeGuard

from checkpoint_tools.files.record_file import OpenFiles, RecordFile, Storage, TensorRecord
from swin_moe.checkpoint.boxes import row_strides
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.index import MAX_DIMS
from swin_moe.checkpoint.pieces import DTYPE_BYTES

MAX_HEADER_BYTES = 100_000_000  # what the library itself accepts
MAX_COUNT = 1 << 62


class SafetensorsFile(RecordFile):
    """A safetensors file: `content` is name -> TensorRecord.

    Raises:
        CheckpointError: It is no such file, or holds a dtype that checkpoints have not.
        CorruptionError: Its header contradicts itself or the file's size; names the tensor.
    """

    def __init__(self, path: Path, files: OpenFiles | None = None) -> None:
        super().__init__(path, files)
        size = path.stat().st_size
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: is no safetensors file")
            try:
                header = json.loads(stream.read(length))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: is no safetensors file ({error})") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: is no safetensors file")
        notes = header.pop("__metadata__", None)
        self.metadata = {k: v for k, v in notes.items() if isinstance(v, str)} if isinstance(notes, dict) else {}
        self.content = {name: self._record(name, entry, 8 + length, size) for name, entry in header.items()}

    def _record(self, name: str, entry: object, start: int, size: int) -> TensorRecord:
        where = f"{self.path}: tensor {name[:100]!r}"
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{where}: checkpoints hold no dtype {dtype!r}")
        if not (_are_counts(shape) and _are_counts(place)) or len(shape) > MAX_DIMS or len(place) != 2:
            raise CorruptionError(f"{where}: has an impossible shape or place")
        (begin, end), count = place, math.prod(shape)
        if end - begin != count * DTYPE_BYTES[dtype] or start + end > size:
            raise CorruptionError(f"{where}: shape {tuple(shape)} does not fit its bytes, or they end behind the file")
        self._begin[name] = (start + begin, end - begin)
        return TensorRecord(Storage(name, dtype, count), 0, tuple(shape), row_strides(tuple(shape)), dtype)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_COUNT for n in value)
