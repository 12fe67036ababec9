"""index.json: what a checkpoint holds and where each byte lies. docs/checkpoint_format.md is the specification.

Reading checks everything a reader relies on, so the code behind it never meets an impossible index.
"""

import contextlib
import functools
import gc
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swin_moe.checkpoint.boxes import BoxFinder, find_gap, find_overlap, splits_rows
from swin_moe.checkpoint.digest import ALGORITHMS, DEFAULT, HEX_DIGITS, num_blocks
from swin_moe.checkpoint.errors import CorruptionError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, place_text
from swin_moe.checkpoint.sealed_json import read_seal, read_sealed, seal
from swin_moe.layout import Chunk

VERSION = 1
FILE_NAME = "index.json"
MAX_DIMS = 16
MAX_BYTES = 1 << 62
MAX_STEP = 10**10 - 1


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor and its bytes [begin, end) in a file; row-major, little-endian."""

    chunk: Chunk
    file: str
    begin: int
    end: int
    digests: tuple[str, ...] = ()  # one per 4 MiB block


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[StoredChunk, ...]  # by offset

    @functools.cached_property
    def _finder(self) -> BoxFinder:
        return BoxFinder([stored.chunk for stored in self.chunks])

    def overlapping(self, box: Chunk) -> Iterator[tuple[StoredChunk, Chunk]]:
        """Yields (stored chunk, the part of `box` that it holds), by offset."""
        for number, common in self._finder.overlapping(box):
            yield self.chunks[number], common


@dataclass(frozen=True)
class StoredFile:
    size: int  # bytes
    header: int  # bytes before the data
    digest: str  # of the header


@dataclass(frozen=True)
class Index:
    """The content of index.json, checked."""

    step: int
    file_size: int  # target data bytes per file that the files were filled to
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    state: dict[str, Any]  # JSON: seed, samples seen, loss scale, ...
    config: dict[str, Any]  # JSON: what defines the network and its training, nothing of layout or host
    algorithm: str = DEFAULT
    path: Path = field(default=Path("."), compare=False)  # the checkpoint's directory

    @classmethod
    def read(cls, path: str | Path) -> "Index":
        """Returns the checked index of the checkpoint directory `path`.

        Raises:
            CorruptionError: It is missing, changed, or describes something impossible; names the file and the tensor.
        """
        path = Path(path)
        try:
            with _collection_paused():
                return parse(read_sealed(path / FILE_NAME), path)
        except _Invalid as error:
            raise CorruptionError(f"{path / FILE_NAME}: {error}") from error

    def encode(self) -> bytes:
        """Returns the bytes of index.json."""
        tensors = {
            name: {
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "chunks": [
                    {
                        "offset": list(stored.chunk.offset),
                        "size": list(stored.chunk.size),
                        "file": stored.file,
                        "bytes": [stored.begin, stored.end],
                        "digest": list(stored.digests),
                    }
                    for stored in tensor.chunks
                ],
            }
            for name, tensor in self.tensors.items()
        }
        files = {
            name: {"bytes": file.size, "header": {"bytes": file.header, "digest": file.digest}}
            for name, file in self.files.items()
        }
        return seal(
            {
                "version": VERSION,
                "step": self.step,
                "digest": self.algorithm,
                "file_size": self.file_size,
                "tensors": tensors,
                "files": files,
                "state": self.state,
                "config": self.config,
            }
        )

    def check_files(self) -> None:
        """Raises CorruptionError unless every file is there with its size; reads no data."""
        for name, file in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise CorruptionError(f"{path}: is missing ({self._holds(name)})")
            size = path.stat().st_size
            if size != file.size:
                raise CorruptionError(f"{path}: has {size} bytes instead of {file.size} ({self._holds(name)})")

    def _holds(self, file: str) -> str:
        """Says what a file holds, for errors."""
        places = [
            (s.begin, place_text(n, s.chunk)) for n, t in self.tensors.items() for s in t.chunks if s.file == file
        ]
        if not places:
            return "it holds no tensor"
        return f"it holds {len(places)} chunks from {min(places)[1]} to {max(places)[1]}"


def read_files(path: Path) -> dict[str, int] | None:
    """Returns the files of the checkpoint directory `path` with their bytes, of an index whose seal is right.

    None where that takes reading all of it: by another writer, in another order, or of another version.

    Raises:
        CorruptionError: The index is missing or changed; names it.
    """
    body = read_seal(path / FILE_NAME)
    if not body.endswith(f',"version":{VERSION}'.encode()):
        return None
    text, decoder, at, algorithm = body.decode("ascii", "replace"), json.JSONDecoder(), 1, ""
    try:
        while True:  # the keys are sorted: "files" comes before "tensors", which are nearly all of the text
            key, at = decoder.raw_decode(text, at)
            value, at = decoder.raw_decode(text, at + 1)
            if key == "files":
                return {name: _parse_file(name, file, algorithm).size for name, file in value.items()}
            algorithm = value if key == "digest" else algorithm
            at += 1
    except (ValueError, KeyError, RecursionError, AttributeError, _Invalid):
        return None


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Keeps Python from looking for garbage among objects that all stay: 40 % of reading a large index."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Invalid(Exception):
    """Why an index is refused, without its path."""


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise _Invalid(message)


def _field(content: Any, key: str, kind: type, where: str) -> Any:
    _expect(isinstance(content, dict), f"{where} must be an object")
    _expect(key in content, f"{where} has no {key!r}")
    value = content[key]
    _expect(type(value) is kind, f"{where}: {key} must be {kind.__name__}, got {type(value).__name__}")
    return value


def _numbers(content: object, key: str, where: str, length: int | None = None) -> tuple[int, ...]:
    values = _field(content, key, list, where)
    allowed = all(type(v) is int and 0 <= v <= MAX_BYTES for v in values)
    _expect(allowed, f"{where}: {key} must hold whole numbers in [0, 2**62]")
    _expect(length is None or len(values) == length, f"{where}: {key} must have {length} numbers, got {len(values)}")
    return tuple(values)


def _hex(value: Any, algorithm: str, where: str) -> str:
    digits = HEX_DIGITS[algorithm]
    good = isinstance(value, str) and len(value) == digits and not set(value) - set("0123456789abcdef")
    _expect(good, f"{where}: a digest must be {digits} lower-case hex digits")
    return value


def parse(content: dict, path: Path) -> Index:
    """Returns the index that unsealed JSON describes; fields it does not know are ignored.

    Raises:
        _Invalid: With the reason; Index.read adds the path.
    """
    version = _field(content, "version", int, "the index")
    _expect(version == VERSION, f"format version {version} is not supported, this reader knows {VERSION}")
    step = _field(content, "step", int, "the index")
    _expect(0 <= step <= MAX_STEP, f"step must be in [0, {MAX_STEP}], got {step}")
    algorithm = _field(content, "digest", str, "the index")
    _expect(algorithm in ALGORITHMS, f"digest {algorithm!r} is unknown; allowed: {', '.join(ALGORITHMS)}")
    file_size = _field(content, "file_size", int, "the index")
    _expect(0 < file_size <= MAX_BYTES, f"file_size must be in [1, 2**62], got {file_size}")
    files = {n: _parse_file(n, f, algorithm) for n, f in _field(content, "files", dict, "the index").items()}
    tensors = {
        name: _parse_tensor(name, tensor, files, algorithm)
        for name, tensor in sorted(_field(content, "tensors", dict, "the index").items())
    }
    _check_tiling(tensors, files)
    state, config = (_field(content, key, dict, "the index") for key in ("state", "config"))
    return Index(step, file_size, tensors, files, state, config, algorithm, path)


def _parse_file(name: str, content: object, algorithm: str) -> StoredFile:
    where = f"file {name!r}"
    plain = 0 < len(name) <= 255 and name.isprintable() and not set(name) & set("/\\:") and not name.startswith(".")
    _expect(plain, f"{where} must be a plain name inside the checkpoint")
    _expect(name != FILE_NAME, f"{where} cannot be the index itself")
    size = _field(content, "bytes", int, where)
    header = _field(content, "header", dict, where)
    length = _field(header, "bytes", int, where)
    _expect(8 <= length <= size <= MAX_BYTES, f"{where}: {length} header bytes of {size} bytes are impossible")
    return StoredFile(size, length, _hex(header.get("digest"), algorithm, where))


def _parse_tensor(name: str, content: object, files: dict[str, StoredFile], algorithm: str) -> StoredTensor:
    where = f"tensor {name}"
    _expect(0 < len(name) <= 4096 and name.isprintable(), f"tensor name {name[:80]!r} must be printable text")
    dtype = _field(content, "dtype", str, where)
    _expect(dtype in DTYPE_BYTES, f"{where}: dtype {dtype!r} is unknown")
    shape = _numbers(content, "shape", where)
    _expect(len(shape) <= MAX_DIMS, f"{where}: {len(shape)} dims, at most {MAX_DIMS} are allowed")
    # Without the zeros: (2**62, 2**62, 0) holds nothing, but arithmetic on it would overflow elsewhere.
    _expect(math.prod(n or 1 for n in shape) * DTYPE_BYTES[dtype] <= MAX_BYTES, f"{where}: shape {shape} is absurd")
    stored = [
        _usual_chunk(c, shape, dtype, files, algorithm) or _parse_chunk(where, c, shape, dtype, files, algorithm)
        for c in _field(content, "chunks", list, where)
    ]
    boxes = [s.chunk for s in stored]
    if not splits_rows(shape, boxes):
        _expect(boxes == sorted(boxes), f"{where}: chunks are not in the order of their offsets")
        clash = find_overlap(boxes)
        _expect(clash is None, f"{where}: chunks at {clash and [c.offset for c in clash]} overlap")
        gap = find_gap(shape, boxes)
        _expect(gap is None, f"{where}: no chunk holds the box at {gap and gap.offset} of {gap and gap.size}")
    return StoredTensor(shape, dtype, tuple(stored))


_DIGESTS = {name: re.compile(f"[0-9a-f]{{{digits}}}") for name, digits in HEX_DIGITS.items()}


def _usual_chunk(
    content: Any, shape: tuple[int, ...], dtype: str, files: dict[str, StoredFile], algorithm: str
) -> StoredChunk | None:
    """Returns what _parse_chunk does for a chunk in which nothing is wrong; None where that has to look closer.

    An index has tens of thousands of chunks: five times as fast, as no sentence is made that nobody reads.
    """
    try:
        offset, size, file, (begin, end), digests = (content[k] for k in ("offset", "size", "file", "bytes", "digest"))
        held = files[file]
        numbers = [*offset, *size, begin, end]
        if (
            {type(offset), type(size), type(content["bytes"]), type(digests)} != {list}
            or set(map(type, numbers)) != {int}
            or not len(offset) == len(size) == len(shape)
            or 0 in size
            or min(numbers) < 0
            or any(o + n > s for o, n, s in zip(offset, size, shape))
            or not held.header <= begin <= end <= held.size
        ):
            return None
        needed = math.prod(size) * DTYPE_BYTES[dtype]
        matches = _DIGESTS[algorithm].fullmatch
        if end - begin != needed or len(digests) != num_blocks(needed) or not all(map(matches, digests)):
            return None
    except (TypeError, KeyError, ValueError):
        return None
    return StoredChunk(Chunk(tuple(offset), tuple(size)), file, begin, end, tuple(digests))


def _parse_chunk(
    where: str, content: object, shape: tuple[int, ...], dtype: str, files: dict[str, StoredFile], algorithm: str
) -> StoredChunk:
    offset, size = _numbers(content, "offset", where, len(shape)), _numbers(content, "size", where, len(shape))
    place = f"{where}, chunk at {list(offset)}"
    inside = all(o + n <= s for o, n, s in zip(offset, size, shape))
    _expect(inside, f"{place} of {size} lies outside the shape {shape}")
    _expect(0 in shape or 0 not in size, f"{place} is empty")
    file = _field(content, "file", str, place)
    _expect(file in files, f"{place} is in file {file!r}, which the index does not list")
    begin, end = _numbers(content, "bytes", place, 2)
    present = files[file].header <= begin <= end <= files[file].size
    _expect(present, f"{place}: bytes {begin} to {end} are not in {file}")
    needed = math.prod(size) * DTYPE_BYTES[dtype]
    _expect(end - begin == needed, f"{place}: has {end - begin} bytes, its size needs {needed}")
    digests = _field(content, "digest", list, place)
    _expect(len(digests) == num_blocks(needed), f"{place}: has {len(digests)} digests, needs {num_blocks(needed)}")
    return StoredChunk(Chunk(offset, size), file, begin, end, tuple(_hex(d, algorithm, place) for d in digests))


def _check_tiling(tensors: dict[str, StoredTensor], files: dict[str, StoredFile]) -> None:
    """Refuses chunks that share bytes, and bytes that no chunk (hence no digest) covers."""
    ranges: dict[str, list[tuple[int, int, str, Chunk]]] = {name: [] for name in files}
    for name, tensor in tensors.items():
        for stored in tensor.chunks:
            ranges[stored.file].append((stored.begin, stored.end, name, stored.chunk))
    for name, file in files.items():
        reached = file.header
        for begin, end, held, chunk in sorted(ranges[name]):
            if begin != reached:
                problem = "shares bytes with the chunk before it" if begin < reached else "leaves a gap before it"
                place = place_text(held, chunk)
                raise _Invalid(f"{place}: {problem} in {name} (begins at {begin}, expected {reached})")
            reached = end
        _expect(reached == file.size, f"file {name!r}: bytes {reached} to {file.size} belong to no chunk")


def add_digests(tensors: dict[str, StoredTensor], digests: list) -> dict[str, StoredTensor]:
    """Returns the tensors with the digests that all ranks found: per rank (tensor, chunk number, digests)."""
    known = {(name, i): values for rank in digests for name, i, values in rank}
    return {
        name: replace(
            tensor,
            chunks=tuple(replace(s, digests=known[name, i]) for i, s in enumerate(tensor.chunks)),
        )
        for name, tensor in tensors.items()
    }
