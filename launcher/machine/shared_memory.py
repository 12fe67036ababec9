"""Shared memory that killed ranks leave behind, on which their MPI would trip or the host run out of memory.

What a rank held is removed once nobody has it mapped. Beside that, MPICH 5.0 names a segment after the job and the
step: a job that Slurm puts back into its queue has the same of both, so on the same node its ranks would take the old
segment for their own and fail in MPI_Init ("Message truncated").
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path("/dev/shm")
_YOUNG_SECONDS = 5.0  # a segment is mapped at once after it was made


def held(maps: Path = Path("/proc/self/maps"), folder: Path = FOLDER) -> list[str]:
    """Returns the names of the files under /dev/shm that this process has mapped."""
    prefix = f"{folder}/"
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    paths = {line[line.index(prefix) :] for line in lines if prefix in line}
    return sorted(path.removeprefix(prefix) for path in paths if not path.endswith(" (deleted)"))


def remove(names: Sequence[str], folder: Path = FOLDER, processes: Path = Path("/proc")) -> list[str]:
    """Returns those of the files that are this user's and that no process has mapped, having removed them."""
    found = [name for name in names if _owner_of(folder / name) == os.geteuid()]
    used = _mapped(processes, f"{folder}/") if found else ""
    gone = [name for name in found if f"{folder}/{name}\n" not in used]
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    return gone


def remove_abandoned(folder: Path = FOLDER, processes: Path = Path("/proc")) -> list[Path]:
    """Returns the segments of this user's that no process had mapped any more, having removed them."""
    try:
        found = [path for path in folder.glob("mpich_shm_*") if _is_old_and_ours(path)]
        used = _mapped(processes, "mpich_shm_") if found else ""
    except OSError:
        return []
    gone = [path for path in found if path.name not in used]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def _is_old_and_ours(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and time.time() - status.st_mtime > _YOUNG_SECONDS


def _owner_of(path: Path) -> int:
    try:
        return path.stat().st_uid
    except OSError:
        return -1


def _mapped(processes: Path, mark: str) -> str:
    """Returns the lines with the mark of what all processes have mapped, as far as this user may see."""
    texts = []
    for path in processes.glob("[0-9]*/maps"):
        try:
            texts.append("".join(line for line in path.read_text().splitlines(True) if mark in line))
        except OSError:
            continue
    return "".join(texts)
