"""What it costs that the launcher takes what ranks write: four ranks that write 25 MB each, against bare mpirun.

    python benchmarks/launching/launcher_output.py [--ranks 4] [--megabytes 25] [--rounds 5] [--rate LINES]

Runs alternate. `write` hands 60 KB of lines of 60 bytes to the system at once, `print` is Python's print of the same
lines, which waits in a buffer under bare mpirun and is written line by line under the launcher. Every run is read to
its end and counted: a line that is missing or torn apart is an error. CPU seconds are those of every process; of both,
what a job costs that writes nothing is taken away.

With --rate every rank prints so many lines a second instead of all that it can.

Prints a markdown table of medians.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launcher_start import run_all  # noqa: E402

from launcher.command import find_mpi  # noqa: E402

PROGRAM = """
import os, sys, time
from mpi4py import MPI
rank, kind, lines = MPI.COMM_WORLD.rank, sys.argv[1], int(sys.argv[2])
MPI.COMM_WORLD.Barrier()
if kind.isdigit():
    began, done = time.monotonic(), 0
    while done < lines:
        due = min(lines, int((time.monotonic() - began) * int(kind)))
        for number in range(done, due):
            print(f"rank {rank} step {number:7d} loss 2.3456 lr 1.00e-04 memory 1234 M", flush=True)
        done = max(done, due)
        time.sleep(0.01)
elif kind == "print":
    for number in range(lines):
        print(f"rank {rank} step {number:7d} loss 2.3456 lr 1.00e-04 memory 1234 M")
else:
    line = "rank %d step %7d loss 2.3456 lr 1.00e-04 memory 1234 M\\n"
    for start in range(0, lines, 1000):
        text = "".join(line % (rank, number) for number in range(start, start + 1000))
        while text:
            text = text[os.write(1, text.encode()):]
"""
LINE = re.compile(rb"(?:\[\d+\] )?rank (\d+) step  *(\d+) loss 2\.3456 lr 1\.00e-04 memory 1234 M")


def run(command: list[str], kind: str, lines: int, ranks: int, *, check: bool = True) -> tuple[float, float]:
    """Returns (wall, CPU) seconds of a job. Raises RuntimeError for output that is not whole."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        cpu = run_all([*command, kind, str(lines)], out.fileno())
        wall = time.perf_counter() - began
        out.seek(0)
        text = out.read()
    if check:
        found = Counter(match[1] for line in text.split(b"\n") if (match := LINE.fullmatch(line)))
        if found != {b"%d" % rank: lines for rank in range(ranks)} or text.count(b"\n") != ranks * lines:
            raise RuntimeError(f"not whole: {dict(found)} of {lines} lines of each rank")
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=int, default=0, metavar="LINES", help="of each rank in a second")
    options = parser.parse_args()
    lines = options.megabytes * 1_000_000 // 60 // 1000 * 1000
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_text(PROGRAM)
        ours = [sys.executable, "-m", "launcher", "-n", str(options.ranks), "--quiet"]
        commands = {
            "bare mpirun": [find_mpi("").mpirun, "-n", str(options.ranks), sys.executable, str(program)],
            "launcher": [*ours, "--", str(program)],
            "launcher --log-dir": [*ours, "--log-dir", f"{folder}/logs", "--", str(program)],
        }
        print(f"{options.ranks} ranks, {options.megabytes} MB each, medians of {options.rounds}\n")
        print("| output by | how | wall | CPU | lines whole |\n|---|---|---|---|---|")
        for kind in [str(options.rate)] if options.rate else ["write", "print"]:
            costs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
            for _ in range(options.rounds):
                for name, command in commands.items():
                    empty, idle = run(command, kind, 0, options.ranks, check=False)
                    wall, cpu = run(command, kind, lines, options.ranks, check=name != "bare mpirun")
                    costs[name].append((wall - empty, cpu - idle))
            for name, pairs in costs.items():
                what = f"{kind} lines a second" if options.rate else kind
                wall, cpu = (statistics.median(pair[number] for pair in pairs) for number in (0, 1))
                whole = "not looked at" if name == "bare mpirun" else "all"
                print(f"| {what} | {name} | {wall:.2f} s | {cpu:.2f} s | {whole} |", flush=True)


if __name__ == "__main__":
    main()
