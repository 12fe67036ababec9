"""Publishing files of foreign formats: written and synced in a staging directory, then moved into place.

    <dir>/.<name>.tmp/      being written; ignored, removed by the next write
    <dir>/.<name>.ready/    complete, being moved into place: a call that finds it finishes the moves

The rename of the first to the second is the commit: a kill before it leaves nothing, a kill after it everything, once
any verb looks at the path again.
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Self

from swin_moe.checkpoint.communicator import Communicator, SingleProcess, on_first, together
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.sealed_json import sync_directory


def hidden(path: Path, kind: str) -> Path:
    """Returns the name beside `path` for something in the making."""
    return path.with_name(f".{path.name}.{kind}")


def publish_files(
    path: Path, num_bytes: int, write: Callable[[Path], None], *, comm: Communicator | None = None
) -> None:
    """Brings what `write(staging)` leaves in its directory beside `path`, all of it or nothing.

    Every rank calls it; each may write its own files. Their names begin with that of `path`: the name itself (a file or
    a directory), or with a suffix such as ".rank3".

    Args:
        num_bytes: What the files will take together; checked before anything is written.

    Raises:
        CheckpointError: On every rank; something is at a target already, the disk is too small, or `write` failed.
    """
    comm = comm or SingleProcess()
    staging = hidden(path, "tmp")
    with Lock(staging) as lock:
        on_first(comm, lambda: _prepare(path, staging, num_bytes, lock))
        try:
            together(comm, lambda: write(staging))
            on_first(comm, lambda: _commit(path, staging))
        except BaseException:
            if comm.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise


class Lock:
    """Keeps a second run from touching a staging directory; ends with the process, also by kill -9."""

    def __init__(self, staging: Path) -> None:
        self._staging, self._fd = staging, -1

    def take(self) -> None:
        """Locks the staging directory, if it exists; again after it was made anew.

        Raises:
            CheckpointError: Another process holds it.
        """
        self.release()
        if not self._staging.is_dir():
            return
        self._fd = os.open(self._staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{self._staging}: another run is writing it now") from error

    def release(self) -> None:
        """Unlocks."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _prepare(path: Path, staging: Path, num_bytes: int, lock: Lock) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    finish_publishing(path)
    refuse_existing(path)
    lock.take()
    remove_tree(staging)
    check_space(path.parent, num_bytes)
    staging.mkdir()
    lock.take()


def remove_tree(path: Path) -> None:
    """Deletes a directory of ours, if it is there; raises CheckpointError for a link, which is none of ours."""
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link, in the place of a directory of this tool; remove it first")
    if path.exists():
        shutil.rmtree(path)


def tell_new_parent(path: Path, report: Callable[[str], None]) -> None:
    """Reports a directory that will be made for `path` to lie in: a typo makes one too."""
    if not path.parent.exists():
        report(f"{path.parent}: does not exist and is made")


def refuse_existing(path: Path) -> None:
    """Raises CheckpointError if something is at `path`: tools never overwrite."""
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path}: exists already; give another path, or remove it first")


def check_space(directory: Path, num_bytes: int) -> None:
    """Raises CheckpointError, with both numbers, unless the file system has `num_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(f"{directory}: {num_bytes} bytes do not fit, {free} bytes are free")


def _commit(path: Path, staging: Path) -> None:
    for entry in staging.iterdir():
        assert entry.name.startswith(path.name), entry
        refuse_existing(path.with_name(entry.name))
    for directory, _, files in os.walk(staging):
        for name in files:
            fd = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            except OSError as error:
                raise OSError(error.errno, error.strerror, os.path.join(directory, name)) from error
            finally:
                os.close(fd)
        sync_directory(Path(directory))
    os.rename(staging, hidden(path, "ready"))
    sync_directory(path.parent)
    _move_into_place(path, hidden(path, "ready"))


def finish_publishing(path: Path) -> None:
    """Completes moves into place that a kill interrupted; does nothing where none was.

    Raises:
        CheckpointError: They are going on now; or something else came into the place of a file.
    """
    ready = hidden(path, "ready")
    if ready.is_dir():
        with Lock(ready) as lock:
            lock.take()
            _move_into_place(path, ready)


def _move_into_place(path: Path, ready: Path) -> None:
    for entry in sorted(ready.iterdir()):
        target = path.with_name(entry.name)
        refuse_existing(target)
        os.rename(entry, target)
    sync_directory(path.parent)
    ready.rmdir()
