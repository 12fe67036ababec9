"""Measured choices on disk: one small JSON file per key, so that runs at the same time lose nothing of each other's.

A file that cannot be read, or is not what its name says, counts as missing and is reported in one line. Messages start
with the option that was being chosen.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("swin_moe")
FORMAT = "swin_moe measured choice 1"


def default_directory() -> Path:
    """Returns swin_moe/tuned in the user's cache directory: XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "swin_moe" / "tuned"


def path_of(directory: Path, key: dict[str, Any]) -> Path:
    """Returns the file of a key, named by its digest."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return directory / f"{digest[:32]}.json"


def read(directory: Path, key: dict[str, Any], *, option: str) -> dict[str, Any] | None:
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
    LOGGER.warning("%s: %s is ignored and measured anew: %s", option, path, problem)
    return None


def write(directory: Path, key: dict[str, Any], value: dict[str, Any], *, option: str, replace: bool = True) -> None:
    """Stores the value; readers see all of it or nothing. A directory that cannot be written to is reported only.

    replace: False keeps a file that is there already, so that of processes that measure at the same time the first
        decides for all: read again after writing.
    """
    path = path_of(directory, key)
    text = json.dumps({"format": FORMAT, "key": key, "value": value}, indent=1, sort_keys=True) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, prefix=".new-", delete=False) as file:
            file.write(text)
        try:
            if replace:
                os.replace(file.name, path)
            else:
                _link_or_keep(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
    except OSError as error:
        LOGGER.warning("%s: the choice could not be kept in %s: %s", option, directory, error)


def _link_or_keep(new: str, path: Path) -> None:
    """Gives the file its name unless the name is taken, in one step; the new name goes either way."""
    try:
        os.link(new, path)
    except FileExistsError:
        pass
    os.unlink(new)


def cpu_name() -> str:
    """Returns the processor's model name as the kernel reports it, or the machine type."""
    return cpu_field("model name") or platform.processor() or platform.machine()


def cpu_field(name: str) -> str:
    """Returns what the kernel reports of the first processor under a name; "" where it reports nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
