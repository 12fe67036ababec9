"""Shared memory that killed ranks of MPICH left behind.

MPICH 5.0 names a segment after the job and the step. A job that Slurm puts back into its queue has the same of both, so
on the same node its ranks would take the old segment for their own and fail in MPI_Init ("Message truncated").
"""

import os
import time
from pathlib import Path

_YOUNG_SECONDS = 5.0  # a segment is mapped at once after it was made


def remove_abandoned(folder: Path = Path("/dev/shm"), processes: Path = Path("/proc")) -> list[Path]:
    """Returns the segments of this user's that no process had mapped any more, having removed them."""
    try:
        found = [path for path in folder.glob("mpich_shm_*") if _is_old_and_ours(path)]
        used = _mapped(processes) if found else ""
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


def _mapped(processes: Path) -> str:
    """Returns what all processes have mapped, as far as this user may see."""
    texts = []
    for path in processes.glob("[0-9]*/maps"):
        try:
            texts.append("".join(line for line in path.read_text().splitlines(True) if "mpich_shm_" in line))
        except OSError:
            continue
    return "".join(texts)
