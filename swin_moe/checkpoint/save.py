"""Writing a checkpoint: the same bytes from any number of ranks, published in one rename. Imports no torch."""

import dataclasses
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swin_moe.checkpoint.communicator import Communicator, SingleProcess, collect, on_first, together
from swin_moe.checkpoint.content import FILE_SIZE, PROVENANCE, check_content, check_name, check_object
from swin_moe.checkpoint.digest import DEFAULT, block_digests
from swin_moe.checkpoint.directory import (
    Report,
    create_staging,
    lock_directory,
    mark_best,
    publish,
    retire_old,
    staging_path,
    step_path,
)
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.index import FILE_NAME, Index, add_digests
from swin_moe.checkpoint.pieces import Piece, array_to_raw
from swin_moe.checkpoint.plan import FilePlan, Share, Spec, assign_shares, merge_specs, plan_files, split_evenly
from swin_moe.checkpoint.sealed_json import check_json, seal, write_durably
from swin_moe.checkpoint.shards import ShardWriter, create_files, open_checked
from swin_moe.layout import Chunk

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedSave:
    """A checkpoint that all ranks agreed on and nobody has written yet."""

    root: Path
    index: Index  # without digests
    plan: FilePlan
    shares: list[Share]  # of this rank
    comm: Communicator
    provenance: dict[str, Any] | None
    keep: int
    best: float | None
    report: Report
    writer: str  # no other save's

    @property
    def path(self) -> Path:
        """Where the checkpoint will be published."""
        return step_path(self.root, self.index.step)


def write_checkpoint(
    root: str | Path,
    step: int,
    pieces: Iterable[Piece],
    *,
    to_raw: Callable[[Any], np.ndarray] = array_to_raw,
    **options: Any,
) -> Path:
    """Returns the path of the checkpoint, after it is published: complete, durable, digested.

    Every rank calls it with the pieces it holds; together they cover each tensor. A kill at any moment leaves the
    checkpoints that were there, or these and the new one.

    Args:
        to_raw: Turns a piece's array into raw integers of its element size, on the CPU, without a copy where it can.
        options: As for plan_save.

    Raises:
        CheckpointError: On every rank, if any rank failed; names the path or the tensor. Older checkpoints stay.
    """
    pieces = list(pieces)
    return complete_save(plan_save(root, step, pieces, **options), pieces, to_raw)


def plan_save(
    root: str | Path,
    step: int,
    pieces: list[Piece],
    *,
    state: dict[str, Any],
    config: dict[str, Any],
    comm: Communicator | None = None,
    file_size: int = FILE_SIZE,
    keep: int = 0,
    best: float | None = None,
    provenance: dict[str, Any] | None = None,
    algorithm: str = DEFAULT,
    report: Report = _log.warning,
) -> PlannedSave:
    """Returns what a save will write, and this rank's share of it; every rank calls it. Touches no file.

    Args:
        root: Directory of the run's checkpoints, on storage that all ranks share.
        state, config: JSON of rank 0; see Index.
        file_size: Data bytes a file is filled to; the bytes of a checkpoint depend on it.
        keep: Newest checkpoints that stay; 0 = all.
        best: The metric, if this is the best checkpoint so far; it then stays until a better one comes.
        provenance: JSON written beside the index (time, versions, ...); no part of the checkpoint's identity.

    Raises:
        CheckpointError: On every rank; names the tensor or the argument.
    """
    root, comm = Path(root), comm or SingleProcess()

    def describe() -> tuple[int, list[Spec], str]:
        check_content(step, state=state, config=config, file_size=file_size, algorithm=algorithm)
        check_object(provenance or {}, "provenance")
        check_json(best, "best")
        if type(keep) is not int or keep < 0:
            raise ValueError(f"checkpoint.keep must be >= 0 (0 = all), got {keep!r}")
        return step, describe_pieces(pieces), secrets.token_hex(4)

    steps, ranks, writers = zip(*collect(comm, describe))
    if len(set(steps)) > 1:
        raise CheckpointError(f"the ranks must save one step together, got steps {sorted(set(steps))}")
    specs = merge_specs(ranks)
    shares = assign_shares(specs, ranks)[comm.rank]
    plan = plan_files(specs, file_size, algorithm)
    index = Index(step, file_size, plan.tensors, plan.files, state, config, algorithm)
    return PlannedSave(root, index, plan, shares, comm, provenance, keep, best, report, writers[0])


def complete_save(planned: PlannedSave, pieces: list[Piece], to_raw: Callable[[Any], np.ndarray]) -> Path:
    """Returns the path of the planned checkpoint after writing it; every rank calls it with the pieces of its shares.

    Raises:
        CheckpointError: As write_checkpoint.
    """
    root, comm, plan, step = planned.root, planned.comm, planned.plan, planned.index.step
    final, staging = planned.path, staging_path(root, step, planned.writer)
    held: list[int | None] = []

    def begin() -> None:
        create_staging(root, step, plan.num_bytes, planned.writer)
        held.append(lock_directory(staging))
        create_files(staging, plan)

    def write() -> None:
        if comm.rank == 0 and not staging.is_dir():  # which made it, so that other storage is not the reason
            raise CheckpointError(f"{staging}: was removed while the checkpoint was being written")
        write_shares(staging, plan, pieces, planned.shares, to_raw)

    try:
        on_first(comm, begin)
        together(comm, write)
        digests = collect(comm, lambda: digest_share(staging, plan, comm, planned.index.algorithm))
        on_first(comm, lambda: finish(staging, final, planned.index, digests, planned.provenance))
    except BaseException:
        if comm.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        for fd in held:
            if fd is not None and fd >= 0:
                os.close(fd)
    on_first(comm, lambda: tidy(root, final, step, planned.best, planned.keep, planned.report))
    return final


def finish(staging: Path, final: Path, index: Index, digests: list, provenance: dict[str, Any] | None) -> None:
    """Completes the staging directory with its index and publishes it."""
    index = dataclasses.replace(index, tensors=add_digests(index.tensors, digests))
    write_durably(staging / FILE_NAME, index.encode())
    if provenance:
        write_durably(staging / PROVENANCE, seal(provenance))
    publish(staging, final)


def tidy(root: Path, final: Path, step: int, best: float | None, keep: int, report: Report) -> None:
    """Marks the best checkpoint and deletes old ones; the new one is safe already."""
    if best is not None:
        mark_best(root, step, metric=best)
    retire_old(root, keep, final, report=report)


def describe_pieces(pieces: list[Piece]) -> list[Spec]:
    """Returns what other ranks must know of these pieces; raises ValueError, naming the tensor, for a bad one."""
    for piece in pieces:
        check_name(piece.name)
        piece.check()
    return [Spec(p.name, p.shape, p.dtype, p.chunk) for p in pieces]


def write_shares(
    staging: Path, plan: FilePlan, pieces: list[Piece], shares: list[Share], to_raw: Callable[[Any], np.ndarray]
) -> None:
    """Writes this rank's boxes into the created files, and syncs them; one piece is in raw form at a time.

    Raises:
        CheckpointError: This rank does not see the staging directory that rank 0 made.
        OSError: With the path that could not be written.
    """
    if shares and not staging.is_dir():
        raise CheckpointError(f"{staging}: is not visible on this rank; checkpoints need storage that all ranks share")
    held: dict[tuple[str, Chunk], Piece] = {}
    for piece in pieces:
        held.setdefault((piece.name, piece.chunk), piece)
    writer = ShardWriter(staging)
    try:
        for key, boxes in _by_piece(shares).items():
            piece = held[key]
            raw = to_raw(piece.tensor)
            for box in boxes:
                for stored, part in plan.tensors[piece.name].overlapping(box):
                    writer.write(stored, part, raw[part.within(piece.chunk)])
    except BaseException:
        writer.close(sync=False)
        raise
    writer.close()


def _by_piece(shares: list[Share]) -> dict[tuple, list]:
    groups: dict[tuple, list] = {}
    for share in shares:
        groups.setdefault((share.name, share.piece), []).append(share.box)
    return groups


def digest_share(
    staging: Path, plan: FilePlan, comm: Communicator, algorithm: str
) -> list[tuple[str, int, tuple[str, ...]]]:
    """Returns (tensor, chunk number, digests) of this rank's part of the chunks, from the bytes read back."""
    result = []
    file, fd = "", -1
    try:
        for name, i in split_evenly(plan, comm.size)[comm.rank]:
            stored = plan.tensors[name].chunks[i]
            if stored.file != file:
                if fd >= 0:
                    os.close(fd)
                file, fd = stored.file, -1
                fd = open_checked(staging / file, plan.files[file].size)
            result.append((name, i, tuple(block_digests(fd, stored.begin, stored.end, algorithm, staging / file))))
    finally:
        if fd >= 0:
            os.close(fd)
    return result
