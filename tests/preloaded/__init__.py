"""Processes of tests that begin with torch imported: forks of a server, which imports it once for all of them.

Importing torch takes a rank longer than most of what it computes here. A process that `environment` starts is Python
all the same: client/sitecustomize.py, which it imports before anything else, hands its files, variables and limits to
the server, whose fork runs the module in its place; it waits, hands signals on and ends as the fork does. Not for tests
of what nobody can hand on (kill -9, stops, terminals), nor for those that ask what is imported.
"""

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "TESTS_PRELOADED"  # the socket of the server


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns `environ` with what makes `python -m launcher.rank` and `-m swin_moe...` in it forks of the server."""
    path = os.pathsep.join(filter(None, (str(ROOT / "tests/preloaded/client"), environ.get("PYTHONPATH", ""))))
    return {**environ, "PYTHONPATH": path, ADDRESS: _address()}


@functools.cache
def _address() -> str:
    """Returns where the server of this process listens; it is started by the first call and ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="preloaded-")
    address = str(Path(folder.name, "socket"))
    command = [sys.executable, "-m", "tests.preloaded.server", address]
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", ADDRESS)}
    # One thread: what forks may have no others, and every process that asks for another number runs by itself.
    environ |= {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )

    def end() -> None:
        server.communicate()  # which closes its input
        folder.cleanup()

    atexit.register(end)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n", f"{' '.join(command)} did not start"
    return address
