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
from swin_moe.planner.calibrate.machine import clock
from swin_moe.planner.hardware import KINDS, Link
from swin_moe.planner.rates import fit

SIZES = tuple((kind, size) for kind in KINDS for size in (2**12, 2**16, 2**19, 2**22, 2**24))
_OF_LINK = ("all_to_all", "all_reduce")  # that all links are fitted to
_REPEATS = 7
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13's name, or before
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Timed:
    """A collective of all ranks. bytes: That each rank sends in an all-to-all, of the whole buffer else."""

    kind: str
    ranks: int
    bytes: float
    seconds: float


def measure_collectives(device: torch.device) -> Iterator[Timed]:
    """Yields the median seconds of each collective: each repeat is as long as its slowest rank.

    On the CPU, seconds of the process, as those of operators: ranks carry the bytes themselves.
    """
    ranks, now = dist.get_world_size(), clock(device)
    for kind, size in SIZES:
        count = size // 4 // ranks * ranks
        source, target = torch.ones(count, device=device), torch.empty(count, device=device)
        part = source[: count // ranks].clone()
        calls = {
            "all_to_all": partial(dist.all_to_all_single, target, source),
            "all_reduce": partial(dist.all_reduce, source),
            "all_gather": partial(_all_gather, target, part),
            "reduce_scatter": partial(_reduce_scatter, part, source),
            "broadcast": partial(dist.broadcast, source, 0),
        }
        found = []
        for _ in range(_REPEATS + 1):
            dist.barrier()
            start = now()
            calls[kind]()
            slowest = torch.tensor(now() - start, dtype=torch.float64, device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            found.append(float(slowest))
        yield Timed(kind, ranks, 4.0 * count, statistics.median(found[1:]))


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
