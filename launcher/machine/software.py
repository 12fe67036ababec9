"""What a rank's program stands on, and where ranks differ from rank 0: the first question when one behaves oddly."""

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.job.plan import columns
from launcher.machine.topology import short_list

NO_COMPARE = "LAUNCHER_NO_COMPARE"  # set: nothing is compared
_CLOCK_SECONDS = 1.0  # a difference below may come from the barrier
_MOST_ROWS = 20
_DISTRIBUTION = re.compile(r"(.+?)-([^-]+)\.(dist|egg)-info")


@dataclass(frozen=True)
class Software:
    """Of one rank. Packages are known of one rank of a host only, None of the others: they see the same files."""

    python: str
    driver: str
    packages: dict[str, str] | None = field(default=None)
    clock: float = 0.0  # seconds, read when all ranks do


def read_software(*, packages: bool) -> Software:
    """Returns this rank's, in about a millisecond: the names of folders say which versions are installed."""
    where = f"{sys.version.split()[0]} {sys.executable}"
    return Software(where, _driver(), installed_packages() if packages else None, time.time())


def differences(ranks: Sequence[Software]) -> list[str]:
    """Returns the lines of a table of what differs from rank 0, [] where nothing does."""
    rows: dict[tuple[str, str, str], list[int]] = {}

    def compare(what: str, first: str, other: str, rank: int) -> None:
        if first != other:
            rows.setdefault((what, first, other), []).append(rank)

    first = ranks[0]
    for rank, other in enumerate(ranks):
        compare("python", first.python, other.python, rank)
        compare("GPU driver", first.driver, other.driver, rank)
        if abs(other.clock - first.clock) >= _CLOCK_SECONDS:
            compare("clock", "0 s", f"{other.clock - first.clock:+.0f} s", rank)
        if first.packages is None or other.packages is None:
            continue
        for name in sorted(first.packages.keys() | other.packages.keys()):
            compare(name, first.packages.get(name, "-"), other.packages.get(name, "-"), rank)
    if not rows:
        return []
    cells = [(what, one, other, short_list(who)) for (what, one, other), who in rows.items()]
    more = [f"and {len(cells) - _MOST_ROWS} more"] if len(cells) > _MOST_ROWS else []
    return [*columns([("", "rank 0", "others", "ranks"), *cells[:_MOST_ROWS]]), *more]


def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(path).read_text().splitlines()[0]
        except (OSError, IndexError):
            continue
    return "-"


def installed_packages() -> dict[str, str]:
    """Returns {name: version} of what is installed where this Python looks, the first place of each."""
    found: dict[str, str] = {}
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            match = _DISTRIBUTION.fullmatch(name)
            if match:
                found.setdefault(match[1].lower().replace("_", "-"), match[2])
    return found
