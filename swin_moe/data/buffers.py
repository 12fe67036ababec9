"""Memory that batches are loaded into, again and again, by this process or by its loader processes.

A batch in memory of its own costs a page fault for every 4 KiB in the process that writes it, another in the one that
reads it if that is not the same, and the pages are given back after each batch: a tenth of what loading an image costs.
"""

import mmap
from typing import NamedTuple

import numpy as np

_ALIGNMENT = 64  # bytes, a cache line


class Place(NamedTuple):
    """Where an array lies in a buffer: what is sent between processes instead of it."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: str


class Buffer:
    """The memory of one batch; arrays are put into it one after the other."""

    def __init__(self, memory: np.ndarray) -> None:
        """memory: (bytes,) uint8."""
        self._memory = memory
        self._used = 0

    def clear(self) -> None:
        """Forgets what is in it: the next array is put in its beginning."""
        self._used = 0

    def put_empty(self, shape: tuple[int, ...], dtype: type) -> tuple[np.ndarray, Place | np.ndarray]:
        """Returns (array to be written to, what to send of it): itself, in memory of its own, where it does not fit."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        if self._used + size > len(self._memory):
            own = np.empty(shape, kind)
            return own, own
        place = Place(self._used, shape, kind.str)
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return self.at(place), place

    def put(self, array: np.ndarray) -> Place | np.ndarray:
        """Returns what to send of an array, which is copied."""
        mine, sent = self.put_empty(array.shape, array.dtype.type)
        mine[...] = array
        return sent

    def at(self, sent: Place | np.ndarray) -> np.ndarray:
        """Returns the array of what was sent, which the next batch in this buffer writes over."""
        if isinstance(sent, np.ndarray):
            return sent
        kind = np.dtype(sent.dtype)
        size = int(np.prod(sent.shape)) * kind.itemsize
        return self._memory[sent.offset : sent.offset + size].view(kind).reshape(sent.shape)


class Buffers:
    """Buffers for as many batches as are under way at once; processes that are forked afterwards share them.

    Anonymous memory, so that no limit of /dev/shm counts. What is never written to takes none.
    """

    def __init__(self, count: int, size: int) -> None:
        """size: Bytes of a buffer."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = np.frombuffer(mmap.mmap(-1, count * size) if size else b"", dtype=np.uint8)
        self._buffers = [Buffer(memory[number * size : (number + 1) * size]) for number in range(count)]

    def __reduce__(self) -> tuple:
        return Buffers, (len(self), 0)  # a process that was not forked: nothing fits, all is sent

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, number: int) -> Buffer:
        return self._buffers[number]
