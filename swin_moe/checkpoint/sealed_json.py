"""Canonical JSON files that end with the digest of everything before it, so that any flipped bit shows."""

import json
import math
import os
from pathlib import Path

import xxhash

from swin_moe.checkpoint.errors import CorruptionError

# Sorts behind every other top-level key, so the seal is a tail of fixed length and a reader needs no canonical writer.
SEAL_KEY = "xxh3_128"
MAX_BYTES = 1 << 30


def canonical_json(content: dict) -> bytes:
    """Returns the one encoding of `content`: sorted keys, no spaces, ASCII."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def check_json(value: object, where: str) -> None:
    """Raises ValueError, naming the place, unless `value` is plain JSON that reads back equal."""
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise ValueError(f"{where} must have only string keys, got {key!r}")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_json(item, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value!r}")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise ValueError(f"{where} must be a plain JSON value, got {type(value).__name__} {value!r}")


def seal(content: dict) -> bytes:
    """Returns the bytes of a sealed file: canonical JSON whose last entry is the digest of the bytes before it."""
    assert content and max(content) < SEAL_KEY
    body = canonical_json(content)[:-1]
    return body + _tail(body)


def _tail(body: bytes) -> bytes:
    return f',"{SEAL_KEY}":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode("ascii")


_TAIL_BYTES = len(_tail(b""))


def check_seal(data: bytes, path: Path) -> bytes:
    """Returns what a sealed file holds before its seal: a JSON object without its last bracket.

    Raises:
        CorruptionError: Its digest does not match; names `path`.
    """
    body = data[:-_TAIL_BYTES]
    if len(data) <= _TAIL_BYTES or data[-_TAIL_BYTES:] != _tail(body):
        raise CorruptionError(f"{path}: is cut off or changed, its digest does not match its content")
    return body


def unseal(data: bytes, path: Path) -> dict:
    """Returns the content of a sealed file, without the seal.

    Raises:
        CorruptionError: Its digest does not match, or it is no JSON object; names `path`.
    """
    check_seal(data, path)
    try:
        content = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CorruptionError(f"{path}: must hold one JSON object")
    content.pop(SEAL_KEY, None)
    return content


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not allowed")


def read_sealed(path: Path) -> dict:
    """Returns the content of the sealed file at `path`.

    Raises:
        CorruptionError: It is missing, absurdly large, or changed; names `path`.
    """
    return unseal(_read(path), path)


def read_seal(path: Path) -> bytes:
    """Returns what check_seal does of the file at `path`: for who needs a part of a large one.

    Raises:
        CorruptionError: It is missing, absurdly large, or changed; names `path`.
    """
    return check_seal(_read(path), path)


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise CorruptionError(f"{path}: is missing")
        if path.stat().st_size > MAX_BYTES:
            raise CorruptionError(f"{path}: is larger than the {MAX_BYTES} bytes allowed")
        return path.read_bytes()
    except OSError as error:
        raise CorruptionError(f"{path}: cannot be read ({error.strerror})") from error


def write_durably(path: Path, data: bytes) -> None:
    """Puts `data` at `path` so that a crash leaves the old file or the new one; the directory is synced too."""
    temporary = path.with_name(f".{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view, offset = memoryview(data), 0
        while offset < len(view):
            offset += os.pwrite(fd, view[offset:], offset)
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes renames and new files in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
