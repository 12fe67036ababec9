"""What the launcher costs at the start of a job: from the command to the first collective, against bare mpirun.

    python benchmarks/launching/launcher_start.py [--ranks 2] [--rounds 10] [--mpi mpirun]

The program is the same: it imports mpi4py (and torch, in the second row) and has all ranks meet in one all-reduce. Runs
alternate, bare and launched. Wall seconds end at the collective; CPU seconds are those of the whole job, end included,
of every process: on a busy machine only they can be compared. Modules are compiled before, by a start of each that is
not counted, as an installation's are: without (PYTHONDONTWRITEBYTECODE) every start compiles the launcher three times.

Prints a markdown table of medians.
"""

import argparse
import contextlib
import ctypes
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launcher.command import find_mpi  # noqa: E402
from launcher.env import without_world  # noqa: E402

PROGRAM = """
import sys, time
from pathlib import Path
if sys.argv[2] == "torch":
    import torch
from mpi4py import MPI
assert MPI.COMM_WORLD.allreduce(1) == MPI.COMM_WORLD.size
if MPI.COMM_WORLD.rank == 0:
    Path(sys.argv[1]).write_text(repr(time.time()))
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of a start."""

    wall: float
    cpu: float


_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def run_all(command: list[str], stdout: int | None = None) -> float:
    """Returns the CPU seconds of a command and of all that it started, also of what outlived its own parent."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    environ = without_world(os.environ) | {"PYTHONPATH": str(ROOT)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environ, cwd=ROOT, stdout=stdout, check=True)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start(command: list[str], program: Path, imports: str) -> Cost:
    """Returns what a job costs that runs the program."""
    said = program.with_name("time")
    said.unlink(missing_ok=True)
    began = time.time()
    cpu = run_all([*command, str(program), str(said), imports])
    return Cost(float(said.read_text()) - began, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--mpi", default="", help="mpirun of a system")
    options = parser.parse_args()
    mpi = find_mpi(options.mpi)
    ours = [sys.executable, "-m", "launcher", "-n", str(options.ranks), "--quiet"]
    ours += ["--mpi", options.mpi] if options.mpi else []
    bare = [mpi.mpirun, "-n", str(options.ranks), sys.executable]
    print(f"{options.ranks} ranks, {mpi.flavor}, medians of {options.rounds}\n")
    print("| program imports | bare wall | launched wall | ratio | bare CPU | launched CPU | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_text(PROGRAM)
        for imports in ("mpi4py", "torch"):
            for command in (bare, [*ours, "--"]):
                start(command, program, imports)
            costs = [
                (start(bare, program, imports), start([*ours, "--"], program, imports)) for _ in range(options.rounds)
            ]
            cells = []
            for name in ("wall", "cpu"):
                one, other = (statistics.median(getattr(pair[number], name) for pair in costs) for number in (0, 1))
                cells += [f"{one:.3f} s", f"{other:.3f} s", f"{other / one:.2f}"]
            print(f"| {imports} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
