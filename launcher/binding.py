"""Which cores a rank gets."""

import os
from collections.abc import Sequence
from typing import Any

NO_BIND = "LAUNCHER_NO_BIND"  # set: ranks keep the cores they were started with


def share_of_cores(cores: Sequence[int], local_rank: int, local_world_size: int) -> list[int]:
    """Returns the contiguous share of one local rank; with more ranks than cores, ranks take turns, one core each."""
    if local_world_size >= len(cores):
        return [cores[local_rank % len(cores)]]
    low, high = (i * len(cores) // local_world_size for i in (local_rank, local_rank + 1))
    return list(cores[low:high])


def bind(node: Any) -> None:
    """Binds this rank to its share of the host's cores, unless mpirun bound the ranks already."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    everyone = node.allgather(cores)
    if not cores or any(other != cores for other in everyone):
        return
    share = share_of_cores(cores, node.rank, node.size)
    os.sched_setaffinity(0, share)
    os.environ.setdefault("OMP_NUM_THREADS", str(len(share)))
