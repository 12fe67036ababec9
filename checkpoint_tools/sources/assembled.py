"""A source made of tensors that lie in many files: parts of each of ours, and equal copies of parts.

Copies are compared where they are read, so every byte is read once: the official loop lets the dense weights of its
ranks drift apart (each clips by the norm of its own experts), and dropping all but one would hide it.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from checkpoint_tools.files.floats import decode, encode
from checkpoint_tools.files.record_file import RecordFile, TensorRecord, contiguous_boxes
from checkpoint_tools.sources.base import Options, Source, SourceTensor
from swin_moe.checkpoint.boxes import BoxFinder, find_gap, find_overlap
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW, place_text
from swin_moe.layout import Chunk


class Place(NamedTuple):
    """Our name of a tensor, and which part of how many along dim 0 it is."""

    name: str
    part: int = 0
    parts: int = 1


class Leaf(NamedTuple):
    """A tensor of one file."""

    file: RecordFile
    record: TensorRecord


class Part(NamedTuple):
    """A box of one of our tensors and where it lies: copies that should be equal, each at least as large as the box."""

    box: Chunk
    copies: tuple[Leaf, ...]


class AssembledSource(Source):
    """See Source. `parts` together cover every element of a tensor exactly once.

    Raises:
        CheckpointError: They do not; names the tensor and what is missing or stands twice.
    """

    def __init__(
        self,
        format: str,  # noqa: A002 - the attribute's name
        path: Path,
        parts: Mapping[str, list[Part]],
        options: Options,
        *,
        step: int = 0,
        state: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.format, self.path, self.options = format, path, options
        self.parts = {name: sorted(found, key=lambda part: part.box) for name, found in parts.items()}
        self._finders = {name: BoxFinder([part.box for part in found]) for name, found in self.parts.items()}
        self.step, self.state, self.config, self.provenance = step, state or {}, config or {}, provenance or {}
        files = {leaf.file.path: leaf.file for p in self.parts.values() for part in p for leaf in part.copies}
        self.files = sorted(files)
        self._open = list(files.values())
        self.tensors = {name: _whole(path, name, parts[name]) for name in sorted(parts)}
        self.has_digests = all(file.has_digests for file in self._open)
        self._told: set[str] = set()
        self.tables: dict[str, Leaf] = {}  # coordinate tables: no parameters, but they tell the windows trained with

    def read_table(self, name: str) -> np.ndarray:
        """Returns a coordinate table as raw integers."""
        return _load(self.tables[name], Chunk.whole(self.tables[name].record.shape))

    def read(self, name: str, box: Chunk, destination: np.ndarray) -> None:
        """See Source."""
        for part, common in self._overlapping(name, box):
            self._read_part(name, part, common, destination[(*common.within(box), ...)])

    def _overlapping(self, name: str, box: Chunk) -> Iterator[tuple[Part, Chunk]]:
        """Yields the parts of a tensor that hold something of a box, each with what it holds."""
        return ((self.parts[name][i], common) for i, common in self._finders[name].overlapping(box))

    def _read_part(self, name: str, part: Part, box: Chunk, destination: np.ndarray) -> None:
        inner = Chunk(tuple(a - b for a, b in zip(box.offset, part.box.offset)), box.size)
        first, *others = part.copies
        if self.options.verify:
            first.file.verify(place_text(name, box).removeprefix("tensor "), first.record)
        first.file.read(first.record, inner, destination)
        if not others:
            return
        wanted = _digest(destination)
        scratch = np.empty(box.size, RAW[DTYPE_BYTES[self.tensors[name].dtype]])
        for leaf in others:
            leaf.file.read(leaf.record, inner, scratch)
            if _digest(scratch) != wanted:
                self._tell_drift(name)
                if self.options.on_drift == "mean":
                    self._read_mean(name, part, inner, destination)
                return

    def _tell_drift(self, name: str) -> None:
        """Reports a tensor whose copies differ, once, or raises CheckpointError."""
        if name in self._told:
            return
        self._told.add(name)
        worst, where = self._max_delta(name)
        sentence = f"{self.path}: tensor {name}: the copies differ by up to {worst:.3g} (first and {where})"
        if self.options.on_drift == "error":
            raise CheckpointError(f"{sentence}; choose --on-drift first or mean to go on")
        self.options.report(f"{sentence}; kept: {self.options.on_drift}")

    def _max_delta(self, name: str) -> tuple[float, str]:
        """Returns the largest difference of any copy to the first, over the whole tensor, and the copy's file."""
        worst, where, dtype = -1.0, "", self.tensors[name].dtype
        for part in self.parts[name]:
            for leaf in part.copies[1:]:
                for box in contiguous_boxes(part.box.size, self.options.box_bytes // DTYPE_BYTES[dtype]):
                    first, other = (decode(_load(copy, box), dtype) for copy in (part.copies[0], leaf))
                    difference = np.abs(first - other)
                    largest = float(np.max(np.where(np.isnan(difference), np.inf, difference), initial=0.0))
                    if largest > worst:
                        worst, where = largest, leaf.file.path.name
        return worst, where

    def _read_mean(self, name: str, part: Part, inner: Chunk, destination: np.ndarray) -> None:
        dtype = self.tensors[name].dtype
        total = np.zeros(inner.size, np.float64)
        for leaf in part.copies:
            total += decode(_load(leaf, inner), dtype)
        encode(total / len(part.copies), dtype, destination)

    def locate(self, name: str, box: Chunk) -> tuple[str, int]:
        """See Source."""
        for part, common in self._overlapping(name, box):
            inner = Chunk(tuple(a - b for a, b in zip(common.offset, part.box.offset)), common.size)
            file, record = part.copies[0]
            return str(file.path), file.locate(record, inner)
        return "", 0

    def read_bytes(self, name: str, box: Chunk) -> int:
        """See Source."""
        item = DTYPE_BYTES[self.tensors[name].dtype]
        return sum(common.numel * len(part.copies) * item for part, common in self._overlapping(name, box))

    def close(self) -> None:
        """See Source."""
        for file in self._open:
            file.files.close()


def _digest(data: np.ndarray) -> bytes:
    return xxhash.xxh3_128_digest(memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8)))


def _load(leaf: Leaf, box: Chunk) -> np.ndarray:
    data = np.empty(box.size, RAW[DTYPE_BYTES[leaf.record.dtype]])
    leaf.file.read(leaf.record, box, data)
    return data


def _whole(path: Path, name: str, parts: list[Part]) -> SourceTensor:
    """Returns shape and dtype of a tensor whose parts must cover it exactly once."""
    shape = tuple(max(o + n for o, n in zip(offsets, sizes)) for offsets, sizes in _dims(parts))
    dtypes = sorted({leaf.record.dtype for part in parts for leaf in part.copies})
    if len(dtypes) > 1:
        raise CheckpointError(f"{path}: tensor {name} is {' here and '.join(dtypes)} there")
    boxes = [part.box for part in parts if part.box.numel]
    if twice := find_overlap(boxes):
        raise CheckpointError(f"{path}: {place_text(name, twice[1])} stands in two files")
    if gap := find_gap(shape, boxes):
        raise CheckpointError(f"{path}: {place_text(name, gap)} is missing")
    return SourceTensor(shape, dtypes[0])


def _dims(parts: list[Part]) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    offsets, sizes = zip(*(part.box.offset for part in parts)), zip(*(part.box.size for part in parts))
    return zip(offsets, sizes)


def join_parts(path: Path, placed: Iterable[tuple[Place, tuple[Leaf, ...]]]) -> dict[str, list[Part]]:
    """Returns the parts of our tensors from foreign ones that each are a whole, or some rows, of one of ours.

    Raises:
        CheckpointError: A tensor stands twice, or a part of one is missing.
    """
    groups: dict[str, dict[int, tuple[Leaf, ...]]] = {}
    counts: dict[str, int] = {}
    for place, copies in placed:
        group = groups.setdefault(place.name, {})
        if place.part in group or counts.setdefault(place.name, place.parts) != place.parts:
            raise CheckpointError(f"{path}: two tensors stand for {place.name}")
        group[place.part] = copies
    result: dict[str, list[Part]] = {}
    for name, group in groups.items():
        if len(group) != counts[name]:
            raise CheckpointError(f"{path}: tensor {name} has {len(group)} of its {counts[name]} parts")
        row, parts = 0, []
        for _, copies in sorted(group.items()):
            shape = copies[0].record.shape
            other = next((leaf for leaf in copies if leaf.record.shape != shape), None)
            if other is not None:
                where = f"{other.file.path}: tensor {name}"
                raise CheckpointError(f"{where} has shape {other.record.shape}, {shape} in {copies[0].file.path.name}")
            parts.append(Part(Chunk((row, *(0 for _ in shape[1:])) if shape else (), shape), copies))
            row += shape[0] if shape else 0
        result[name] = parts
    return result
