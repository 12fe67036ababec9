"""Measured choices on disk: one small JSON file per key, so that runs at the same time lose nothing of each other's.

A file that cannot be read, or is not what its name says, counts as missing and is reported in one line.
"""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("swin_moe")
FORMAT = "swin_moe tuned exchange 1"


def default_directory() -> Path:
    """Returns swin_moe/tuned in the user's cache directory: XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "swin_moe" / "tuned"


def path_of(directory: Path, key: dict[str, Any]) -> Path:
    """Returns the file of a key, named by its digest."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return directory / f"{digest[:32]}.json"


def read(directory: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what was stored for the key, or None."""
    path = path_of(directory, key)
    try:
        stored = json.loads(path.read_text())
        if stored["format"] == FORMAT and stored["key"] == key and isinstance(stored["value"], dict):
            return stored["value"]
        problem = "it was written for something else"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    LOGGER.warning("model.moe.tune: %s is ignored and measured anew: %s", path, problem)
    return None


def write(directory: Path, key: dict[str, Any], value: dict[str, Any]) -> None:
    """Stores the value; readers see all of it or nothing. A directory that cannot be written to is reported only."""
    path = path_of(directory, key)
    text = json.dumps({"format": FORMAT, "key": key, "value": value}, indent=1, sort_keys=True) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, prefix=".new-", delete=False) as file:
            file.write(text)
        try:
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
    except OSError as error:
        LOGGER.warning("model.moe.tune: the choice could not be kept in %s: %s", directory, error)
