"""Bytes of shard files: writing boxes into them, reading boxes out of them with the touched blocks verified."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

from swin_moe.checkpoint.boxes import row_strides, split_runs, split_slabs
from swin_moe.checkpoint.digest import BLOCK_BYTES, block_digests, digest, read_exactly
from swin_moe.checkpoint.errors import CorruptionError
from swin_moe.checkpoint.index import Index, StoredChunk
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW, place_text
from swin_moe.checkpoint.plan import FilePlan, expected_headers
from swin_moe.layout import Chunk

SLAB_BYTES = 16 << 20  # read at once; bounds the reader's memory, with one block at each end
WRITE_BYTES = 64 << 20  # per system call; Linux writes at most 2 GiB in one


def create_files(directory: Path, plan: FilePlan) -> None:
    """Creates every shard file with its header and its final size; the data is written later, by any rank."""
    for name, file in plan.files.items():
        path = directory / name
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.ftruncate(fd, file.size)
            _write_all(fd, memoryview(plan.headers[name]), 0)
            os.fsync(fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(fd)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + WRITE_BYTES], offset + done)


class ShardWriter:
    """Writes boxes into the created files of a directory; `close` makes them durable.

    Files are opened when first written and closed before other ranks read them back, which network file systems need.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, int] = {}

    def write(self, stored: StoredChunk, part: Chunk, raw: np.ndarray) -> None:
        """Writes `raw`, the elements of the box `part` as raw integers of any strides, into its place in a chunk.

        Raises:
            OSError: With the path of the file.
        """
        if part.numel == 0:
            return
        starts, length = split_runs(part, stored.chunk)
        rows = np.ascontiguousarray(raw).reshape(len(starts), length).view(np.uint8)
        for start, row in zip(starts.tolist(), rows):
            self.write_bytes(stored.file, stored.begin + start * raw.dtype.itemsize, memoryview(row))

    def write_bytes(self, file: str, offset: int, data: memoryview) -> None:
        """Writes bytes into a file at an offset; without any, `close` still makes the file durable.

        Raises:
            OSError: With the path of the file.
        """
        path = self._directory / file
        try:
            if file not in self._open:
                self._open[file] = os.open(path, os.O_WRONLY)
            _write_all(self._open[file], data, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def close(self, *, sync: bool = True) -> None:
        """Closes all files, by default only after their bytes are on disk."""
        while self._open:
            name, fd = self._open.popitem()
            try:
                if sync:
                    os.fsync(fd)
            except OSError as error:
                self.close(sync=False)
                raise OSError(error.errno, error.strerror, str(self._directory / name)) from error
            finally:
                os.close(fd)


class ShardReader:
    """Reads boxes of stored chunks into arrays; memory is bounded by SLAB_BYTES and two blocks."""

    def __init__(self, index: Index, *, verify: bool = True) -> None:
        self._index, self._verify = index, verify
        self._files: dict[str, int] = {}
        self._buffer = np.empty(0, np.uint8)
        self._window: tuple[StoredChunk | None, int, int] = (None, 0, 0)  # chunk and its bytes now in the buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, name: str, stored: StoredChunk, box: Chunk, destination: np.ndarray) -> None:
        """Fills `destination` (raw integers, shape box.size, any strides) with the box of a stored chunk.

        Raises:
            CorruptionError: A block that the box touches is not what was written; names file, tensor and expert.
        """
        raw = RAW[DTYPE_BYTES[self._index.tensors[name].dtype]]
        strides = tuple(s * raw.itemsize for s in row_strides(stored.chunk.size))
        for slab, first, last in split_slabs(box, stored.chunk, SLAB_BYTES // raw.itemsize):
            data = self._fetch(name, stored, first * raw.itemsize, last * raw.itemsize)
            destination[slab.within(box)] = np.ndarray(slab.size, raw, buffer=data, strides=strides)

    def _fetch(self, name: str, stored: StoredChunk, begin: int, end: int) -> np.ndarray:
        """Returns the bytes [begin, end) of a chunk; valid until the next call."""
        fd = self._file(stored.file)
        held, low, high = self._window
        if self._verify and held is stored and low <= begin and end <= high:  # rows of one block, one after another
            return self._buffer[begin - low : end - low]
        start, stop = begin, end
        if self._verify:
            start = begin // BLOCK_BYTES * BLOCK_BYTES
            stop = min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, stored.end - stored.begin)
        if len(self._buffer) < stop - start:
            grown = np.empty(min(SLAB_BYTES + 2 * BLOCK_BYTES, max(stop - start, 2 * len(self._buffer))), np.uint8)
            grown[: len(self._buffer)] = self._buffer
            self._buffer = grown
        kept = 0
        if self._verify and held is stored and low <= start < high:  # the block two slabs share is read once
            kept = min(high, stop) - start
            self._buffer[:kept] = self._buffer[start - low : start - low + kept].copy()
        self._window = (None, 0, 0)
        path = self._index.path / stored.file
        view = memoryview(self._buffer)[: stop - start]
        read_exactly(fd, view[kept:], stored.begin + start + kept, path)
        if self._verify:
            for offset in range(kept, stop - start, BLOCK_BYTES):
                block = (start + offset) // BLOCK_BYTES
                if digest(view[offset : offset + BLOCK_BYTES], self._index.algorithm) != stored.digests[block]:
                    raise CorruptionError(block_error(path, name, stored, block))
            self._window = (stored, start, stop)
        return self._buffer[begin - start : end - start]

    def _file(self, name: str) -> int:
        """Returns the descriptor of a file, opened with its size and header checked."""
        if name not in self._files:
            path, file = self._index.path / name, self._index.files[name]
            fd = open_checked(path, file.size)
            self._files[name] = fd
            if self._verify:
                check_header(fd, path, self._index, name)
        return self._files[name]


def open_checked(path: Path, size: int) -> int:
    """Returns a descriptor for reading a regular file of exactly `size` bytes.

    Raises:
        CorruptionError: It is missing, no regular file, of another size, or unreadable.
    """
    try:
        if not path.is_file():
            raise CorruptionError(f"{path}: is missing")
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CorruptionError(f"{path}: cannot be read ({error.strerror})") from error
    actual = os.fstat(fd).st_size
    if actual != size:
        os.close(fd)
        raise CorruptionError(f"{path}: has {actual} bytes instead of {size}")
    return fd


def check_header(fd: int, path: Path, index: Index, name: str) -> bytes:
    """Returns the header of an open file.

    Raises:
        CorruptionError: It is not the one that was written.
    """
    header = bytearray(index.files[name].header)
    read_exactly(fd, memoryview(header), 0, path)
    if digest(header, index.algorithm) != index.files[name].digest:
        raise CorruptionError(f"{path}: its header (the list of its chunks) does not match its digest")
    return bytes(header)


def block_error(path: Path, name: str, stored: StoredChunk, block: int) -> str:
    """Returns the sentence for a block whose bytes do not match their digest."""
    begin = stored.begin + block * BLOCK_BYTES
    end = min(begin + BLOCK_BYTES, stored.end)
    return f"{path}: {place_text(name, stored.chunk)}: bytes {begin} to {end} do not match their digest"


def find_corruption(index: Index, *, data: bool = True) -> list[str]:
    """Returns one sentence for each thing on disk that is not what was written; empty if all is. Reads every byte.

    Args:
        data: False: only the files' headers are read.
    """
    problems = []
    headers = expected_headers(index)
    for file in index.files:
        path = index.path / file
        fd = -1
        try:
            fd = open_checked(path, index.files[file].size)
            if check_header(fd, path, index, file) != headers[file]:
                problems.append(f"{path}: its header does not list the chunks that the index has there")
        except CorruptionError as error:
            problems.append(str(error))
        finally:
            if fd >= 0:
                os.close(fd)
    broken = {problem.partition(": ")[0] for problem in problems}
    chunks = [(s, name) for name, tensor in index.tensors.items() if data for s in tensor.chunks]
    return problems + find_wrong_blocks(index, (c for c in chunks if str(index.path / c[0].file) not in broken))


def find_wrong_blocks(
    index: Index,
    chunks: Iterable[tuple[StoredChunk, str]],
    *,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """Returns one sentence for each block of these chunks that is not what was written; reads all of their bytes.

    Chunks that follow each other are read together: an expert's bias is a few bytes, a call of the system microseconds.

    Args:
        chunks: Stored chunks, each with the name of its tensor.
        progress: Gets the bytes just read.
    """
    problems: list[str] = []
    files: dict[str, list[tuple[StoredChunk, str]]] = {}
    for stored, name in chunks:
        files.setdefault(stored.file, []).append((stored, name))
    buffer = memoryview(np.empty(SLAB_BYTES, np.uint8))
    for file, content in sorted(files.items()):
        path, fd = index.path / file, -1
        try:
            fd = open_checked(path, index.files[file].size)
            for group in _neighbours(sorted(content, key=lambda item: item[0].begin)):
                first, last = group[0][0].begin, group[-1][0].end
                data = buffer[: last - first] if len(group) > 1 else None
                if data is not None:
                    read_exactly(fd, data, first, path)
                for stored, name in group:
                    actual = _digests_of(index, stored, path, fd, data, first)
                    if actual != stored.digests:
                        wrong = (i for i, (a, b) in enumerate(zip(actual, stored.digests)) if a != b)
                        problems += [block_error(path, name, stored, block) for block in wrong]
                progress(last - first)
        except CorruptionError as error:
            problems.append(str(error))
        finally:
            if fd >= 0:
                os.close(fd)
    return problems


def _neighbours(chunks: list[tuple[StoredChunk, str]]) -> Iterator[list[tuple[StoredChunk, str]]]:
    """Yields chunks in the order of their bytes: those that follow each other and fit SLAB_BYTES together."""
    group: list[tuple[StoredChunk, str]] = []
    for item in chunks:
        if group and (item[0].begin != group[-1][0].end or item[0].end - group[0][0].begin > SLAB_BYTES):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _digests_of(
    index: Index, stored: StoredChunk, path: Path, fd: int, data: memoryview | None, first: int
) -> tuple[str, ...]:
    """Returns the digests of a chunk's blocks; `data` are the bytes of the file from `first` on, None = to be read."""
    if data is None:
        return tuple(block_digests(fd, stored.begin, stored.end, index.algorithm, path))
    begin, end = stored.begin - first, stored.end - first
    return tuple(digest(data[i : min(i + BLOCK_BYTES, end)], index.algorithm) for i in range(begin, end, BLOCK_BYTES))
