"""Says what a process finds at its start: `python -m launcher.rank tests/preloaded/facts.py FILE END [WORD ...]`.

END is "exit N", "raise", or "wait": then it ends with the number of the first signal that it hears of.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path


def _limits() -> dict[str, tuple[int, int]]:
    return {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}


def _files() -> list[tuple[str, str]]:
    """Returns (number, path) of the open files that have one."""
    found = [(number, os.path.realpath(f"/proc/self/fd/{number}")) for number in os.listdir("/proc/self/fd")]
    return sorted((number, path) for number, path in found if os.path.isfile(path))


def main() -> None:
    """Writes the facts, as JSON, and ends as it is told."""
    mask = os.umask(0)
    os.umask(mask)
    facts = {
        "process": os.getpid(),
        "torch": "torch" in sys.modules,
        "words": sys.argv[3:],
        "path": sys.path,
        "variables": dict(os.environ),
        "folder": os.getcwd(),
        "files": _files(),
        "input": sys.stdin.read(),
        "ignored": [int(number) for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN],
        "limits": _limits(),
        "umask": mask,
    }
    print("said")
    print("an error", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: sys.exit(number))
    Path(sys.argv[1]).write_text(json.dumps(facts))
    word, _, code = sys.argv[2].partition(" ")
    if word == "raise":
        raise RuntimeError("on purpose")
    while word == "wait":
        time.sleep(0.1)
    sys.exit(int(code or 0))


if __name__ == "__main__":
    main()
