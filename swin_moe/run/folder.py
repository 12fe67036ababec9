"""One job per run folder: a lock in a file that names who holds it."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from swin_moe.checkpoint.directory import clean_leftovers
from swin_moe.checkpoint.errors import naming

NAME = "run.lock"
# What file systems without locks answer; a run there goes on unguarded, as it always did.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """The lock of a run folder, a POSIX record lock: the kernel drops it with the process, however that ends, and the
    loader processes that it forked do not keep it. On a shared file system it holds between hosts."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self._file: int | None = None

    def take(self) -> None:
        """Takes the lock and writes who holds it; what a dead process left is taken over.

        Raises:
            ValueError: Another process holds it; the message says which, on which host.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
                os.close(file)
                if error.errno in _NO_LOCKS:
                    return
                raise ValueError(
                    f"{self.path.parent} is in use by {holder or 'another process'}; wait for that job or stop it, "
                    "or choose another run.name"
                ) from error
            if self._is_current(file):
                self._file = file
            else:
                os.close(file)
        with naming(self.path):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def enter(self) -> None:
        """Takes the lock, and removes the halves of checkpoints that a job which was killed left in the folder.

        Raises:
            ValueError: As `take`.
        """
        self.take()
        checkpoints = self.path.parent / "checkpoints"
        if checkpoints.is_dir():
            with suppress(OSError):  # the next save tries again, and says what is in its way
                clean_leftovers(checkpoints)

    def _is_current(self, file: int) -> bool:
        """Returns whether the path still names this file: its last holder may have removed it in the meantime."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Removes the file and drops the lock, in this order, so that nobody finds a file that is about to go."""
        if self._file is None:
            return
        if self._is_current(self._file):
            self.path.unlink()
        os.close(self._file)
        self._file = None


@contextmanager
def holding(lock: FolderLock) -> Iterator[None]:
    """Releases a lock at the end of the block, which has taken it or not."""
    try:
        yield
    finally:
        lock.release()
