"""How the ranks of a save agree: one operation, all_gather of objects, so that torch, MPI or threads can provide it."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from swin_moe.checkpoint.errors import CheckpointError, CorruptionError, RankMemoryError, describe, out_of_memory

T = TypeVar("T")


class Communicator(Protocol):
    """Ranks that write or read one checkpoint together."""

    rank: int
    size: int

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order; every rank must call it."""


class SingleProcess:
    """The communicator of one process alone."""

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the value as the only one."""
        return [value]


class TorchGroup:
    """The communicator over a torch.distributed process group; None is the default group."""

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order."""
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value, group=self._group)
        return values


def resolve(group: Any) -> Communicator:
    """Returns `group` if it is a communicator, else one over that torch group, the default group, or one process."""
    if hasattr(group, "all_gather"):
        return group
    if group is not None:
        return TorchGroup(group)
    import torch.distributed as dist

    return TorchGroup() if dist.is_available() and dist.is_initialized() else SingleProcess()


def collect(comm: Communicator, phase: Callable[[], T]) -> list[T]:
    """Returns what `phase` gave on every rank, in rank order; no rank goes on before all have finished it.

    Raises:
        CorruptionError: The phase failed on some rank, and found corruption wherever it failed.
        RankMemoryError: The first rank on which the phase failed got no memory.
        CheckpointError: The phase failed on some rank; the same on every rank, naming the first one and its error.
    """
    result, cause, failure = None, None, None
    try:
        result = phase()
    except Exception as error:  # noqa: BLE001 - a rank that leaves here alone would make the others wait for ever
        short = out_of_memory(error)
        kind = RankMemoryError if short else CorruptionError if isinstance(error, CorruptionError) else CheckpointError
        cause, failure = error, (kind.__name__, short or describe(error))
    results = comm.all_gather((failure, result))
    failed = [(rank, *outcome) for rank, (outcome, _) in enumerate(results) if outcome is not None]
    if not failed:
        return [value for _, value in results]
    rank, first, text = failed[0]
    if comm.size > 1:
        more = f" (and {len(failed) - 1} more ranks failed)" if len(failed) > 1 else ""
        text = f"rank {rank}: {text}{more}"
    if first == RankMemoryError.__name__:
        raise RankMemoryError(text) from cause
    corrupt = all(name == CorruptionError.__name__ for _, name, _ in failed)
    raise (CorruptionError if corrupt else CheckpointError)(text) from cause


def together(comm: Communicator, phase: Callable[[], T]) -> T:
    """Returns what `phase` gave on this rank, once it is done on every rank; raises as collect does."""
    mine: list[T] = []
    collect(comm, lambda: mine.append(phase()))  # the results stay where they are: an index can be large
    return mine[0]


def on_first(comm: Communicator, phase: Callable[[], object]) -> None:
    """Runs a phase on rank 0 alone; returns, or raises, on all ranks together."""
    together(comm, lambda: phase() if comm.rank == 0 else None)
