"""Released files of weights on disk: fetched once, continued where a connection broke, kept with their digest.

A file lies in the folder whole or not at all; what has come of it so far is NAME.part. Processes that want the same
file at once wait for the first (flock), so ranks of one host may all ask.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from swin_moe.choice_cache import default_directory
from swin_moe.config.shipped.released import Released

FOLDER = "SWIN_MOE_WEIGHTS"  # environment: the folder of weights
MIRROR = "SWIN_MOE_MIRROR"  # environment: an address that has the files by their names, asked instead of theirs
_SILENT_SECONDS = 60.0  # without a byte
_TRIES = 5  # in a row that bring nothing
_READ = 1 << 20  # bytes
Show = Callable[[int, int], None]  # (bytes that are there, bytes of the whole file or 0 = unknown)


def default_folder() -> Path:
    """Returns $SWIN_MOE_WEIGHTS, or swin_moe/weights in the user's cache directory."""
    given = os.environ.get(FOLDER, "")
    return Path(given).expanduser() if given else default_directory().parent / "weights"


def place(row: Released, folder: Path | None = None) -> Path:
    """Returns where the file of a row lies, or would."""
    return (folder or default_folder()) / row.file


def fetch(row: Released, folder: Path | None = None, *, show: Show | None = None, mirror: str | None = None) -> Path:
    """Returns the path of the weights as `checkpoint.init` takes it, having fetched what is not there.

    Args:
        folder: None = default_folder().
        show: Told of progress.
        mirror: An address that has the files by their names; None = $SWIN_MOE_MIRROR, "" = the released addresses.

    Raises:
        ValueError: It cannot be fetched; says where to put it by hand.
    """
    path = place(row, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.is_file():
                _download(row, path, os.environ.get(MIRROR, "") if mirror is None else mirror, show)
            return _unpack(path) if row.is_archive else path
    except (OSError, HTTPException, zipfile.BadZipFile) as error:
        raise ValueError(_advice(row, path, error)) from error


def check(row: Released, folder: Path | None = None) -> str:
    """Returns the SHA-256 of a file that lies there, which is the one it had when it came, where it was fetched.

    Raises:
        ValueError: It is not there, or has changed since.
    """
    path = place(row, folder)
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    known = Record.read(path)
    if known is not None and known.sha256 != found:
        raise ValueError(f"{path} has changed since it was fetched (SHA-256 {found}, not {known.sha256}); remove it")
    return found


@dataclass(frozen=True)
class Record:
    """What is known of a file that was fetched; NAME.json beside it."""

    address: str
    bytes: int
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """Returns the record of a file, None of one that was put there by hand."""
        try:
            return cls(**json.loads(_beside(path, ".json").read_text()))
        except (OSError, ValueError, TypeError):
            return None


def _download(row: Released, path: Path, mirror: str, show: Show | None) -> None:
    """Fetches a file. Raises OSError or HTTPException where it does not come whole."""
    if row.by_hand and not mirror:
        raise OSError(0, "its host gives it to browsers only")
    address = f"{mirror.rstrip('/')}/{row.file}" if mirror else row.address
    part, fruitless, whole = _beside(path, ".part"), 0, 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            whole = _go_on(address, part, show)
            break
        except urllib.error.HTTPError:  # refused: asking again does not help
            raise
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.filename:  # our own disk
                raise
            after = part.stat().st_size if part.exists() else 0
            fruitless = 0 if after > before else fruitless + 1
            if fruitless >= _TRIES:
                raise
            time.sleep(min(2.0**fruitless, 30.0) * 0.1)
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _beside(path, ".json").write_text(json.dumps(asdict(Record(address, whole, digest))))
    part.replace(path)
    _beside(path, ".tag").unlink(missing_ok=True)


def _go_on(address: str, part: Path, show: Show | None) -> int:
    """Fetches what is missing of a file; returns its bytes.

    Raises:
        OSError, HTTPException: The connection broke before the end, or the disk is full.
    """
    tag = _beside(part.with_suffix(""), ".tag")
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"User-Agent": "swin_moe", "Accept-Encoding": "identity"})
    if there and (known := tag.read_text() if tag.exists() else ""):
        request.add_header("Range", f"bytes={there}-")
        request.add_header("If-Range", known)  # another file of that name by now: from the beginning
    else:
        there = 0
    try:
        answer = urllib.request.urlopen(request, timeout=_SILENT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # there is no more of it
            raise
        return there
    with answer:
        there = there if answer.status == 206 else 0
        tag.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        length = answer.headers.get("Content-Length")
        whole = there + int(length) if length else 0
        with open(part, "r+b" if there else "wb") as file:
            file.seek(there)
            there = _copy(answer, file, part, there, whole, show)
    if whole and there < whole:
        raise ConnectionError(f"the connection ended after {there} of {whole} bytes")
    return there


def _copy(answer: Any, file: IO[bytes], part: Path, there: int, whole: int, show: Show | None) -> int:
    while data := answer.read(_READ):
        try:
            file.write(data)
            file.flush()
        except OSError as error:  # says that it is the disk
            raise OSError(error.errno, error.strerror, str(part)) from error
        there += len(data)
        if show is not None:
            show(there, whole)
    return there


def _unpack(path: Path) -> Path:
    """Returns the path of the weights in an archive, unpacked beside it: of rank files without their .rank0."""
    folder = path.with_suffix("")
    if not folder.is_dir():
        draft = _beside(folder, ".unpacking")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(draft)  # keeps what it writes below draft, whatever names the archive has
        draft.replace(folder)
    found = sorted(file for file in folder.rglob(f"{folder.name}.pth*") if file.is_file())
    if not found:
        raise OSError(0, f"the archive {path} holds no {folder.name}.pth")
    return found[0].with_name(found[0].name.removesuffix(".rank0"))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with open(_beside(path, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _advice(row: Released, path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error) or type(error).__name__
    if isinstance(error, urllib.error.HTTPError):
        reason = f"{error.code} {reason}"
    elif isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {reason}"
    return (
        f"weights {row.name}: {row.address} cannot be fetched ({reason}); fetch it elsewhere and put it at {path}, or "
        f"set {FOLDER} to a folder that has {row.file}, or {MIRROR} to an address that does"
    )


class Progress:
    """Shows how much of a file is there: one line on a terminal, else a line every tenth of it."""

    def __init__(self, name: str, stream: IO[str] | None = None) -> None:
        self._name, self._stream = name, sys.stderr if stream is None else stream
        self._shown, self._began = -1, time.monotonic()
        self._first: int | None = None  # bytes that were there before

    def __call__(self, there: int, whole: int) -> None:
        """Shows it, where it changed by a tenth, or on a terminal by a hundredth."""
        self._first = there if self._first is None else self._first
        terminal = self._stream.isatty()
        steps = 100 if terminal else 10
        now = there * steps // whole if whole else there >> 26
        if now == self._shown:
            return
        self._shown = now
        speed = (there - self._first) / max(1e-3, time.monotonic() - self._began) / 1e6
        share = f"{there / 1e6:.0f} of {whole / 1e6:.0f} MB" if whole else f"{there / 1e6:.0f} MB"
        text = f"{self._name}: {share}, {speed:.1f} MB/s"
        end = "\n" if not terminal or there == whole else ""
        self._stream.write(f"\r\033[K{text}{end}" if terminal else f"{text}\n")
        self._stream.flush()
