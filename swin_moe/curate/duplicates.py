"""Images that stand twice: with the same pixels, or so alike that one is the other resized or compressed again.

Shape legend: N images, V and W images of two splits, T side of a thumbnail.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from swin_moe.curate.examine import Examined

# Of 360 photos and drawings, each halved, enlarged by 1.7, or compressed as JPEG of quality 60, these found 91 to 100
# %; among the 64,620 pairs of different ones they called none alike.
_BANDS = 4  # of 16 bits, of each hash: what agrees in one band is compared
MOST_GREY = 3.0  # mean difference of thumbnails, of 255 ...
_SHARE_OF_CONTRAST = 0.1  # ... and in standard deviations of their pixels
_MOST_IN_A_BAND = 4096  # images compared with each other; more alike ones are blank or frames of one film


@dataclass(frozen=True)
class Duplicates:
    """Pairs of image numbers, ascending."""

    exact: list[tuple[int, int]]  # the same pixels; of a group each with its first
    near: list[tuple[int, int]]  # of the first split and the second, each of the second once
    uncompared: int  # images that shared a band of their hash with too many others


def same_pixels(examined: Examined) -> list[tuple[int, int]]:
    """Returns (first, other) of all images with equal pixels and size."""
    whole = np.flatnonzero(examined.size_N2[:, 0])
    _, first_U, group_W = np.unique(examined.digest_N2[whole], axis=0, return_index=True, return_inverse=True)
    first_W = whole[first_U[group_W.ravel()]]
    return [(int(first), int(other)) for first, other in zip(first_W, whole) if first != other]


def find_duplicates(examined: Examined, second: np.ndarray) -> Duplicates:
    """Returns what stands twice.

    Args:
        second: (N,) bool, images of the second split; near duplicates are looked for between it and the first. Those
            with equal pixels are among `exact` and not among `near`.
    """
    exact = same_pixels(examined)
    whole = examined.size_N2[:, 0] > 0
    near: dict[int, int] = {}
    uncompared: set[int] = set()
    for kind, band in itertools.product(range(examined.hash_N2.shape[1]), range(_BANDS)):
        key = (examined.hash_N2[:, kind] >> np.uint64(16 * band)).astype(np.uint16)
        for first_V, second_W in _buckets(key, whole & ~second, whole & second):
            if len(first_V) > _MOST_IN_A_BAND:
                uncompared.update(second_W.tolist())
                continue
            for number in second_W:
                if int(number) not in near and (match := _nearest(examined, int(number), first_V)) >= 0:
                    near[int(number)] = match
    return Duplicates(exact, sorted((a, b) for b, a in near.items()), len(uncompared - near.keys()))


def _buckets(key_N: np.ndarray, first_N: np.ndarray, second_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (images of the first split, of the second) for every key that both have."""
    order = np.argsort(key_N, kind="stable")
    edges = np.flatnonzero(np.diff(key_N[order])) + 1
    parts = [(part[first_N[part]], part[second_N[part]]) for part in np.split(order, edges)]
    return [(first, second) for first, second in parts if len(first) and len(second)]


def _nearest(examined: Examined, number: int, others_V: np.ndarray) -> int:
    """Returns the image most like one among others, or -1 where none is near or one of them has the same pixels."""
    if (examined.digest_N2[others_V] == examined.digest_N2[number]).all(axis=1).any():
        return -1
    own_TT, others_VTT = examined.thumbnail_NTT[number].astype(np.int16), examined.thumbnail_NTT[others_V]
    grey_V = np.abs(others_VTT - own_TT).mean(axis=(1, 2))
    best = int(grey_V.argmin())
    limit = min(MOST_GREY, _SHARE_OF_CONTRAST * min(float(own_TT.std()), float(others_VTT[best].std())))
    return int(others_V[best]) if grey_V[best] <= limit else -1
