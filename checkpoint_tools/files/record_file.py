"""Files that hold tensors as byte ranges: any box of any tensor, by reads of bounded size. No torch.

What a kind of file adds (torch_file.py, safetensors_file.py) is how it says where its tensors lie.
"""

import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from swin_moe.checkpoint.boxes import row_strides
from swin_moe.checkpoint.digest import read_exactly
from swin_moe.checkpoint.errors import CorruptionError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.layout import Chunk, boxes_of_range

VERIFY_BYTES = 1 << 20  # read at once for a CRC; stays in the cache of a core
SPAN_BYTES = 16 << 20  # read at once where a box is not one run of the file


class Storage(NamedTuple):
    """The bytes that tensors are views of."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of a file: where its elements lie. Strides and offset in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def reshaped(self, shape: tuple[int, ...]) -> Self | None:
        """Returns the same elements in another shape, in row-major order; None if their number or order forbids it."""
        if math.prod(shape) != math.prod(self.shape) or not is_row_major(self.shape, self.stride):
            return None
        return replace(self, shape=shape, stride=row_strides(shape))


class OpenFiles:
    """Descriptors of files read in turn; the least recently used are closed, as ranks may outnumber what is legal."""

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self._open: dict[Path, int] = {}

    def get(self, path: Path) -> int:
        """Returns a descriptor for reading, valid until `limit` other files were asked for."""
        fd = self._open.pop(path, -1)
        if fd < 0:
            try:
                fd = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CorruptionError(f"{path}: cannot be read ({error.strerror})") from error
            while len(self._open) >= self._limit:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[path] = fd
        return fd

    def close(self) -> None:
        """Closes all."""
        while self._open:
            os.close(self._open.popitem()[1])


class RecordFile:
    """A file and where the storages of its tensors lie.

    Args:
        path: The file.
        files: Where descriptors are kept; shared by the files of one checkpoint.
    """

    def __init__(self, path: Path, files: OpenFiles | None = None) -> None:
        self.path, self.files = path, files or OpenFiles()
        self.content: Any = None  # what the file holds, with TensorRecords for tensors
        self.metadata: dict[str, str] = {}  # text that stands beside the tensors, of kinds of file that have it
        self._begin: dict[str, tuple[int, int]] = {}  # storage key -> first byte, bytes
        self._unverified: dict[str, int] = {}  # storage key -> CRC-32 of its bytes, until they were compared with it
        self._has_sums = False

    @property
    def has_digests(self) -> bool:
        """Whether `verify` compares anything."""
        return self._has_sums

    def locate(self, record: TensorRecord, box: Chunk) -> int:
        """Returns the byte of the file where reading a box begins."""
        first = record.offset + sum(o * s for o, s in zip(box.offset, record.stride))
        return self._begin[record.storage.key][0] + first * DTYPE_BYTES[record.dtype]

    def read(self, record: TensorRecord, box: Chunk, destination: np.ndarray) -> None:
        """Fills `destination`, raw integers of shape box.size and any strides, with a box of a tensor."""
        if box.numel == 0:
            return
        item, fd = DTYPE_BYTES[record.dtype], self.files.get(self.path)
        whole = Chunk((0,) * len(box.size), box.size)
        for part in split_spans(whole, record.stride, SPAN_BYTES // item):
            target = destination[(*part.within(whole), ...)]
            shifted = Chunk(tuple(a + b for a, b in zip(part.offset, box.offset)), part.size)
            begin = self.locate(record, shifted)
            strides = tuple(s if n > 1 else 0 for n, s in zip(part.size, record.stride))
            count = sum((n - 1) * s for n, s in zip(part.size, strides)) + 1
            if count == part.numel and target.flags.c_contiguous and is_row_major(part.size, record.stride):
                read_exactly(fd, memoryview(target.reshape(-1).view(np.uint8)), begin, self.path)
                continue
            data = np.empty(count * item, np.uint8)
            read_exactly(fd, memoryview(data), begin, self.path)
            target[...] = np.ndarray(part.size, RAW[item], data, strides=tuple(s * item for s in strides))

    def verify(self, name: str, record: TensorRecord) -> None:
        """Compares the storage of a tensor with its CRC-32, the first time; files without one pass.

        Raises:
            CorruptionError: They differ; names the file and the tensor.
        """
        wanted = self._unverified.pop(record.storage.key, None)
        if wanted is None:
            return
        begin, length = self._begin[record.storage.key]
        fd, found = self.files.get(self.path), 0
        buffer = memoryview(np.empty(min(VERIFY_BYTES, length), np.uint8))
        for start in range(0, length, VERIFY_BYTES):
            data = buffer[: min(VERIFY_BYTES, length - start)]
            read_exactly(fd, data, begin + start, self.path)
            found = zlib.crc32(data, found)
        if found != wanted:
            raise CorruptionError(f"{self.path}: tensor {name}: its bytes do not match their CRC-32")


def is_row_major(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Returns whether a box of this size with these strides is one run of elements in row-major order."""
    want = 1
    for n, s in zip(reversed(size), reversed(stride)):
        if n > 1 and s != want:
            return False
        want *= n
    return True


def split_spans(box: Chunk, stride: tuple[int, ...], limit: int) -> list[Chunk]:
    """Returns boxes that make up `box`, each spanning at most `limit` elements of a storage with these strides."""
    span = sum((n - 1) * s for n, s in zip(box.size, stride)) + 1
    if span <= limit or box.numel == 1:
        return [box]
    dim = max((d for d, n in enumerate(box.size) if n > 1), key=lambda d: (box.size[d] - 1) * stride[d])
    # Whole rows of the widest dim that fit together, so that a contiguous tensor is cut into few long runs.
    inner = span - (box.size[dim] - 1) * stride[dim]
    step = max(1, (limit - inner) // max(1, stride[dim]) + 1)
    parts = []
    for start in range(0, box.size[dim], step):
        offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
        size = (*box.size[:dim], min(step, box.size[dim] - start), *box.size[dim + 1 :])
        part = Chunk(offset, size)
        parts += split_spans(part, stride, limit) if step == 1 else [part]
    return parts


def contiguous_boxes(shape: tuple[int, ...], limit: int) -> Iterator[Chunk]:
    """Yields the boxes of at most `limit` elements that make up a tensor, in row-major order."""
    count = math.prod(shape)
    for start in range(0, count, limit):
        yield from boxes_of_range(shape, start, min(start + limit, count))
