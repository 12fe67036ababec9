"""The errors of checkpoints. Each message is one sentence that names the file, and the tensor where there is one."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read."""


class CorruptionError(CheckpointError):
    """A checkpoint on disk is incomplete or not what was written; an older one may be used instead."""


class RankMemoryError(CheckpointError, MemoryError):
    """A rank got no memory for its part of what all ranks do together; says which rank."""


def describe(error: BaseException) -> str:
    """Returns an error as one sentence; operating-system errors name their path."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ValueError | OSError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def out_of_memory(error: BaseException) -> str | None:
    """Returns "out of memory" and how much more was needed, where Python, numpy or torch got none; else None."""
    text = " ".join(str(error).split())
    if isinstance(error, RankMemoryError):
        return text
    names = {kind.__name__ for kind in type(error).__mro__}  # torch is not imported for its name
    torchs = ("can't allocate memory", "Storage size calculation overflowed")  # the second: more than 2^63 bytes
    if not names & {"MemoryError", "OutOfMemoryError"} and not any(words in text for words in torchs):
        return None
    asked = re.search(r"allocate ([\d.]+ ?(?:[KMGTPE]i?B|bytes))", text)
    return f"out of memory{f' ({asked[1]} more were needed)' if asked else ''}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError that does not say of which file it is, as a full disk's, this path."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a sentence of ours
            raise
        raise OSError(error.errno, error.strerror, os.fsdecode(error.filename or str(path))) from error
