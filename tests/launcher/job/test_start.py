"""What a start costs: nothing heavy is imported by the launcher or a rank, and the benchmark of it works."""

import os
import subprocess
import sys

import pytest

from launcher.env import without_world
from tests.ranks import ROOT

# Each costs 2 to 80 ms of every start, in the launcher itself or in each rank before its program.
HEAVY = {"logging", "concurrent.futures", "asyncio", "email", "difflib", "zipfile", "multiprocessing", "http", "xml"}
HEAVY |= {"torch", "numpy", "mpi4py", "yaml", "launcher.preflight", "launcher.meeting.tcp", "launcher.script"}
OF_THE_LAUNCHER = {
    "argparse",
    "tempfile",
    "launcher.restart",
    "launcher.supervise",
    "launcher.output.console",
}


def imported_by(module: str) -> set[str]:
    """Returns what a new interpreter loads for a module, less what it loads without."""
    code = "import sys; before = set(sys.modules); import {}; print(' '.join(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code.format(module)], cwd=ROOT, capture_output=True, check=True)
    return set(done.stdout.decode().split())


def test_a_rank_and_its_guard_import_nothing_heavy():
    found = imported_by("launcher.rank")
    assert "launcher.guard" in found and not found & (HEAVY | OF_THE_LAUNCHER)


def test_the_launcher_imports_nothing_heavy():
    found = imported_by("launcher.__main__")
    assert OF_THE_LAUNCHER <= found and not found & HEAVY


@pytest.mark.mpi
@pytest.mark.full
def test_the_benchmark_compares_starts():
    command = [sys.executable, "benchmarks/launching/launcher_start.py", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, env=without_world(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if " s |" in line]
    assert [row[0] for row in rows] == ["mpi4py", "torch"]
    assert all(float(row[5].split()[0]) > 0.5 * float(row[4].split()[0]) > 0 for row in rows)  # both were counted
