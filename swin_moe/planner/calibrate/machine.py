"""Products by shape, bandwidth of memory, room and speed of the disk: measured on this rank's device."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from swin_moe.planner.rates import Point

Clock = Callable[[], float]

# Rows x inner x columns. Those of one block of a network are in it, from the first stage to the last.
_SIZES, _ROWS = (32, 128, 512, 2048), (64, 512, 4096, 32768)
_MOST_FLOPS = {"cpu": 1.2e9, "cuda": 1e13}  # of one product: 10 ms of a core
_MOST_ELEMENTS = 2**25
SHAPES = tuple((rows, inner, columns) for inner in _SIZES for columns in _SIZES for rows in _ROWS)
_REPEATS = 3
_LOOKED_AT, _ALONE = 0.3, 0.95  # seconds; share of a core of a rank that nothing disturbs


def clock(device: torch.device) -> Clock:
    """Returns a clock of work that was done: CPU time of the process, which other processes do not take from; of a
    device, time on the wall after what was started has ended."""
    if device.type != "cuda":
        return time.process_time

    def after_all() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return after_all


def clock_of_ranks(device: torch.device) -> tuple[Clock, float]:
    """Returns (a clock of what ranks do together, the least share of a core that a rank has while all compute).

    On CPUs that have nothing else to do that is time on the wall, in which ranks wait for each other; on others CPU
    time of the process, of which other processes take less.
    """
    if device.type == "cuda":
        return clock(device), 1.0
    wall, start = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < _LOOKED_AT:
        sum(range(10000))
    share = torch.tensor((time.process_time() - start) / (time.perf_counter() - wall), dtype=torch.float64)
    dist.all_reduce(share, op=dist.ReduceOp.MIN)
    return (time.perf_counter if share > _ALONE else time.process_time), float(share)


def seconds_of(work: Callable[[], object], now: Callable[[], float], repeats: int = _REPEATS) -> float:
    """Returns the median seconds of what is run, once before to warm up."""
    work()
    found = []
    for _ in range(repeats):
        start = now()
        work()
        found.append(now() - start)
    return statistics.median(found)


def measure_products(device: torch.device, dtype: torch.dtype) -> Iterator[Point]:
    """Yields (rows, inner, columns, FLOP/s) of x @ w.T."""
    now = clock(device)
    for rows, inner, columns in SHAPES:
        flops = 2.0 * rows * inner * columns
        if flops > _MOST_FLOPS[device.type] or rows * max(inner, columns) > _MOST_ELEMENTS:
            continue
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        weight = torch.randn(columns, inner, device=device, dtype=dtype)
        with torch.inference_mode():
            taken = seconds_of(lambda x=x, weight=weight: F.linear(x, weight), now)  # type: ignore[misc]
        yield float(rows), float(inner), float(columns), flops / max(taken, 1e-9)


def measure_memory(device: torch.device, size: int = 2**27) -> float:
    """Returns bytes/s of a copy, read and written, of so many bytes: larger than caches."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), clock(device))


def measure_launch(device: torch.device, count: int = 2000) -> float:
    """Returns seconds of an operator on one element, as the host starts one after another."""
    x = torch.zeros(1, device=device)

    def start_many() -> None:
        for _ in range(count):
            x.add_(1.0)

    return seconds_of(start_many, clock(device)) / count


def measure_disk(folder: Path, size: int = 2**26) -> tuple[float, float]:
    """Returns (bytes/s written until they are on the disk, bytes/s read back, from memory where it is kept there).

    Raises:
        OSError: Nothing can be written there.
    """
    data = os.urandom(2**20) * (size // 2**20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        Path(file.name).read_bytes()
        read = time.perf_counter() - start
    return size / written, size / read


def memory_of(device: torch.device, ranks: int) -> float:
    """Returns bytes that a run of this rank may use: of its device, or its share of the host's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks)
