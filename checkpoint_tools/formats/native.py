"""The native format (docs/checkpoint_format.md) as a source; stream.py writes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_tools.formats.infer import given_sizes, merge_model
from checkpoint_tools.sources import stream
from checkpoint_tools.sources.base import Options, Source, SourceTensor
from swin_moe.checkpoint.content import PROVENANCE
from swin_moe.checkpoint.directory import list_checkpoints, read_complete
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.index import FILE_NAME, Index
from swin_moe.checkpoint.plan import FilePlan, split_evenly
from swin_moe.checkpoint.sealed_json import read_sealed
from swin_moe.checkpoint.shards import ShardReader, find_corruption, find_wrong_blocks
from swin_moe.layout import Chunk


class NativeSource(Source):
    """A native checkpoint; what is read is compared with its digests."""

    format = "native"
    has_digests = True

    def __init__(self, index: Index, *, verify: bool = True) -> None:
        path = index.path
        self.index, self.path = index, path
        self.files = [path / FILE_NAME, *(path / name for name in self.index.files)]
        self.tensors = {name: SourceTensor(t.shape, t.dtype) for name, t in self.index.tensors.items()}
        self.step, self.state, self.config = self.index.step, self.index.state, self.index.config
        provenance = path / PROVENANCE
        self.provenance = read_sealed(provenance) if provenance.exists() else {}
        self._reader = ShardReader(self.index, verify=verify)

    def read(self, name: str, box: Chunk, destination: np.ndarray) -> None:
        """See Source."""
        for stored, part in self.index.tensors[name].overlapping(box):
            # The Ellipsis keeps a scalar an array, which can be written to.
            self._reader.read(name, stored, part, destination[(*part.within(box), ...)])

    def locate(self, name: str, box: Chunk) -> tuple[str, int]:
        """See Source."""
        return min(((s.file, s.begin) for s, _ in self.index.tensors[name].overlapping(box)), default=("", 0))

    def identity(self) -> Any:
        """Returns the digests of everything that the index says, and of the data through it."""
        return stream.fingerprint(self.index.encode())

    def num_chunks(self, name: str) -> int:
        """See Source."""
        return len(self.index.tensors[name].chunks)

    def find_problems(self) -> list[str]:
        """See Source."""
        return find_corruption(self.index, data=False)

    def find_wrong_data(self, options: Options, advance: Callable[[int], None]) -> list[str] | None:
        """See Source."""
        if not options.verify:
            return None
        tensors = self.index.tensors
        share = split_evenly(FilePlan(tensors, self.index.files, {}), options.comm.size)[options.comm.rank]
        return find_wrong_blocks(self.index, ((tensors[n].chunks[i], n) for n, i in share), progress=advance)

    def close(self) -> None:
        """See Source."""
        self._reader.__exit__()


def detect(path: Path) -> bool:
    """True for a checkpoint, or a run or directory of checkpoints."""
    return is_checkpoint(path) or bool(find_checkpoints(path))


def is_checkpoint(path: Path) -> bool:
    """True for the directory of one checkpoint, also where its index is lost."""
    return (path / FILE_NAME).exists() or any(path.glob("shard-[0-9]*.safetensors"))


def find_checkpoints(path: Path) -> list[Path]:
    """Returns the checkpoints of a run directory, or of its directory `checkpoints`, newest first."""
    return list_checkpoints(path / "checkpoints") or list_checkpoints(path)


def open_native(path: Path, options: Options) -> NativeSource:
    """Returns the checkpoint at `path`; of a run, its newest complete one. Sizes given with --set stand in its config.

    Raises:
        CheckpointError: There is none, or a step is given, which its state tells in several places.
    """
    source = NativeSource(_read_index(path, options), verify=options.verify)
    if given := given_sizes(options.extra):
        source.config = merge_model(source.config, {}, given)
    if options.extra.get("step", str(source.step)) != str(source.step):
        told = options.extra["step"]
        raise CheckpointError(
            f"{path}: --set step={told} is for files that do not tell it; this one is of {source.step}"
        )
    return source


def _read_index(path: Path, options: Options) -> Index:
    """Returns the index of the checkpoint at `path`, or of the newest complete one of the run there.

    Raises:
        CheckpointError: There is none.
        CorruptionError: It is changed, or a file of it is missing.
    """
    if is_checkpoint(path):
        index = Index.read(path)
        index.check_files()
        return index
    reasons: list[str] = []
    found = next(filter(None, (read_complete(c, reasons.append) for c in find_checkpoints(path))), None)
    if found is None and reasons:
        raise CorruptionError(f"{path}: none of its {len(reasons)} checkpoints is complete; {reasons[0]}")
    if found is None:
        raise CheckpointError(f"{path}: is neither a checkpoint (no {FILE_NAME}) nor a run that holds one")
    for reason in reasons:
        options.report(reason)
    return found


def plan_native(source: Source, path: Path, options: Options) -> dict[str, int]:
    """Returns the shard files of the output and their bytes."""
    plan = stream.plan_job(source, options).plan
    return {f"{path.name}/{name}": file.size for name, file in plan.files.items()}


def write_native(source: Source, path: Path, options: Options) -> None:
    """Writes `source` in canonical form; see stream.write_native."""
    stream.write_native(source, path, options)
