"""What lies between ranks: collectives of several sizes with latency and bandwidth fitted, measured or read."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from swin_moe.config.checks import shown
from swin_moe.planner.calibrate.machine import Clock
from swin_moe.planner.hardware import KINDS, Link
from swin_moe.planner.rates import fit

SIZES = tuple((kind, size) for kind in KINDS for size in (2**12, 2**16, 2**19, 2**22, 2**24))
_OF_LINK = ("all_to_all", "all_reduce")  # that all links are fitted to
_REPEATS = {"cpu": 40, "cuda": 7}
_LARGE, _OF_LARGE = 2**22, 10  # bytes from where fewer repeats do
# Broadcasts that are started before one is waited for, as ZeroRedundancyOptimizer starts them: so many bytes together.
_TOGETHER, _MOST, _LEAST = 2**25, 64, 4
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13's name, or before
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Timed:
    """A collective of all ranks. bytes: That each rank sends in an all-to-all, of the whole buffer else."""

    kind: str
    ranks: int
    bytes: float
    seconds: float


def measure_collectives(device: torch.device, now: Clock) -> Iterator[Timed]:
    """Yields the seconds of each collective: each repeat is as long as its slowest rank. now: machine.clock_of_ranks.

    Of a device, their median. Of a CPU their mean: where a rank has one core, gloo's thread now and then spins through
    its whole turn of 3 to 4 ms, while it waits for a lock of the thread that it took the core from. A step has dozens
    of collectives, so it has its share of these.
    """
    ranks, average = dist.get_world_size(), statistics.median if device.type == "cuda" else statistics.fmean
    for kind, size in SIZES:
        count = size // 4 // ranks * ranks
        source, target = torch.ones(count, device=device), torch.empty(count, device=device)
        part = source[: count // ranks].clone()
        calls = {
            "all_to_all": partial(dist.all_to_all_single, target, source),
            "all_reduce": partial(dist.all_reduce, source),
            "all_gather": partial(_all_gather, target, part),
            "reduce_scatter": partial(_reduce_scatter, part, source),
            "broadcast": partial(_broadcasts, source),
        }
        found = []
        repeats = _REPEATS[device.type] if size < _LARGE else min(_OF_LARGE, _REPEATS[device.type])
        for _ in range(repeats + 1):
            dist.barrier()
            start = now()
            calls[kind]()
            slowest = torch.tensor(now() - start, dtype=torch.float64, device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            found.append(float(slowest))
        yield Timed(kind, ranks, 4.0 * count, average(found[1:]) / (_burst(source) if kind == "broadcast" else 1))


def _burst(source: torch.Tensor) -> int:
    return min(_MOST, max(_LEAST, _TOGETHER // (source.numel() * source.element_size())))


def _broadcasts(source: torch.Tensor) -> None:
    numbers = range(_burst(source))
    works = [dist.broadcast(source, number % dist.get_world_size(), async_op=True) for number in numbers]
    for work in works:
        work.wait()


def fit_links(timed: list[Timed]) -> tuple[Link, dict[str, Link]]:
    """Returns (the link that fits all-to-alls and all-reduces together, that of each kind of collective)."""
    kinds = {row.kind: [other for other in timed if other.kind == row.kind] for row in timed}
    return fit_link([row for kind in _OF_LINK for row in kinds[kind]]), {k: fit_link(rows) for k, rows in kinds.items()}


def fit_link(timed: list[Timed]) -> Link:
    """Returns the link of which step_time.py says these seconds, ranks of one node."""
    rows = []
    for row in timed:
        hops = 1 if row.kind == "all_to_all" else math.ceil(math.log2(row.ranks))
        passes = 2 if row.kind == "all_reduce" else 1
        rows.append((hops, passes * row.bytes * (row.ranks - 1) / row.ranks))
    latency, byte = fit(np.array(rows, dtype=np.float64), np.array([row.seconds for row in timed]))
    return Link(max(float(latency), 1e-9), 1 / max(float(byte), 1e-15))


def read_preflight(path: Path) -> dict[str, Link]:
    """Returns links (inside, between, or one of them) of a file that `--preflight-file` wrote (launcher/preflight).

    Raises:
        ValueError: It is no such file, or has no collectives or fits.
        OSError: It cannot be read.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        hosts = len(tree["hosts"])
        timed = [Timed(c["kind"], int(c["world"]), float(c["bytes"]), float(c["seconds"])) for c in tree["collectives"]]
        sends = {kind: Link(max(f["latency_s"], 1e-9), f["bytes_per_s"]) for kind, f in tree["fit"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what the launcher's --preflight-file writes ({shown(str(error))})") from None
    timed = [row for row in timed if row.kind in ("all_to_all", "all_reduce") and row.ranks > 1]
    found: dict[str, Any] = {"inside": None, "between": None}
    if hosts > 1:
        found = {"inside": sends.get("send_on_host"), "between": sends.get("send")}
    elif timed:
        found["inside"] = fit_link(timed)
    links = {name: link for name, link in found.items() if link is not None}
    if not links:
        raise ValueError(f"{path}: no collective of 2 or more ranks was timed in it")
    return links
