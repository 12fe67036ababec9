"""Whether the kernel killed a process of this one's control group for lack of memory."""

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def kills(root: Path = _ROOT, own: Path = Path("/proc/self/cgroup")) -> int:
    """Returns how many processes of the control group were killed so far; 0 where the kernel does not say.

    Source: Linux Documentation/admin-guide/cgroup-v2.rst (memory.events: oom_kill) and cgroup-v1/memory.rst
    (memory.oom_control: oom_kill). Inside a container the group's own path may not be there: then its root is.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folders, name = [root / path.lstrip("/"), root], "memory.events"
        elif "memory" in controllers.split(","):
            folders, name = [root / "memory" / path.lstrip("/"), root / "memory"], "memory.oom_control"
        else:
            continue
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        count = None if file is None else _count(file)
        if count is not None:
            return count
    return 0


def _count(file: Path) -> int | None:
    try:
        words = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return None
    return next((int(pair[1]) for pair in words if len(pair) == 2 and pair[0] == "oom_kill"), None)
