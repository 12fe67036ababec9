"""Arithmetic of boxes that cover a tensor: gaps, overlaps, and where a part of a box lies in memory. No I/O."""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from swin_moe.layout import Chunk


def subtract(box: Chunk, hole: Chunk) -> list[Chunk]:
    """Returns disjoint boxes that cover `box` without `hole`."""
    common = box.overlap(hole)
    if common is None:
        return [box]
    rest, offset, size = [], list(box.offset), list(box.size)
    for dim, (low, length) in enumerate(zip(common.offset, common.size)):
        high, end = low + length, offset[dim] + size[dim]
        for start, stop in ((offset[dim], low), (high, end)):
            if start < stop:
                rest.append(
                    Chunk((*offset[:dim], start, *offset[dim + 1 :]), (*size[:dim], stop - start, *size[dim + 1 :]))
                )
        offset[dim], size[dim] = low, length
    return rest


def subtract_all(box: Chunk, holes: Iterable[Chunk]) -> list[Chunk]:
    """Returns disjoint boxes that cover `box` without any of `holes`."""
    rest = [box]
    for hole in holes:
        rest = [part for old in rest for part in subtract(old, hole)]
    return rest


class BoxFinder:
    """Which of many boxes another box overlaps, without comparing it with all of them.

    For boxes that follow each other along dim 0, as stored chunks and the parts of experts do, a search costs the
    logarithm of their number, and what it finds.

    Args:
        boxes: In the order of their offsets.
    """

    def __init__(self, boxes: Sequence[Chunk]) -> None:
        self._boxes = boxes
        rows = [_rows(box) for box in boxes]
        self._starts = [start for start, _ in rows]
        self._ends = list(itertools.accumulate((end for _, end in rows), max))  # of this box and those before it

    def overlapping(self, box: Chunk) -> Iterator[tuple[int, Chunk]]:
        """Yields (number of a box, the part that it and `box` cover), in the order of the numbers."""
        start, end = _rows(box)
        for number in range(bisect.bisect_right(self._ends, start), bisect.bisect_left(self._starts, end)):
            common = self._boxes[number].overlap(box)
            if common is not None:
                yield number, common


def _rows(box: Chunk) -> tuple[int, int]:
    """Returns [start, end) along dim 0; a scalar has one row."""
    return (box.offset[0], box.offset[0] + box.size[0]) if box.offset else (0, 1)


def find_overlap(boxes: Iterable[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Returns two boxes that share an element, or None. Linear, up to sorting, for boxes that make a grid."""
    return _overlap_from(sorted(boxes), 0)


def _overlap_from(boxes: list[Chunk], dim: int) -> tuple[Chunk, Chunk] | None:
    """Returns what find_overlap does, of sorted boxes that have equal extents in the dims before `dim`."""
    if len(boxes) < 2:
        return None
    if dim == len(boxes[0].offset):
        return (boxes[0], boxes[1]) if boxes[0].numel else None
    groups: dict[tuple[int, int], list[Chunk]] = {}
    for box in boxes:
        groups.setdefault((box.offset[dim], box.size[dim]), []).append(box)
    extents = sorted(groups)
    if all(a + n <= b for (a, n), (b, _) in itertools.pairwise(extents)):
        return next(filter(None, (_overlap_from(groups[extent], dim + 1) for extent in extents)), None)
    active: list[Chunk] = []
    for box in boxes:
        active = [other for other in active if other.offset[dim] + other.size[dim] > box.offset[dim]]
        for other in active:
            if other.overlap(box) is not None:
                return other, box
        active.append(box)
    return None


def splits_rows(shape: tuple[int, ...], boxes: Sequence[Chunk]) -> bool:
    """Returns whether boxes are whole rows of a tensor that follow each other and are all of them: no gap, no overlap.

    The quick answer for what every writer makes of experts; False says nothing.
    """
    if not shape:
        return len(boxes) == 1
    zeros, rest, row = (0,) * (len(shape) - 1), tuple(shape[1:]), 0
    for box in boxes:
        if box.offset[0] != row or box.offset[1:] != zeros or box.size[1:] != rest:
            return False
        row += box.size[0]
    return row == shape[0]


def find_gap(shape: tuple[int, ...], boxes: list[Chunk]) -> Chunk | None:
    """Returns a box of the tensor that none of these disjoint boxes covers, or None."""
    whole = Chunk.whole(shape)
    if sum(box.numel for box in boxes) == whole.numel:
        return None
    return subtract_all(whole, boxes)[0]


def row_strides(size: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the row-major strides of an array of this size, in elements."""
    return tuple(math.prod(size[dim + 1 :]) for dim in range(len(size)))


def split_runs(part: Chunk, outer: Chunk) -> tuple[np.ndarray, int]:
    """Returns where `part` lies in a row-major array holding `outer`: starts (n,) of contiguous runs, and their length.

    Both in elements; the runs come in the row-major order of `part`.
    """
    dims = len(part.size)
    if dims == 0:
        return np.zeros(1, np.int64), 1
    last = dims - 1
    while last > 0 and part.size[last] == outer.size[last]:
        last -= 1
    strides = row_strides(outer.size)
    relative = [a - b for a, b in zip(part.offset, outer.offset)]
    starts = np.array([relative[last] * strides[last]], np.int64)
    for dim in range(last - 1, -1, -1):
        lead = (relative[dim] + np.arange(part.size[dim], dtype=np.int64)) * strides[dim]
        starts = (lead[:, None] + starts[None, :]).reshape(-1)
    return starts, math.prod(part.size[last:])


def split_slabs(part: Chunk, outer: Chunk, limit: int) -> Iterator[tuple[Chunk, int, int]]:
    """Yields boxes that make up `part`, each with the span [first, last) it occupies in an array holding `outer`.

    Spans count elements, are at most `limit` long, and come in ascending order; a span also covers what lies between.
    """
    strides = row_strides(outer.size)
    first = sum((a - b) * s for a, b, s in zip(part.offset, outer.offset, strides))
    last = first + sum((n - 1) * s for n, s in zip(part.size, strides)) + 1
    if last - first <= limit:
        yield part, first, last
        return
    dim = next(d for d, n in enumerate(part.size) if n > 1)
    half = part.size[dim] // 2
    for start, length in ((0, half), (half, part.size[dim] - half)):
        offset = (*part.offset[:dim], part.offset[dim] + start, *part.offset[dim + 1 :])
        size = (*part.size[:dim], length, *part.size[dim + 1 :])
        yield from split_slabs(Chunk(offset, size), outer, limit)
