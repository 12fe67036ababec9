"""Reading a checkpoint: any boxes of any tensors, only the bytes they need, verified; falling back to older ones.

Imports no torch: destinations are raw-integer arrays; manager.py makes them from tensors.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from swin_moe.checkpoint.communicator import Communicator, SingleProcess, collect, together
from swin_moe.checkpoint.content import PROVENANCE
from swin_moe.checkpoint.directory import Report, list_checkpoints
from swin_moe.checkpoint.errors import CorruptionError
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.pieces import Piece, array_to_raw
from swin_moe.checkpoint.plan import Copy, plan_copies
from swin_moe.checkpoint.sealed_json import read_sealed
from swin_moe.checkpoint.shards import ShardReader, find_corruption

T = TypeVar("T")
_log = logging.getLogger(__name__)


def read_arrays(index: Index, wanted: Iterable[Piece], *, verify: bool = True) -> None:
    """Fills the numpy arrays of the wanted pieces, any boxes in any layout, in file order.

    Raises:
        CheckpointError: A tensor is missing or has another shape or dtype; nothing was read then.
        CorruptionError: What is read is not what was written; names file, tensor and expert.
    """
    wanted = list(wanted)
    copies = plan_copies(index, wanted)
    with ShardReader(index, verify=verify) as reader:
        for piece, reads in in_file_order(wanted, copies):
            fill(reader, piece, array_to_raw(piece.tensor), reads)


def in_file_order(wanted: list[Piece], copies: list[list[Copy]]) -> list[tuple[Piece, list[Copy]]]:
    """Returns each piece that needs a read with its reads, in the order of the bytes they begin with."""
    busy = [(piece, reads) for piece, reads in zip(wanted, copies) if reads]
    return sorted(busy, key=lambda item: (item[1][0].source.file, item[1][0].source.begin))


def fill(reader: ShardReader, piece: Piece, destination: np.ndarray, reads: list[Copy]) -> None:
    """Fills the raw array of one piece by its reads."""
    for name, source, box in reads:
        # The Ellipsis keeps a scalar an array, which can be written to.
        reader.read(name, source, box, destination[(*box.within(piece.chunk), ...)])


def verify(path: str | Path) -> Index:
    """Returns the index of a checkpoint after comparing every byte with its digest.

    Raises:
        CorruptionError: Naming the first thing that is wrong, and how many more.
    """
    index = Index.read(path)
    problems = find_corruption(index)
    provenance = index.path / PROVENANCE
    if provenance.exists():
        try:
            read_sealed(provenance)
        except CorruptionError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise CorruptionError(problems[0] + more)
    return index


def load_newest_valid(
    root: str | Path,
    loader: Callable[[Path], T],
    *,
    comm: Communicator | None = None,
    report: Report = _log.warning,
) -> tuple[Path, T] | None:
    """Returns the newest checkpoint that `loader` loads on every rank, and its result here; None if there is none.

    A checkpoint that is corrupt on any rank is reported by name, and all ranks go on to the one before it, which must
    overwrite whatever was already filled. `loader` gets the path and must not talk to other ranks.

    Raises:
        CheckpointError: Loading failed on some rank for a reason that an older checkpoint would not cure, or all
            checkpoints are corrupt (starting over silently would lose the run).
    """
    comm = comm or SingleProcess()
    candidates = collect(comm, lambda: list_checkpoints(root) if comm.rank == 0 else [])[0]
    failure = None
    for path in candidates:
        try:
            return path, together(comm, partial(loader, path))
        except CorruptionError as error:
            failure = failure or error
            if comm.rank == 0:
                report(f"checkpoint {path} is not usable, the one before it is tried: {error}")
    if failure is not None:
        raise CorruptionError(f"{root}: none of the {len(candidates)} checkpoints is usable; newest: {failure}")
    return None
