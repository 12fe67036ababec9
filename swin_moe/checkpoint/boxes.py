"""Arithmetic of boxes that cover a tensor: gaps, overlaps, and where a part of a box lies in memory. No I/O."""

import math
from collections.abc import Iterable, Iterator

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


def find_overlap(boxes: Iterable[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Returns two boxes that share an element, or None. Linear for boxes that follow each other along dim 0."""
    active: list[Chunk] = []
    for box in sorted(boxes):
        if box.offset:
            active = [other for other in active if other.offset[0] + other.size[0] > box.offset[0]]
        for other in active:
            if other.overlap(box) is not None:
                return other, box
        active.append(box)
    return None


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
