"""Writes what torch.load(weights_only=True) reads, without torch and with bounded memory.

The layout is that of torch.save (torch/serialization.py, caffe2/serialize/inline_container.cc in pytorch): a zip of
stored records whose data begins at multiples of 64 bytes. The same content has the same bytes.
"""

import itertools
import math
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoint_tools.files.record_file import contiguous_boxes
from swin_moe.checkpoint.boxes import row_strides
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.layout import Chunk

_ALIGNMENT = 64
_STORAGE = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
_UNTYPED = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U64": "uint64", "U32": "uint32", "U16": "uint16"}


@dataclass(frozen=True, eq=False)
class NewTensor:
    """A tensor to write: its kind, and what fills a box of it (raw integers of the box's shape)."""

    shape: tuple[int, ...]
    dtype: str
    fill: Callable[[Chunk, np.ndarray], None]

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class NewGlobal(NamedTuple):
    """A global to write by name."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)  # objects are keys of dicts, whatever their state
class NewObject:
    """An object to write: the global that makes it, its arguments, and its state (None = no state).

    A state that is a dict becomes attributes; any other is what its class understands.
    """

    kind: NewGlobal
    args: tuple = ()
    state: Any = None
    call: bool = False  # a function, instead of a class


def constant(array: np.ndarray, dtype: str) -> NewTensor:
    """Returns a tensor that is in memory: counters, masks and tables."""
    raw = np.ascontiguousarray(array).view(RAW[DTYPE_BYTES[dtype]]).reshape(array.shape)

    def fill(box: Chunk, destination: np.ndarray) -> None:
        destination[...] = raw[(*box.within(Chunk.whole(raw.shape)), ...)]

    return NewTensor(array.shape, dtype, fill)


class _Emitter:
    """Pickle protocol 2 of plain values and tensors, with the opcodes that torch's weights-only reader knows."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.tensors: list[NewTensor] = []

    def emit(self, value: Any) -> None:
        """Appends a value; raises ValueError for one that is not plain."""
        if isinstance(value, NewTensor):
            self._tensor(value)
        elif isinstance(value, NewGlobal):
            self._global(*value)
        elif isinstance(value, NewObject):
            self._object(value)
        elif isinstance(value, tuple):
            self._items(b"(", value, b"t")
        elif isinstance(value, list):
            self._items(b"](", value, b"e")
        elif isinstance(value, dict):
            self._items(b"}(", itertools.chain.from_iterable(value.items()), b"u")
        else:
            self._scalar(value)

    def _items(self, opening: bytes, items: Iterable[Any], closing: bytes) -> None:
        self.out += opening
        for item in items:
            self.emit(item)
        self.out += closing

    def _scalar(self, value: Any) -> None:
        if value is None:
            self.out += b"N"
        elif isinstance(value, bool):
            self.out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self._integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode()
            self.out += b"X" + struct.pack("<I", len(text)) + text
        else:
            raise ValueError(f"a file of torch.save for weights holds no {type(value).__name__}")

    def _object(self, value: NewObject) -> None:
        self._global(value.kind.module, value.kind.name)
        self.emit(value.args)
        self.out += b"R" if value.call else b"\x81"
        if value.state is not None:
            self.emit(value.state)
            self.out += b"b"

    def _integer(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(data)]) + data

    def _global(self, module: str, name: str) -> None:
        self.out += f"c{module}\n{name}\n".encode()

    def _tensor(self, tensor: NewTensor) -> None:
        """torch._utils._rebuild_tensor_v2 (v3 where the dtype has no storage class) of a storage of its own."""
        typed = tensor.dtype in _STORAGE
        self._global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"(("
        self.emit("storage")
        if typed:
            self._global("torch", _STORAGE[tensor.dtype])
        else:
            self._global("torch.storage", "UntypedStorage")
        self.emit(str(len(self.tensors)))
        self.emit("cpu")
        self.emit(math.prod(tensor.shape) if typed else tensor.num_bytes)
        self.out += b"tQ"
        for value in (0, tensor.shape, row_strides(tensor.shape), False):
            self.emit(value)
        self._global("collections", "OrderedDict")
        self.out += b")R"
        if not typed:
            self._global("torch", _UNTYPED[tensor.dtype])
        self.out += b"tR"
        self.tensors.append(tensor)


def num_bytes(content: Any) -> int:
    """Returns an upper bound of the bytes that a file with this content takes."""
    emitter = _Emitter()
    emitter.emit(content)
    return len(emitter.out) + sum(tensor.num_bytes + 512 for tensor in emitter.tensors) + 4096


def write_torch(
    path: Path, content: Any, *, box_bytes: int, progress: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Writes a file of torch.save; at most `box_bytes` of tensor data are in memory.

    Args:
        content: Dicts, lists, tuples, numbers, text, None and NewTensors.
        progress: Gets the bytes just written.
    """
    with open(path, "wb") as stream:
        write_torch_stream(stream, path.name, content, box_bytes=box_bytes, progress=progress)


def write_torch_stream(
    stream: Any, prefix: str, content: Any, *, box_bytes: int, progress: Callable[[int], None]
) -> None:
    """Writes what write_torch does to an open file; `prefix` is the directory that the records of the zip lie in."""
    emitter = _Emitter()
    emitter.emit(content)
    emitter.out += b"."
    with zipfile.ZipFile(stream, "w") as archive:
        _write_record(archive, prefix, "data.pkl", bytes(emitter.out))
        _write_record(archive, prefix, "byteorder", b"little")
        for key, tensor in enumerate(emitter.tensors):
            with archive.open(_entry(archive, prefix, f"data/{key}", tensor.num_bytes), "w") as record:
                for box in contiguous_boxes(tensor.shape, max(1, box_bytes // DTYPE_BYTES[tensor.dtype])):
                    data = np.empty(box.size, RAW[DTYPE_BYTES[tensor.dtype]])
                    tensor.fill(box, data)
                    record.write(memoryview(data.reshape(-1).view(np.uint8)))
                    progress(data.nbytes)
        _write_record(archive, prefix, "version", b"3\n")


def pickled(value: Any) -> bytes:
    """Returns the pickle of plain values, NewObjects and NewGlobals, without tensors."""
    emitter = _Emitter()
    emitter.emit(value)
    assert not emitter.tensors
    return bytes(emitter.out) + b"."


def _write_record(archive: zipfile.ZipFile, prefix: str, name: str, data: bytes) -> None:
    with archive.open(_entry(archive, prefix, name, len(data)), "w") as record:
        record.write(data)


def _entry(archive: zipfile.ZipFile, prefix: str, name: str, size: int) -> zipfile.ZipInfo:
    """Returns the entry of a record of known size, with the padding that puts its data at a multiple of 64 bytes."""
    entry = zipfile.ZipInfo(f"{prefix}/{name}", (1980, 1, 1, 0, 0, 0))
    entry.file_size = size
    large = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile puts sizes over 4 GiB before our padding
    assert archive.fp is not None, "the archive is open"
    begin = archive.fp.tell() + 30 + len(entry.filename.encode()) + large + 4
    padding = -begin % _ALIGNMENT
    entry.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # torch's own padding field
    return entry
