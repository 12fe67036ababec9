"""Writing a native checkpoint from any source: block by block, bounded memory, continued after a kill, any ranks.

Work is cut into units of a few digest blocks of one stored chunk. A unit is read as boxes, digested in memory, written
into place and noted in the journal. Ranks share the units by the bytes they read, in the order of the source's files.
"""

import datetime
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

import swin_moe
from checkpoint_tools.files.publish import Lock, check_space, hidden, refuse_existing, remove_tree
from checkpoint_tools.sources.base import Options, Source
from checkpoint_tools.sources.journal import Done, Journal
from swin_moe.checkpoint.communicator import collect, on_first, together
from swin_moe.checkpoint.content import PROVENANCE, check_content, check_name
from swin_moe.checkpoint.digest import BLOCK_BYTES, block_digests, digest, num_blocks
from swin_moe.checkpoint.errors import CheckpointError, describe
from swin_moe.checkpoint.index import FILE_NAME, Index, add_digests
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.checkpoint.plan import FilePlan, plan_files
from swin_moe.checkpoint.sealed_json import canonical_json, seal, sync_directory, write_durably
from swin_moe.checkpoint.shards import ShardWriter, create_files, open_checked
from swin_moe.layout import Chunk, boxes_of_range


class Unit(NamedTuple):
    """Blocks of a chunk of the output: its bytes [begin, end), from a block boundary on."""

    name: str
    chunk: int
    begin: int
    end: int

    @property
    def blocks(self) -> range:
        """The numbers of the digest blocks."""
        return range(self.begin // BLOCK_BYTES, num_blocks(self.end))

    @property
    def num_bytes(self) -> int:
        """Bytes that the unit holds."""
        return self.end - self.begin


@dataclass(frozen=True)
class Job:
    """All that is decided before a byte is moved."""

    plan: FilePlan
    units: list[Unit]  # in the order of the source's files
    reads: list[int]  # bytes that each unit reads
    key: str  # fingerprint of source and output


def fingerprint(data: bytes) -> str:
    """Returns the digest that jobs and sources are told apart by."""
    return xxhash.xxh3_128_hexdigest(data)


def plan_job(source: Source, options: Options) -> Job:
    """Returns the output files, the units of work and the job's fingerprint; reads no data.

    Raises:
        ValueError: The source holds what no checkpoint can; names the tensor or the entry.
    """
    for name in source.tensors:
        check_name(name)
    check_content(
        source.step, state=source.state, config=source.config, file_size=options.file_size, algorithm=options.algorithm
    )
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in source.tensors.items()}
    plan = plan_files(specs, options.file_size, options.algorithm)
    units = list_units(source, plan, options.box_bytes)
    reads = [sum(source.read_bytes(unit.name, box) for box, _, _ in unit_boxes(plan, unit)) for unit in units]
    identity = {
        "source": source.identity(),
        "format": source.format,
        "step": source.step,
        "state": source.state,
        "config": source.config,
        "file_size": options.file_size,
        "digest": options.algorithm,
        "on_drift": options.on_drift,
        "extra": dict(options.extra),
        "tensors": {name: [list(shape), dtype] for name, (shape, dtype) in specs.items()},
    }
    return Job(plan, units, reads, fingerprint(canonical_json(identity)))


def list_units(source: Source, plan: FilePlan, box_bytes: int) -> list[Unit]:
    """Returns the units of a plan in the order of the source's files; each holds at most `box_bytes`."""
    keyed = []
    for name, tensor in plan.tensors.items():
        for i, stored in enumerate(tensor.chunks):
            place, length = source.locate(name, stored.chunk), stored.end - stored.begin
            keyed += [(place, Unit(name, i, b, min(b + box_bytes, length))) for b in range(0, length, box_bytes)]
    return [unit for _, unit in sorted(keyed)]


def unit_boxes(plan: FilePlan, unit: Unit) -> Iterator[tuple[Chunk, int, int]]:
    """Yields the boxes of the tensor that make up a unit, each with the bytes [begin, end) it has in the unit."""
    tensor = plan.tensors[unit.name]
    stored, item = tensor.chunks[unit.chunk], DTYPE_BYTES[tensor.dtype]
    position = 0
    for box in boxes_of_range(stored.chunk.size, unit.begin // item, unit.end // item):
        offset = tuple(a + b for a, b in zip(stored.chunk.offset, box.offset))
        yield Chunk(offset, box.size), position, position + box.numel * item
        position += box.numel * item


def split_units(job: Job, parts: int) -> list[list[Unit]]:
    """Returns each rank's units: consecutive ones, with about equal bytes to read."""
    result: list[list[Unit]] = [[] for _ in range(parts)]
    total, done = max(1, sum(job.reads)), 0
    for unit, size in zip(job.units, job.reads):
        result[min(parts - 1, done * parts // total)].append(unit)
        done += size
    return result


def write_native(source: Source, path: Path, options: Options) -> None:
    """Writes `source` as the native checkpoint `path`, or continues what a kill interrupted; every rank calls it.

    Nothing may be at `path`. A kill at any moment leaves nothing there, or the whole checkpoint; the same command then
    continues. What fails for want of space or permission can be continued too; anything else leaves no trace.

    Raises:
        CheckpointError: On every rank; names the path or the tensor.
    """
    comm = options.comm
    if source.step_unknown:
        raise CheckpointError(
            f"{source.path}: its optimizer counts no steps, and nothing else tells them; convert it with --set step=N"
        )
    job = together(comm, lambda: plan_job(source, options))
    if len(set(comm.all_gather(job.key))) > 1:
        raise CheckpointError(f"{source.path}: the ranks see different checkpoints there; use storage they all share")
    with Lock(hidden(path, "tmp")) as lock:
        done = collect(comm, lambda: _prepare(job, path, options, lock) if comm.rank == 0 else None)[0]
        if done is not None:
            _run(source, job, path, options, done)


def _run(source: Source, job: Job, path: Path, options: Options, done: Done) -> None:
    """Copies what is not done yet, and publishes."""
    comm = options.comm
    try:
        results = collect(comm, lambda: _copy_or_stop(source, job, path, options, done))
    except CheckpointError:
        on_first(comm, lambda: _discard(path))
        raise
    stopped = [(rank, text) for rank, (_, text) in enumerate(results) if text]
    if stopped:
        where = f"rank {stopped[0][0]}: " if comm.size > 1 else ""
        raise CheckpointError(f"{where}{stopped[0][1]} (what is done is kept, the same command continues)")
    done = {key: value for digests, _ in results for key, value in digests.items()}
    on_first(comm, lambda: _finish(source, job, path, options, done))


def _prepare(job: Job, path: Path, options: Options, lock: Lock) -> Done | None:
    """Returns what earlier runs of this job did, with the staging directory ready; None if they did all of it."""
    staging, journal = hidden(path, "tmp"), Journal(path)
    if path.exists():
        finished = journal.job() == job.key
        journal.remove()
        if finished:
            return None
    refuse_existing(path)
    lock.take()
    if staging.is_dir() and journal.job() == job.key:
        done = journal.read()
        missing = job.plan.num_bytes - sum(entry.stat().st_blocks * 512 for entry in staging.iterdir())
        check_space(path.parent, max(0, missing))
        options.report(f"{path}: continues an interrupted run")
        return done
    _discard(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_space(path.parent, job.plan.num_bytes)
    staging.mkdir()
    lock.take()
    create_files(staging, job.plan)
    journal.begin(job.key)
    return {}


def _discard(path: Path) -> None:
    """Removes staging directory and journal of an unfinished run."""
    Journal(path).remove()
    remove_tree(hidden(path, "tmp"))


def _copy_or_stop(source: Source, job: Job, path: Path, options: Options, done: Done) -> tuple[Done, str]:
    """Returns the digests of this rank's blocks, and why it stopped early if the operating system made it."""
    try:
        return _copy_units(source, job, hidden(path, "tmp"), Journal(path), options, done), ""
    except OSError as error:
        return {}, describe(error)


def _copy_units(source: Source, job: Job, staging: Path, journal: Journal, options: Options, done: Done) -> Done:
    """Returns the digests of this rank's blocks, after all of them are durably in place."""
    if not staging.is_dir() and options.comm.rank == 0:
        raise CheckpointError(f"{staging}: was removed while the checkpoint was being written")
    if not staging.is_dir():
        raise CheckpointError(f"{staging}: is not visible on this rank; use storage that all ranks share")
    buffer, result = np.empty(options.box_bytes, np.uint8), {}
    log, writer = journal.writer(options.comm.rank), ShardWriter(staging)
    try:
        for unit in split_units(job, options.comm.size)[options.comm.rank]:
            digests = _check_done(job, unit, staging, options, done)
            stored = job.plan.tensors[unit.name].chunks[unit.chunk]
            data = memoryview(b"")
            if digests is None:
                data = memoryview(read_unit(source, job, unit, buffer))
                blocks = (data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES))
                digests = [digest(block, options.algorithm) for block in blocks]
            # Also without data: what an interrupted run wrote is not known to be durable.
            writer.write_bytes(stored.file, stored.begin + unit.begin, data)
            if data:
                log.note(unit.name, unit.chunk, unit.blocks.start, digests)
            result.update({(unit.name, unit.chunk, block): value for block, value in zip(unit.blocks, digests)})
            options.progress(unit.num_bytes)
    except BaseException:
        writer.close(sync=False)
        raise
    finally:
        log.close()
    writer.close()
    return result


def read_unit(source: Source, job: Job, unit: Unit, buffer: np.ndarray) -> np.ndarray:
    """Returns the bytes of a unit, in the buffer."""
    raw, end = RAW[DTYPE_BYTES[job.plan.tensors[unit.name].dtype]], 0
    for box, begin, end in unit_boxes(job.plan, unit):
        source.read(unit.name, box, buffer[begin:end].view(raw).reshape(box.size))
    return buffer[:end]


def _check_done(job: Job, unit: Unit, staging: Path, options: Options, done: Done) -> list[str] | None:
    """Returns the digests of a unit that an earlier run wrote, if what is on disk matches them; else None."""
    noted = [done.get((unit.name, unit.chunk, block)) for block in unit.blocks]
    if None in noted:
        return None
    stored = job.plan.tensors[unit.name].chunks[unit.chunk]
    path = staging / stored.file
    fd = open_checked(path, job.plan.files[stored.file].size)
    try:
        found = block_digests(fd, stored.begin + unit.begin, stored.begin + unit.end, options.algorithm, path)
    finally:
        os.close(fd)
    return found if found == noted else None


def _finish(source: Source, job: Job, path: Path, options: Options, done: Done) -> None:
    """Writes index and provenance, and publishes."""
    digests = [
        (name, i, tuple(done[name, i, block] for block in range(num_blocks(stored.end - stored.begin))))
        for name, tensor in job.plan.tensors.items()
        for i, stored in enumerate(tensor.chunks)
    ]
    tensors = add_digests(job.plan.tensors, [digests])
    index = Index(
        source.step, options.file_size, tensors, job.plan.files, source.state, source.config, options.algorithm
    )
    staging = hidden(path, "tmp")
    write_durably(staging / FILE_NAME, index.encode())
    write_durably(staging / PROVENANCE, seal(_provenance(source)))
    sync_directory(staging)
    os.rename(staging, path)  # which fails where something came to be meanwhile
    sync_directory(path.parent)
    Journal(path).remove()


def _provenance(source: Source) -> dict[str, Any]:
    """Returns where a written checkpoint came from, with the chain of what that one came from."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    parent = {"path": str(source.path), "format": source.format, "identity": fingerprint_of(source)}
    return {
        "time": now,
        "versions": {"swin_moe": swin_moe.__version__, "numpy": np.__version__},
        "parent": parent | {"provenance": source.provenance},
    }


def fingerprint_of(source: Source) -> str:
    """Returns one digest of the source's identity."""
    return fingerprint(json.dumps(source.identity(), sort_keys=True).encode())
