"""What an interrupted run had done: digests of the blocks it wrote, so that the same command continues it.

    <dir>/.<name>.journal/job.json      sealed: the fingerprint of the job
    <dir>/.<name>.journal/rank-0.log    one line per unit of work: its own digest, then JSON

Nothing in it is trusted: a line that does not match its digest is skipped, and blocks that it calls done are read back
and compared with the digests it has for them. So a line may reach the disk before the data, and none is ever synced.
"""

import json
import os
from pathlib import Path

import xxhash

from checkpoint_tools.files.publish import hidden, remove_tree
from swin_moe.checkpoint.errors import CorruptionError
from swin_moe.checkpoint.sealed_json import read_sealed, seal, write_durably

Done = dict[tuple[str, int, int], str]  # (tensor, chunk, block) -> digest


class Journal:
    """The journal of the destination `path`."""

    def __init__(self, path: Path) -> None:
        self.directory = hidden(path, "journal")

    def job(self) -> str:
        """Returns the fingerprint of the job it belongs to; "" without a valid one."""
        try:
            return str(read_sealed(self.directory / "job.json").get("job", ""))
        except CorruptionError:
            return ""

    def begin(self, job: str) -> None:
        """Starts an empty journal; the job becomes valid last."""
        self.remove()
        self.directory.mkdir()
        write_durably(self.directory / "job.json", seal({"job": job}))

    def read(self) -> Done:
        """Returns what the runs so far had done, on any number of ranks."""
        done: Done = {}
        for path in sorted(self.directory.glob("rank-*.log")):
            for line in path.read_bytes().split(b"\n"):
                found, _, text = line.partition(b" ")
                if found.decode("ascii", "replace") == xxhash.xxh3_64_hexdigest(text):
                    name, chunk, first, digests = json.loads(text)
                    done.update({(name, chunk, first + i): digest for i, digest in enumerate(digests)})
        return done

    def writer(self, rank: int) -> "JournalWriter":
        """Returns what a rank notes its work with."""
        return JournalWriter(self.directory / f"rank-{rank}.log")

    def remove(self) -> None:
        """Deletes the journal, if there is one."""
        if not self.directory.is_symlink():
            for log in self.directory.glob("rank-*.log"):
                log.unlink()
        remove_tree(self.directory)  # the job last: until then a finished run is known to be finished


class JournalWriter:
    """Appends to the journal of one rank."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._start = b"\n"  # ends a line that a kill cut off

    def note(self, name: str, chunk: int, first: int, digests: list[str]) -> None:
        """Notes that the blocks of a chunk from `first` on are written, with their digests."""
        text = json.dumps([name, chunk, first, digests], separators=(",", ":")).encode("ascii")
        line = self._start + xxhash.xxh3_64_hexdigest(text).encode("ascii") + b" " + text + b"\n"
        self._start = b""
        try:
            os.write(self._fd, line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Closes the file; what is lost with the machine is done again."""
        os.close(self._fd)
