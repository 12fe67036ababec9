"""Checkpoints of torch tensors: saves and loads pieces in any layout. torch is imported when first used."""

import dataclasses
import datetime
import logging
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from swin_moe.checkpoint import load as reading
from swin_moe.checkpoint.background import BackgroundSaver
from swin_moe.checkpoint.communicator import SingleProcess, collect, resolve, together
from swin_moe.checkpoint.content import FILE_SIZE
from swin_moe.checkpoint.directory import Report, find_latest, list_checkpoints
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.index import FILE_NAME as INDEX_NAME
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.pieces import DTYPE_BYTES, Piece, array_to_raw
from swin_moe.checkpoint.plan import plan_copies
from swin_moe.checkpoint.save import write_checkpoint
from swin_moe.checkpoint.shards import ShardReader
from swin_moe.config.arguments import near_path
from swin_moe.config.mistaken import belongs
from swin_moe.config.state import canonical_config

T = TypeVar("T")
_log = logging.getLogger(__name__)


def save(
    root: str | Path,
    step: int,
    pieces: Iterable[Piece],
    *,
    state: dict[str, Any],
    config: dict[str, Any],
    group: Any = None,
    file_size: int = FILE_SIZE,
    keep: int = 0,
    best: float | None = None,
    background: BackgroundSaver | None = None,
    **options: Any,
) -> Path:
    """Returns the path of the published checkpoint; every rank calls it with the pieces it holds.

    Args:
        root: <run>/checkpoints, on storage that all ranks share.
        step: Optimizer steps done.
        pieces: Parameters, and optimizer state as `optim.<state>/<name>`, `master/<name>`, `ema/<name>`.
        state: JSON of rank 0: seed, samples seen, loss scale, ...
        config: JSON; entries of layout and host are left out of the index and kept in provenance.json.
        group: torch process group or Communicator; None = the default group, or one process without one.
        background: Saves in its thread; the path is that of a checkpoint still to be published. `group` must then be
            no group of training's.
        file_size, keep, best, options: As for write_checkpoint.

    Raises:
        CheckpointError: On every rank, if any rank failed; names the path or the tensor. Older checkpoints stay.
    """
    comm = resolve(group)
    provenance = {"config": config, "time": _now(), "versions": _versions(), "world_size": comm.size}
    provenance |= options.pop("provenance", None) or {}
    write = write_checkpoint if background is None else background.start
    return write(
        root,
        step,
        pieces,
        state=state,
        config=canonical_config(config),
        comm=comm,
        file_size=file_size,
        keep=keep,
        best=best,
        provenance=provenance,
        to_raw=to_raw,
        **options,
    )


def load(
    path: str | Path | Index,
    wanted: Iterable[Piece],
    *,
    verify: bool = True,
    convert: bool = False,
    exact: bool = False,
) -> Index:
    """Returns the index (step, state, config) after filling the tensors of the wanted pieces in place.

    Any layout loads any checkpoint: each piece is filled from the stored chunks it overlaps. No rank talks to another.

    Args:
        path: A checkpoint, or its index where that was read already.
        wanted: Pieces whose tensors, on any device and of any strides, receive the data.
        verify: Compare every block that is read with its digest.
        convert: Allow a float dtype other than the stored one; else it is an error.
        exact: The checkpoint may hold no tensor beside the wanted ones, so that nothing of it is dropped silently.

    Raises:
        CheckpointError: A tensor is missing, has another shape or dtype, or is left over; no tensor was changed then.
        CorruptionError: What is read is not what was written; names file, tensor and expert. Some may be filled.
    """
    index = path if isinstance(path, Index) else Index.read(path)
    wanted = list(wanted)
    copies = plan_copies(index, wanted, convert=convert)
    left = sorted(index.tensors.keys() - {piece.name for piece in wanted}) if exact else []
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise CheckpointError(f"{index.path}: holds tensors this run has no place for: {', '.join(left[:3])}{more}")
    with ShardReader(index, verify=verify) as reader:
        for piece, reads in reading.in_file_order(wanted, copies):
            _fill_tensor(reader, piece, reads, index.tensors[piece.name].dtype)
    return index


def load_newest_valid(
    root: str | Path, loader: Callable[[Path], T], *, group: Any = None, **options: Any
) -> tuple[Path, T] | None:
    """Returns the newest checkpoint that `loader` loads on every rank, and its result; see load.load_newest_valid."""
    return reading.load_newest_valid(root, loader, comm=resolve(group), **options)


class CheckpointManager:
    """The checkpoints of one run: saving with retention, resuming with fallback, weights for evaluation."""

    def __init__(
        self,
        root: str | Path,
        *,
        group: Any = None,
        keep: int = 0,
        file_size: int = FILE_SIZE,
        asynchronous: bool = False,
        save_group: Any = None,
    ) -> None:
        """asynchronous: `save` returns once the tensors are copied; save_group, gloo's and used by nothing else, is
        what its thread talks to other ranks with."""
        self.root = Path(root)
        self.resumed_from: Index | None = None  # what the last `resume` read
        self._group, self._keep, self._file_size = group, keep, file_size
        self._background = BackgroundSaver() if asynchronous else None
        self._save_group = group
        if asynchronous:
            if save_group is None and resolve(group).size > 1:
                raise ValueError("saving in the background on several ranks needs a process group of its own")
            self._save_group = SingleProcess() if save_group is None else save_group

    @property
    def failed(self) -> bool:
        """True on a rank whose save in the background has failed; then every rank calls `wait`, which says why."""
        return self._background is not None and self._background.failed

    def wait(self) -> None:
        """Returns when no save is running; raises the CheckpointError of one that failed, on every rank."""
        if self._background is not None:
            self._background.wait()

    def close(self, *, report: Report = _log.warning) -> None:
        """Lets a save in the background come to its end; for a run that another error ends, so this one is reported."""
        try:
            self.wait()
        except CheckpointError as error:
            report(f"the last checkpoint could not be saved: {error}")

    def latest(self) -> Path | None:
        """Returns the newest complete checkpoint of the run, or None; for this rank alone."""
        return find_latest(self.root)

    def save(
        self, step: int, pieces: Iterable[Piece], *, state: dict[str, Any], config: Any, best: float | None = None
    ) -> Path:
        """Returns the published checkpoint; see save. `config` is a dict or a dataclass of options.

        An asynchronous save first waits for the one before it, and raises what that met.
        """
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            config = dataclasses.asdict(config)
        return save(
            self.root,
            step,
            pieces,
            state=state,
            config=config,
            group=self._save_group,
            file_size=self._file_size,
            keep=self._keep,
            best=best,
            background=self._background,
        )

    def resume(
        self, pieces: Iterable[Piece], *, source: str = "", check: Callable[[Index], object] | None = None
    ) -> dict[str, Any] | None:
        """Returns the state of the checkpoint that `pieces` were filled from; None if the run has no checkpoint yet.

        Args:
            source: Where a run that has no checkpoint of its own begins: a checkpoint, or a run directory for its
                newest one; "" = from the start. A run's own come first, or starting the same command again would lose
                progress. A corrupt newest one is reported and the one before it used; one that is named itself has no
                substitute.
            check: Raises ValueError, alike on every rank, where a checkpoint is not to be continued; before any tensor
                is read, as those of another network do not fit and would be blamed.

        Raises:
            CheckpointError: On every rank: `source` is no checkpoint, does not fit `pieces`, or nothing valid is left.
        """
        pieces, refused = list(pieces), list[ValueError]()

        def fill(path: Path) -> Index:
            index = Index.read(path)
            try:
                if check is not None:
                    check(index)
            except ValueError as error:
                refused.append(error)
                return index
            return load(index, pieces, exact=True)

        found = self._load("", fill)
        if found is None and source:
            found = self._load(source, fill)
        if refused:
            raise refused[0]
        self.resumed_from = None if found is None else found[1]
        return None if found is None else found[1].state

    def load_parameters(self, pieces: Iterable[Piece], *, source: str = "") -> str:
        """Returns what was loaded, as text, after filling parameters; averaged ones (`ema/<name>`) come first.

        Raises:
            CheckpointError: On every rank, as for `resume`, or the run has no checkpoint.
        """
        pieces = list(pieces)

        def fill_parameters(path: Path) -> str:
            index = Index.read(path)
            averaged = {piece.name for piece in pieces if f"ema/{piece.name}" in index.tensors}
            wanted = [dataclasses.replace(p, name=f"ema/{p.name}") if p.name in averaged else p for p in pieces]
            load(index, wanted, convert=True)
            return f"{path} (step {index.step}, {len(averaged)} of {len(pieces)} parameters averaged)"

        found = self._load(source, fill_parameters)
        if found is None:
            raise CheckpointError(f"{self.root}: holds no checkpoint; train first, or set checkpoint.load=PATH")
        return found[1]

    def _load(self, source: str, loader: Callable[[Path], T]) -> tuple[Path, T] | None:
        if not source:
            return load_newest_valid(self.root, loader, group=self._group)
        path, comm = Path(source), resolve(self._group)
        kind = collect(comm, lambda: _kind_of(path) if comm.rank == 0 else "")[0]
        if kind == "checkpoint":
            return path, together(comm, lambda: loader(path))
        return load_newest_valid(path / kind, loader, group=comm)


def find_checkpoint(source: str | Path, *, key: str) -> Path:
    """Returns the checkpoint that `source` is, or the newest complete one of the run directory that it is.

    Args:
        key: The option that `source` comes from, for errors.

    Raises:
        CheckpointError: It is neither.
    """
    path = Path(source)
    kind = _kind_of(path, key)
    found = path if kind == "checkpoint" else find_latest(path / kind)
    if found is None:
        raise CheckpointError(f"{key}={path}: holds no complete checkpoint")
    return found


def _kind_of(path: Path, key: str = "checkpoint.load") -> str:
    """Returns "checkpoint", or where below a run directory its checkpoints are: "checkpoints" or "." """
    if (path / INDEX_NAME).exists():
        return "checkpoint"
    for below in ("checkpoints", "."):
        if list_checkpoints(path / below):
            return below
    if path.is_file() or path.with_name(f"{path.name}.rank0").is_file():
        whole = re.sub(r"\.(rank\d+|master)$", "", str(path))  # rank files are named together
        raise CheckpointError(
            f"{key}={path}: is a file, and a run goes on from a checkpoint of this system; `swin-moe checkpoint "
            f"convert {whole} DIR --to native` makes one, checkpoint.init={whole} takes the weights alone"
        )
    hint = belongs(path) or near_path(path)
    raise CheckpointError(f"{key}={path}: is neither a checkpoint (no {INDEX_NAME}) nor a run that holds one{hint}")


def to_raw(tensor: Any) -> np.ndarray:
    """Returns a torch tensor or numpy array as integers of its element size; a CPU tensor shares its memory."""
    if isinstance(tensor, np.ndarray):
        return array_to_raw(tensor)
    import torch

    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().resolve_conj().view(raw).numpy()


def _fill_tensor(reader: ShardReader, piece: Piece, reads: list, stored_dtype: str) -> None:
    """Fills a piece's tensor, through a host tensor of the stored dtype where it cannot be filled directly."""
    tensor = piece.tensor
    if isinstance(tensor, np.ndarray) and stored_dtype == piece.dtype:
        reading.fill(reader, piece, array_to_raw(tensor), reads)
        return
    import torch

    if isinstance(tensor, np.ndarray):
        tensor = torch.from_numpy(tensor)
    if stored_dtype == piece.dtype and tensor.device.type == "cpu":
        reading.fill(reader, piece, to_raw(tensor), reads)
        return
    host = torch.empty(piece.chunk.size, dtype=torch_dtype(stored_dtype))
    reading.fill(reader, piece, to_raw(host), reads)
    with torch.no_grad():
        tensor.copy_(host)


def torch_dtype(name: str) -> Any:
    """Returns torch's dtype of a name in an index."""
    import torch

    table = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    assert table.keys() == DTYPE_BYTES.keys()
    return table[name]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    import torch

    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
