"""What a host has left for a job, and how fast its ranks are: a row of CHECKS or PACES each."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MIB, _GIB = 1 << 20, 1 << 30
_UNLIMITED = 1 << 60  # bytes; cgroup v1 has no word for it but a large number
_PACE_SECONDS = 0.03


@dataclass(frozen=True)
class Check:
    """Bytes that a host should have free."""

    name: str  # in the file
    title: str  # of the column
    read: Callable[[str], int | None]  # takes the run's folder; None = this host does not say
    least: int  # below, its ranks cannot be used
    enough: int  # below, it is marked
    words: str  # what there is little of


@dataclass(frozen=True)
class Pace:
    """Bytes per second that each rank reaches, held against the median of all."""

    name: str
    title: str
    measure: Callable[[], float]
    factor: float  # as many times slower than the median is marked
    words: str


def free_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes a new process may take: what the host has, or less where a cgroup of this process allows less.

    Source: kernel documentation, filesystems/proc.rst (MemAvailable), cgroup-v2.rst (memory.max, memory.current) and
    cgroup-v1/memory.rst. Files in the page cache of a cgroup count as free: they are given up first.
    """
    free = [limit for limit in _free_in_cgroups(root) if limit is not None]
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) << 10)
    return min(free, default=None)


def _free_in_cgroups(root: Path) -> Iterator[int | None]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = path.strip("/").split("/")
        for depth in range(len(inner) + 1):
            yield _free_in(mount.joinpath(*inner[:depth]), *names)


def _free_in(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    most, used = _text(folder / limit), _text(folder / usage)
    if not most.isdigit() or not used.isdigit() or int(most) >= _UNLIMITED:
        return None
    words = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    spare = next((int(pair[1]) for pair in words if pair[0] == cache), 0)
    return max(0, int(most) - int(used) + spare)


def free_space(folder: str) -> int | None:
    """Returns the bytes that this user may still write into a folder; None where it is not there, or is read only."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return None if found.f_flag & os.ST_RDONLY else found.f_bavail * found.f_frsize


def hash_speed() -> float:
    """Returns how many bytes per second one core hashes: the pace of the processor."""
    data = bytes(_MIB)
    return _speed(len(data), lambda: hashlib.sha256(data))


def copy_speed() -> float:
    """Returns how many bytes per second are copied: the pace of the memory."""
    source, target = bytes(16 * _MIB), bytearray(16 * _MIB)

    def copy() -> None:
        memoryview(target)[:] = source

    return _speed(len(source), copy)


def _speed(size: int, work: Callable[[], object]) -> float:
    """Returns bytes per second of wall time, as a rank that gets no time is slow as well."""
    work()
    count, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < _PACE_SECONDS:
        work()
        count += 1
    return count * size / taken


def _free_memory(folder: str) -> int | None:
    return free_memory()


def _free_for_temporary_files(folder: str) -> int | None:
    return free_space(tempfile.gettempdir())


def _free_shared_memory(folder: str) -> int | None:
    return free_space("/dev/shm")


CHECKS = (
    Check("free_memory_bytes", "memory", _free_memory, 64 * _MIB, _GIB, "free memory"),
    Check("disk_bytes", "disk", free_space, _MIB, _GIB, "space on the disk of the run's folder"),
    Check("tmp_bytes", "tmp", _free_for_temporary_files, _MIB, 64 * _MIB, "space for temporary files"),
    # Loader workers hand batches on through it; 64 MiB is what a container has by default.
    Check("shm_bytes", "shm", _free_shared_memory, _MIB, 65 * _MIB, "space in /dev/shm"),
)
PACES = (
    Pace("hash_bytes_per_s", "cpu", hash_speed, 2.0, "processor"),
    Pace("copy_bytes_per_s", "copy", copy_speed, 3.0, "memory"),
)


def read_checks(folder: str) -> dict[str, int | None]:
    """Returns what every row of CHECKS finds on this host."""
    return {check.name: check.read(folder) for check in CHECKS}


def read_paces() -> dict[str, float]:
    """Returns what every row of PACES finds in this process, in about a tenth of a second."""
    return {pace.name: pace.measure() for pace in PACES}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
