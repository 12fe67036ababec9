"""Boxes of global tensors: the arithmetic that sharding, checkpoints and resharding share. Pure Python."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Chunk:
    """A box of a global tensor: [offset, offset + size) in elements, per dim."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Chunk":
        """Returns the box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements in the box; 1 for a scalar."""
        return math.prod(self.size)

    def overlap(self, other: "Chunk") -> "Chunk | None":
        """Returns the part both boxes cover, or None. Resharding is a loop over this."""
        low = tuple(map(max, self.offset, other.offset))
        high = (min(a + n, b + m) for a, n, b, m in zip(self.offset, self.size, other.offset, other.size))
        size = tuple(h - l for h, l in zip(high, low))
        return Chunk(low, size) if all(n > 0 for n in size) else None

    def within(self, outer: "Chunk") -> tuple[Any, ...]:
        """Returns the slices that cut this box out of a tensor holding `outer`."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.offset, outer.offset, self.size))


def even_split(length: int, parts: int) -> list[tuple[int, int]]:
    """Returns (offset, size) of each part, split as torch.chunk does: 4 over 3 is 2, 2, 0.

    The same rule as DTensor's Shard, so that engines, checkpoints and tools agree on uneven splits.
    """
    return [even_part(length, parts, index) for index in range(parts)]


def even_part(length: int, parts: int, index: int) -> tuple[int, int]:
    """Returns (offset, size) of one part of even_split, at a cost that does not grow with the parts."""
    size = -(-length // parts)
    offset = min(index * size, length)
    return offset, min(size, length - offset)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Chunk]:
    """Returns the boxes that cover elements [start, stop) of a contiguous tensor, in order, each contiguous in memory.

    Engines that flatten parameters cut them anywhere: at most 2 * dims - 1 boxes, cut rows apart from whole ones.
    """
    if start >= stop:
        return []
    if not shape:
        return [Chunk((), ())]
    row, rest = math.prod(shape[1:]), shape[1:]
    boxes: list[Chunk] = []
    while start < stop:
        index, within = divmod(start, row)
        rows = (stop - start) // row if within == 0 else 0
        if rows:
            boxes.append(Chunk((index, *(0 for _ in rest)), (rows, *rest)))
            start += rows * row
            continue
        end = min(stop - index * row, row)
        boxes += [Chunk((index, *b.offset), (1, *b.size)) for b in boxes_of_range(rest, within, end)]
        start = index * row + end
    return boxes
