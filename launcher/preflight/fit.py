"""The cost model of a transfer, seconds = latency + bytes / bandwidth, and which of many figures are out of line."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Fit:
    """A cost model and how well it holds."""

    latency_s: float
    bytes_per_s: float
    ranks: int
    error: float  # root mean square of the relative errors

    def seconds(self, size: float) -> float:
        """Returns what a transfer of so many bytes takes."""
        return self.latency_s + size / self.bytes_per_s


def fit(points: Sequence[tuple[float, float]], ranks: int) -> Fit:
    """Returns the model with the least sum of squared relative errors, so that small transfers count as large ones do.

    Neither term is negative: where the best one would be, the other is fitted alone.

    Args:
        points: (bytes, seconds), of at least one size; seconds more than 0.
    """
    rows = [(1 / seconds, size / seconds) for size, seconds in points]  # a * row[0] + b * row[1] is to be 1
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    a, b = -1.0, -1.0
    if determinant > 1e-12 * aa * bb:
        a, b = (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant
    if b <= 0:  # no longer with more bytes: as fast as the largest was, at least
        size, seconds = max(points)
        return Fit(a1 / aa, max(size, 1) / seconds, ranks, _error(rows, a1 / aa, 0.0))
    if a < 0:
        a, b = 0.0, b1 / bb
    return Fit(a, 1 / b, ranks, _error(rows, a, b))


def _error(rows: Sequence[tuple[float, float]], a: float, b: float) -> float:
    return math.sqrt(statistics.fmean((a * x + b * y - 1) ** 2 for x, y in rows))


def behind(values: Mapping[Key, float], factor: float) -> dict[Key, float]:
    """Returns the figures, of which more is better, below the median of all over `factor`, with that median's share.

    Of fewer than three, none is out of line: it cannot be told which.
    """
    if len(values) < 3:
        return {}
    median = statistics.median(values.values())
    return {key: value / median for key, value in values.items() if value * factor < median}


def slow_links(
    speeds: Mapping[tuple[Key, Key], float], *, end_factor: float, link_factor: float
) -> tuple[dict[Key, float], dict[tuple[Key, Key], float]]:
    """Returns (ends all of whose links are slow, links that are slower than both of their ends can), with their shares.

    An end can what the best of its links can, so that one slow end does not make the others look slow, and one slow
    link makes no end look slow. Ends are held against the median of ends, links against the slower of their two ends.

    Args:
        speeds: Of links by their ends; more is better.
    """
    best: dict[Key, float] = {}
    for ends, speed in speeds.items():
        for end in ends:
            best[end] = max(speed, best.get(end, 0.0))
    shares = {ends: speed / min(best[end] for end in ends) for ends, speed in speeds.items()}
    return behind(best, end_factor), {ends: share for ends, share in shares.items() if share * link_factor < 1}
