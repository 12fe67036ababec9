"""The ranks of a tool under MPI, as `python -m launcher` starts them. Without torch: gloo would cost 200 MiB a rank."""

import os
import sys
import time
from typing import Any

from swin_moe.checkpoint.communicator import Communicator, SingleProcess


class MpiRanks:
    """The communicator over all ranks of mpirun."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self.rank, self.size = world.Get_rank(), world.Get_size()

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order."""
        # MPI's own waiting keeps a core busy, which ranks that still copy may need.
        everyone = self._world.Ibarrier()
        while not everyone.Test():
            time.sleep(0.001)
        return self._world.allgather(value)


def join_ranks() -> Communicator:
    """Returns the communicator of this process: over MPI where mpirun started it, else alone.

    Raises:
        ValueError: Something other than MPI started several ranks, or WORLD_SIZE is no number.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and mpi.COMM_WORLD.Get_size() > 1:
        return MpiRanks(mpi.COMM_WORLD)
    text = os.environ.get("WORLD_SIZE") or "1"
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"environment variable WORLD_SIZE must be a whole number >= 0, got {text!r}")
    if text.lstrip("0") not in ("", "1"):
        raise ValueError("checkpoint tools are parallel only under MPI: python -m launcher -n K -- -m checkpoint_tools")
    return SingleProcess()
