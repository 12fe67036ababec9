"""Files of torch.save as named byte ranges: read without torch, executing nothing, any box with bounded memory.

Layout: torch/serialization.py and caffe2/serialize/inline_container.h (pytorch): a zip of stored records
<prefix>/data.pkl, <prefix>/data/<key>, one per storage. Files from before torch 1.6 are read by torch_legacy.py.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from checkpoint_tools.files.pickle_reader import MAX_PICKLE_BYTES, read_pickle
from checkpoint_tools.files.record_file import OpenFiles, RecordFile, TensorRecord
from checkpoint_tools.files.torch_legacy import read_legacy
from checkpoint_tools.files.torch_tensors import named_records, storage_of, tensor_builders
from swin_moe.checkpoint.digest import read_exactly
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.pieces import DTYPE_BYTES

MAX_RECORDS = 1 << 20


class Window(io.RawIOBase):
    """Part of a file as a file of its own, for reading or for writing at its end.

    Args:
        stream: The whole file. first: Byte where the part begins. length: Its bytes, for reading.
    """

    def __init__(self, stream: IO[bytes], first: int, length: int = 0) -> None:
        self._stream, self._first, self._length, self._at = stream, first, length, 0

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Returns the position in the part."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a position; returns it."""
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise ValueError("a position before the beginning")
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes of the part."""
        left = max(0, self._length - self._at)
        self._stream.seek(self._first + self._at)
        data = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def write(self, data: Any) -> int:
        """Writes bytes at the position; returns their number."""
        self._stream.seek(self._first + self._at)
        count = self._stream.write(data)
        self._at += count
        self._length = max(self._length, self._at)
        return count


class TorchFile(RecordFile):
    """A file of torch.save: `content` is its object with TensorRecords for tensors.

    Args:
        path: The file.
        files: Where descriptors are kept; shared by the files of one checkpoint.
        inert: Further classes whose objects become Instances.
        window: (first byte, bytes) of the part of the file that torch.save wrote; None = all of it.

    Raises:
        CheckpointError: It is no such file, or asks for what is refused; names the file, and the global or tensor.
        CorruptionError: It is cut off or contradicts itself.
    """

    def __init__(
        self,
        path: Path,
        files: OpenFiles | None = None,
        *,
        inert: Collection[str] = (),
        window: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(path, files)
        builders = tensor_builders()
        if window is None and not zipfile.is_zipfile(path):
            with open(path, "rb") as stream:
                if stream.read(4) == b"PK\x03\x04":
                    raise CorruptionError(f"{path}: is cut off: it begins as a file of torch.save, its end is missing")
            self.content, self._begin = read_legacy(path, builders, inert)
        else:
            pickled = self._read_directory(window)
            self.content = read_pickle(pickled, path, builders=builders, inert=inert, persistent=storage_of)
        for name, record in named_records(self.content):
            self._check(name, record)

    def _read_directory(self, window: tuple[int, int] | None) -> bytes:
        """Returns data.pkl after checking every record of the zip; fills the places of the storages."""
        try:
            with open(self.path, "rb") as stream:
                first, length = window or (0, os.fstat(stream.fileno()).st_size)
                entries = zipfile.ZipFile(Window(stream, first, length)).infolist()
                records = {entry.filename: self._place(entry, stream, first, length) for entry in entries}
                sums = {entry.filename: entry.CRC for entry in entries}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CorruptionError(f"{self.path}: is no readable zip file ({error})") from error
        if len(records) != len(entries) or len(entries) > MAX_RECORDS:
            raise CorruptionError(f"{self.path}: a record stands twice in it, or there are over {MAX_RECORDS}")
        end = 0
        for name, (begin, length) in sorted(records.items(), key=lambda item: item[1]):
            if begin < end:
                raise CorruptionError(f"{self.path}: record {name} overlaps the one before it")
            end = begin + length
        pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{self.path}: is no file of torch.save: {len(pickles)} records data.pkl")
        prefix = pickles[0].removesuffix("data.pkl")
        order = records.get(f"{prefix}byteorder")
        if order is not None and self._bytes(*order, limit=16) != b"little":
            raise CheckpointError(f"{self.path}: was written on a big-endian machine, which is not supported")
        data = f"{prefix}data/"
        self._begin = {name.removeprefix(data): place for name, place in records.items() if name.startswith(data)}
        # 0: torch.serialization.set_crc32_options(False) was on.
        self._unverified = {key: sums[f"{data}{key}"] for key in self._begin if sums[f"{data}{key}"]}
        self._has_sums = len(self._unverified) == sum(1 for _, length in self._begin.values() if length)
        return self._bytes(*records[pickles[0]], limit=MAX_PICKLE_BYTES)

    def _place(self, entry: zipfile.ZipInfo, stream: IO[bytes], first: int, length: int) -> tuple[int, int]:
        """Returns (first byte, bytes) of a record; refuses what torch.save never writes."""
        name, where = entry.filename, f"{self.path}: record {entry.filename[:100]!r}"
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise CheckpointError(f"{where} leaves its directory, which is refused")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise CheckpointError(f"{where} is compressed or encrypted, which torch.save never does; it is refused")
        stream.seek(first + entry.header_offset)
        header = stream.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise CorruptionError(f"{where} has no header where the directory says")
        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if begin + entry.file_size > length:
            raise CorruptionError(f"{where} reaches beyond the end of the file")
        return first + begin, entry.file_size

    def _bytes(self, begin: int, length: int, *, limit: int) -> bytes:
        if length > limit:
            raise CheckpointError(f"{self.path}: a record of {length} bytes where at most {limit} are allowed")
        data = bytearray(length)
        read_exactly(self.files.get(self.path), memoryview(data), begin, self.path)
        return bytes(data)

    def _check(self, name: str, record: TensorRecord) -> None:
        """Raises CorruptionError unless every element of the tensor lies in its storage and that in its record."""
        where, storage = f"{self.path}: tensor {name}", record.storage
        if storage.key not in self._begin:
            raise CorruptionError(f"{where}: its storage {storage.key!r} is missing")
        if storage.numel * DTYPE_BYTES[storage.dtype] > self._begin[storage.key][1]:
            raise CorruptionError(f"{where}: its storage {storage.key!r} is cut off")
        item = DTYPE_BYTES[record.dtype]
        held, count = storage.numel * DTYPE_BYTES[storage.dtype], math.prod(record.shape)
        last = record.offset + sum((n - 1) * s for n, s in zip(record.shape, record.stride)) + 1
        if count and (last * item > held or count * item > held):
            raise CorruptionError(f"{where}: shape {record.shape} needs more than the {held} bytes of its storage")
