"""Digests of byte ranges, one per 4 MiB block, so that a reader of one expert verifies just its blocks."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from swin_moe.checkpoint.errors import CorruptionError

BLOCK_BYTES = 4 << 20  # of a chunk, from its first byte; part of the format
DEFAULT = "xxh3-128"  # about 26 GB/s a core; sha256 at 1.8 would cost more than the copy


def _xxh3_128(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


ALGORITHMS = {"xxh3-128": _xxh3_128, "sha256": _sha256}
HEX_DIGITS = {"xxh3-128": 32, "sha256": 64}


def digest(data: Any, algorithm: str) -> str:
    """Returns the digest of a bytes-like object as lower-case hex digits."""
    return ALGORITHMS[algorithm](data)


def num_blocks(num_bytes: int) -> int:
    """Returns how many blocks, hence digests, a chunk of this many bytes has; 0 for an empty one."""
    return -(-num_bytes // BLOCK_BYTES)


def read_exactly(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fills `view` from the file at `offset` (bytes).

    Raises:
        CorruptionError: The file ends early or cannot be read.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CorruptionError(f"{path}: cannot be read ({error.strerror})") from error
        if count == 0:
            raise CorruptionError(f"{path}: ends after {offset + done} bytes, {offset + len(view)} were expected")
        done += count


def block_digests(fd: int, begin: int, end: int, algorithm: str, path: Path) -> list[str]:
    """Returns the digests of the blocks of the bytes [begin, end) of an open file; memory: one block."""
    buffer = memoryview(np.empty(min(BLOCK_BYTES, end - begin), np.uint8))
    result = []
    for start in range(begin, end, BLOCK_BYTES):
        block = buffer[: min(BLOCK_BYTES, end - start)]
        read_exactly(fd, block, start, path)
        result.append(digest(block, algorithm))
    return result
