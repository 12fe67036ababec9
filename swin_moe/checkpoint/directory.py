"""The directory of a run's checkpoints: names, staging, publishing, which is newest, which is best, which may go.

    <root>/0000010000/             a published checkpoint
    <root>/best.json               {"metric", "step"} of the best one, sealed
    <root>/.0000010000.3f9c01aa.tmp/   being written, by the writer of that name alone, who holds a lock on it; ignored,
                                   removed by the next start or save once nobody holds it
    <root>/.0000010000.replaced/   published before, while the same step is being published again; still valid
    <root>/.0000010000.trash/      being deleted; ignored, removed by the next start or save

Every change of state is one rename, so a kill at any moment leaves the old state or the new one.
"""

import contextlib
import fcntl
import fnmatch
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from swin_moe.checkpoint.content import check_step
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError, describe
from swin_moe.checkpoint.index import Index, read_files
from swin_moe.checkpoint.sealed_json import check_json, read_sealed, seal, sync_directory, write_durably

Report = Callable[[str], None]
_log = logging.getLogger(__name__)
_PUBLISHED = re.compile(r"\d{10}")
_REPLACED = re.compile(r"\.(\d{10})\.replaced")
_LEFTOVER = re.compile(r"\.\d{10}\.((\w+\.)?tmp|trash)")
BEST = "best.json"


def step_path(root: Path, step: int) -> Path:
    """Returns where the checkpoint of a step is published."""
    check_step(step)
    return root / f"{step:010d}"


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def staging_path(root: Path, step: int, writer: str) -> Path:
    """Returns where a writer writes the checkpoint of a step before it is published.

    Two runs in one directory never write into the same one, so that neither publishes what the other has not finished.
    """
    return _hidden(step_path(root, step), f"{writer}.tmp")


def lock_directory(path: Path) -> int | None:
    """Returns a descriptor that holds a directory until it is closed or the process ends; None if another holds it.

    -1 where the file system knows no locks: there what a killed save left cannot be told from what is being written.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        return -1
    return fd


def _remove_leftover(path: Path) -> None:
    """Deletes what nobody holds."""
    held = lock_directory(path)
    if held is None:
        return
    try:
        remove(path)
    finally:
        if held >= 0:
            os.close(held)


def create_staging(root: Path, step: int, num_bytes: int, writer: str) -> Path:
    """Returns a new empty staging directory, after cleaning up what earlier saves left.

    Raises:
        CheckpointError: The disk has less than `num_bytes` free; names the path and both numbers.
        OSError: The directory cannot be created; names the path.
    """
    created = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for path in created:
        sync_directory(path.parent)
    clean_leftovers(root)
    free = shutil.disk_usage(root).free
    if free < num_bytes:
        raise CheckpointError(f"{root}: a checkpoint of {num_bytes} bytes does not fit, {free} bytes are free")
    staging = staging_path(root, step, writer)
    staging.mkdir()
    return staging


def clean_leftovers(root: Path) -> None:
    """Removes what interrupted saves and deletions left; nothing that is published, or was, is lost."""
    for path in sorted(root.iterdir()):
        replaced = _REPLACED.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):  # another writer removed it first
            if _LEFTOVER.fullmatch(path.name):
                _remove_leftover(path)
            elif replaced and (root / replaced[1]).exists():
                remove(path)
            elif replaced:
                os.rename(path, root / replaced[1])
                sync_directory(root)
            elif fnmatch.fnmatch(path.name, f".{BEST}*.tmp"):
                path.unlink()


def remove(path: Path) -> None:
    """Deletes a directory that is not published (any more)."""
    trash = path if path.name.endswith((".tmp", ".trash")) else _discard(path)
    shutil.rmtree(trash)


def _discard(path: Path) -> Path:
    """Renames a checkpoint to trash, so that a half-deleted one is never taken for complete."""
    match = _REPLACED.fullmatch(path.name)
    trash = _hidden(path.with_name(match[1] if match else path.name), "trash")
    if trash.exists():
        shutil.rmtree(trash)
    os.rename(path, trash)
    sync_directory(path.parent)
    return trash


def publish(staging: Path, final: Path) -> None:
    """Makes a completely written and synced staging directory the checkpoint `final`, in one rename."""
    sync_directory(staging)
    replaced = _hidden(final, "replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(staging, final)
    sync_directory(final.parent)
    if replaced.exists():
        # The new checkpoint is in place, so a failure here is none of the save; the next save tries again.
        with contextlib.suppress(OSError):
            remove(replaced)


def list_checkpoints(root: str | Path) -> list[Path]:
    """Returns the published checkpoints of a run, newest first, without looking into them."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        replaced = _REPLACED.fullmatch(path.name)
        if _PUBLISHED.fullmatch(path.name) or replaced:
            found.append((replaced[1] if replaced else path.name, replaced is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def read_complete(path: Path, report: Report) -> Index | None:
    """Returns the index of a checkpoint if it is valid and all files have their sizes, else None, and reports why.

    Reads no data.
    """
    try:
        index = Index.read(path)
        index.check_files()
    except CorruptionError as error:
        report(f"checkpoint {path} is not usable: {error}")
        return None
    return index


def is_complete(path: Path, report: Report) -> bool:
    """True where read_complete returns an index, by the sealed list of files alone; reports why not.

    A save asks this of every older checkpoint: what their indexes say of each chunk, seconds for 100,000 of them, was
    checked by who wrote it, and is checked again by who reads it. The seal tells whether it changed.
    """
    try:
        files = read_files(path)
    except CorruptionError as error:
        report(f"checkpoint {path} is not usable: {error}")
        return False
    if files is None:
        return read_complete(path, report) is not None
    for name, size in files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            return read_complete(path, report) is not None
    return True


def find_latest(root: str | Path, *, report: Report = _log.warning) -> Path | None:
    """Returns the newest complete checkpoint under `root`, or None; newer ones that are broken are reported by name."""
    return next((path for path in list_checkpoints(root) if read_complete(path, report)), None)


def mark_best(root: str | Path, step: int, *, metric: float) -> None:
    """Records a step as the best one so far; retention keeps its checkpoint."""
    check_json(metric, "the metric of the best checkpoint")
    path, content, writer = Path(root) / BEST, seal({"step": step, "metric": metric}), secrets.token_hex(4)
    try:
        write_durably(path, content, writer=writer)
    except FileNotFoundError:  # another writer in this directory cleaned up between writing and renaming
        write_durably(path, content, writer=writer)


def read_best(root: str | Path) -> tuple[int, float] | None:
    """Returns (step, metric) of the best checkpoint, or None if none was marked.

    Raises:
        CorruptionError: The record is changed or not readable.
    """
    path = Path(root) / BEST
    if not path.exists():
        return None
    content = read_sealed(path)
    step, metric = content.get("step"), content.get("metric")
    if type(step) is not int or type(metric) is not int and type(metric) is not float:
        raise CorruptionError(f"{path}: must hold a step and a metric")
    return step, metric


def retire_old(root: Path, keep: int, current: Path, *, report: Report = _log.warning) -> None:
    """Deletes checkpoints beyond the newest `keep` complete ones (0 = all stay).

    Never `current`, the best, or a broken one.
    A failure to delete is reported and is no error: the new checkpoint is already published.
    """
    if keep == 0:
        return
    try:
        best = read_best(root)
    except CorruptionError as error:
        report(f"no old checkpoint is deleted, because the best one is unknown: {error}")
        return
    kept = {current} if best is None else {current, step_path(root, best[0])}
    # A broken checkpoint neither counts nor goes: counting it could delete the last good one.
    complete = [path for path in list_checkpoints(root) if path == current or is_complete(path, report)]
    for path in complete[keep:]:
        if path not in kept:
            try:
                remove(path)
            except OSError as error:
                report(f"old checkpoint {path} could not be deleted: {describe(error)}")
