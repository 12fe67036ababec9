"""Every image looked at once: its size, whether it can be decoded, and what tells it from others.

Shape legend: N images, T side of a thumbnail, in pixels.
"""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from swin_moe.data.datasets import FileDataset
from swin_moe.data.pixels import BrokenImage, decode

T = 16
_CHUNK = 64  # images of one errand of a process


@dataclass(frozen=True)
class Examined:
    """What was seen of N images, in their order."""

    size_N2: np.ndarray  # int32, (width, height) in pixels; 0 where broken
    digest_N2: np.ndarray  # uint64, 16 bytes of BLAKE2b over the size and the decoded RGB pixels; zeros where broken
    hash_N2: np.ndarray  # uint64, see perceptual_hashes
    thumbnail_NTT: np.ndarray  # uint8, grey
    broken: dict[int, str]  # why, by number

    def __len__(self) -> int:
        return len(self.hash_N2)


def examine(dataset: FileDataset, *, workers: int, progress: Callable[[int], None] = lambda done: None) -> Examined:
    """Returns what is seen of every image of a data set.

    Args:
        workers: Processes; 1 = this one. What is seen does not depend on it.
        progress: Told after how many images, now and then.
    """
    count = len(dataset)
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    parts: list[Examined] = []
    done = 0
    for part in _in_turn(dataset, chunks, min(workers, len(chunks))):
        parts.append(part)
        done += len(part)
        progress(done)
    return joined(parts)


def joined(parts: Sequence[Examined]) -> Examined:
    """Returns several as one, numbered on."""
    starts = np.cumsum([0, *map(len, parts)])
    broken = {int(start) + number: why for start, part in zip(starts, parts) for number, why in part.broken.items()}
    fields = ("size_N2", "digest_N2", "hash_N2", "thumbnail_NTT")
    empty = _empty(0)
    arrays = {name: np.concatenate([getattr(empty, name), *(getattr(part, name) for part in parts)]) for name in fields}
    return Examined(**arrays, broken=broken)


def perceptual_hashes(thumbnail_NTT: np.ndarray) -> np.ndarray:
    """Returns (N, 2) uint64, the hash of a cosine transform and that of differences, which fail on other images.

    Bit k of the first is whether coefficient k of the lowest 8 x 8 is above their median, the constant one not being
    (Christoph Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1); of
    the second, whether one of 8 x 9 grey values is below its right neighbour.
    """
    place, frequency = np.arange(T), np.arange(8)
    basis = np.cos(np.pi * (place[:, None] + 0.5) * frequency / T)
    coefficients = (basis.T @ thumbnail_NTT.astype(np.float64) @ basis).reshape(-1, 64)
    coefficients[:, 0] = -np.inf
    above = coefficients > np.median(coefficients, axis=1, keepdims=True)
    columns = np.arange(9) * (T - 1) // 8
    rows_N89 = thumbnail_NTT.astype(np.int16).reshape(-1, 8, 2, T).sum(axis=2)[:, :, columns]
    rising = (rows_N89[:, :, 1:] > rows_N89[:, :, :-1]).reshape(-1, 64)
    packed = [np.packbits(bits, axis=1).view(">u8").astype(np.uint64) for bits in (above, rising)]
    return np.concatenate(packed, axis=1)


def _empty(count: int) -> Examined:
    return Examined(
        np.zeros((count, 2), dtype=np.int32),
        np.zeros((count, 2), dtype=np.uint64),
        np.zeros((count, 2), dtype=np.uint64),
        np.zeros((count, T, T), dtype=np.uint8),
        {},
    )


def _in_turn(dataset: FileDataset, chunks: Sequence[range], workers: int) -> Iterator[Examined]:
    if workers <= 1:
        for chunk in chunks:
            yield _look(dataset, chunk)
        return
    # Forked: they inherit the listing, and only decode with Pillow, which starts no threads.
    with multiprocessing.get_context("fork").Pool(workers, _remember, (dataset,)) as pool:
        yield from pool.imap(_look_of_process, chunks)


_of_process: dict[str, Any] = {}  # of a worker process: the data set it reads


def _remember(dataset: FileDataset) -> None:
    _of_process["dataset"] = dataset


def _look_of_process(chunk: range) -> Examined:
    return _look(_of_process["dataset"], chunk)


def _look(dataset: FileDataset, chunk: range) -> Examined:
    seen = _empty(len(chunk))
    for place, index in enumerate(chunk):
        try:
            image = decode(dataset.read(index), dataset.path(index))
        except BrokenImage as error:
            seen.broken[place] = error.reason
            continue
        except OSError as error:
            seen.broken[place] = error.strerror or str(error)
            continue
        seen.size_N2[place] = image.size
        digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
        digest.update(image.tobytes())
        seen.digest_N2[place] = np.frombuffer(digest.digest(), dtype="<u8")
        seen.thumbnail_NTT[place] = np.asarray(image.convert("L").resize((T, T), Image.Resampling.BOX))
    seen.hash_N2[:] = perceptual_hashes(seen.thumbnail_NTT)
    return seen
