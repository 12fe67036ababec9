"""Runs cells of the fault matrix (fault_cells.py) with real processes, and measures what they come to.

`python -m tests.launcher.failure.fault_matrix --table` runs all of them and prints the table of docs/launcher.md; names
after it choose: `--only "SIGKILL of mpirun" saving openmpi`.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher import watch
from launcher.env import without_world
from launcher.failure import kinds
from tests.launcher.failure import fault_program
from tests.launcher.failure.fault_cells import FAULTS, STALL_SECONDS, STARTERS, Cell, Result, cells, problems, table
from tests.launcher.failure.fault_program import PHASES, culprit_of
from tests.launcher.schedulers.slurm_cluster import SlurmCluster, why_not
from tests.ranks import ROOT

_START_SECONDS, _PATIENCE = 300.0, 60.0  # until the fault, on a busy machine; until a cell that fails is given up
_SURVIVAL_SECONDS = 3.0  # after which a job has not noticed a fault
_DISK_BYTES = 256 << 10  # three checkpoints, and some of the one at which the fault is
_MEMORY_BYTES = {"light": 256 << 20, "training": 1 << 30}  # of the rank's group; it takes 1.5 GiB


def run_cell(cell: Cell, folder: Path, cluster: SlurmCluster | None, *options: str) -> Result:
    """Returns what a cell came to, in an empty folder.

    Args:
        cluster: Needed for srun.
        options: Of the launcher, beside those of every cell.

    Raises:
        RuntimeError: The job did not come to the fault.
    """
    (folder / "checkpoints").mkdir()
    with _surroundings(cell, folder) as extra:
        fault_program.write_checkpoint(folder / "checkpoints" / "checkpoint-0", 0)
        process = _start(cell, folder, cluster, extra, options)
        try:
            began, whole = _strike(cell, folder, process)
            output, ended = _end_of(cell, folder, process, began)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            left = _end_what_is_left(folder)
        lost = [path.name for path in whole if not path.exists() or not _verifies(path)]
        files = [
            name for rank in (0, 1) for name in _words(folder / f"at-{rank}")[1:] if Path("/dev/shm", name).exists()
        ]
    return Result(ended - began, process.returncode, output, left, lost, files)


@contextmanager
def _surroundings(cell: Cell, folder: Path) -> Iterator[dict[str, str]]:
    """Yields variables of the ranks, having made a small disk or a control group where the fault needs one."""
    if cell.fault.name == "disk full":
        size = f"size={_DISK_BYTES}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder / "checkpoints")], check=True)
        try:
            yield {}
        finally:
            subprocess.run(["umount", str(folder / "checkpoints")], check=True)
    elif cell.fault.name == "out of memory":
        group = memory_group(_MEMORY_BYTES[cell.program])
        assert group is not None
        try:
            yield {fault_program.GROUP: str(group)}
        finally:
            _remove_group(group)
    else:
        yield {}


def memory_group(limit_bytes: int) -> Path | None:
    """Returns a new control group below this process's with this limit, None where none can be made.

    Version 1 of control groups (memory.limit_in_bytes), or version 2 where the memory controller is given to children.
    """
    rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = [("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes") for _, name, path in rows if name == "memory"]
    places += [("/sys/fs/cgroup", path, "memory.max") for _, name, path in rows if name == ""]
    for root, path, limit in places:
        group = Path(root, path.lstrip("/"), f"fault-matrix-{os.getpid()}-{os.urandom(2).hex()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(limit_bytes))
            return group
        except OSError:
            group.rmdir()
    return None


def _remove_group(group: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return group.rmdir()
        except OSError:  # a process that is ending is still in it
            time.sleep(0.1)


def why_not_here(cell: Cell) -> str:
    """Returns why a cell cannot run on this machine, ""= it can."""
    if cell.starter == "openmpi" and shutil.which("mpirun.openmpi") is None:
        return "needs Open MPI 4 (mpirun.openmpi)"
    if cell.starter == "srun" and why_not():
        return why_not()
    if cell.fault.name == "disk full" and os.geteuid() != 0:
        return "needs root, to mount a small disk"
    if cell.fault.name == "out of memory":
        group = memory_group(_MEMORY_BYTES[cell.program])
        if group is None:
            return "needs a control group with a memory limit"
        group.rmdir()
    return ""


def _start(
    cell: Cell, folder: Path, cluster: SlurmCluster | None, extra: dict[str, str], further: Sequence[str]
) -> subprocess.Popen:
    environ = without_world(os.environ)
    stall = STALL_SECONDS if cell.fault.code == kinds.STALL else _START_SECONDS  # ranks start slowly on a busy machine
    options = [*further, "--quiet", "--no-compare", "--stall", str(stall), "--grace", "20"]
    if cell.starter == "srun":
        assert cluster is not None
        environ = without_world(cluster.environ)
        options += ["--mpi", "srun"]
    elif cell.starter == "openmpi":
        options += ["--mpi", str(shutil.which("mpirun.openmpi"))]
        if cell.fault.victim == "daemon":  # there is one on other hosts only
            environ["OMPI_MCA_plm_rsh_agent"] = str(_agent(folder))
            (folder / "hosts").write_text("10.99.0.1 slots=2\n")
            options += ["--hostfile", str(folder / "hosts"), "--log-dir", str(folder / "log")]
    told = extra | {
        fault_program.FOLDER: str(folder),
        fault_program.PHASE: cell.phase,
        fault_program.FAULT: cell.fault.name,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/launcher/failure/faults"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    environ = environ | told  # for daemons; --env for ranks on other hosts
    own = [word for name, value in told.items() for word in ("--env", f"{name}={value}")]
    command = [sys.executable, "-m", "launcher", "-n", "2", *options, *own]
    name = "fault_program" if cell.program == "light" else "fault_training"
    command += ["--", str(ROOT / f"tests/launcher/failure/{name}.py")]
    if cell.program == "training":
        command += ["digits_swin_moe", *_training(), f"run.output={folder}"]
    pipes = {"stdout": (folder / "output").open("w"), "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environ, **pipes)  # type: ignore[call-overload]


def _training() -> list[str]:
    """Returns the trainer's arguments: six steps of a micro model, with a checkpoint after every other one."""
    from tests.training.cases import TINY  # loads torch

    return [*TINY, "model.moe.group_images=2", "run.name=run", "optim.epochs=0.14", "checkpoint.every=2"]


def _agent(folder: Path) -> Path:
    """Returns what stands in for ssh: it runs the command on this host, in a host name of its own."""
    path = folder / "agent"
    path.write_text('#!/bin/sh\nshift\nexec unshare --uts sh -c \'hostname far; exec sh -c "$0"\' "$*"\n')
    path.chmod(0o755)
    return path


def _strike(cell: Cell, folder: Path, process: subprocess.Popen) -> tuple[float, list[Path]]:
    """Returns (when the fault was, the checkpoints that were whole then), having made one that comes from outside."""
    at, began = folder / f"at-{culprit_of(cell.phase)}", folder / "began"
    deadline = time.monotonic() + _START_SECONDS
    while not began.exists() or not began.read_text():
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError(f"{cell}: the job did not come to the fault:\n{(folder / 'output').read_text()}")
        time.sleep(0.005)
    whole = [path for path in checkpoints(folder) if _verifies(path)]
    if not cell.fault.victim:
        return float(began.read_text()), whole
    time.sleep(0.3)  # the other rank comes to where it waits
    pid = _victim(cell.fault.victim, int(_words(at)[0]), process.pid)
    now = time.time()
    os.kill(pid, cell.fault.signal)
    if cell.program == "training" and cell.fault.saves:  # the trainer's own handlers know of it
        (folder / "released").touch()
    return now, whole


def checkpoints(folder: Path) -> list[Path]:
    """Returns what either program published in a cell's folder."""
    return sorted([*(folder / "checkpoints").glob("checkpoint-*"), *(folder / "run" / "checkpoints").glob("0*")])


def _verifies(path: Path) -> bool:
    """Returns whether a checkpoint is whole, as its own program has it."""
    if path.is_file():
        return fault_program.verifies(path)
    command = [sys.executable, "-m", "swin_moe", "checkpoint", "verify", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def _victim(name: str, rank: int, launcher: int) -> int:
    """Returns the process that gets the signal: what started the guard of the rank is the daemon."""
    if name == "launcher":
        return launcher
    if name == "daemon":
        return _parent(_parent(rank))
    # Its other child, which cleans up after it, is a fork and looks like it.
    children = [pid for pid in _all_processes() if _parent(pid) == launcher]
    return next(pid for pid in children if _command_line(pid) != _command_line(launcher))


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def _all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _end_of(cell: Cell, folder: Path, process: subprocess.Popen, began: float) -> tuple[str, float]:
    """Returns (what was said, when the launcher and all processes of the job were gone), or gives up."""
    deadline = began + _PATIENCE
    while time.time() < deadline and (process.poll() is None or processes(folder)):
        if cell.survives and time.time() > began + _SURVIVAL_SECONDS:  # what waits goes on
            (folder / "released").touch()
        time.sleep(0.02)
    return (folder / "output").read_text(), time.time()


def processes(folder: Path) -> dict[int, str]:
    """Returns {pid: command line} of what belongs to the job, known by its environment; zombies are not running."""
    found = {}
    mark = f"{fault_program.FOLDER}={folder}".encode()
    for pid in _all_processes():
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and watch.start_time(pid) != "gone":
                found[pid] = _command_line(pid)
        except OSError:
            continue
    return found


def _end_what_is_left(folder: Path) -> list[str]:
    left = processes(folder)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return list(left.values())


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.launcher.failure.fault_matrix")
    made.add_argument("--table", action="store_true", help="print the table of docs/launcher.md at the end")
    made.add_argument("--only", nargs="*", default=[], metavar="NAME", help="faults, phases and starters to run")
    return made


def main(arguments: list[str]) -> int:
    """Returns 0 where every cell came to what it has to, in time."""
    options = _parser().parse_args(arguments)
    chosen = [
        cell
        for cell in cells()
        if all({cell.fault.name, cell.phase, cell.starter} & set(names) or not names for names in _axes(options.only))
    ]
    cluster = SlurmCluster() if any(cell.starter == "srun" for cell in chosen) and not why_not() else None
    results: dict[Cell, Result] = {}
    try:
        wrong = sum(not _show(cell, cluster, results) for cell in chosen)
    finally:
        if cluster is not None:
            cluster.close()
    if options.table:
        print("\n".join(table(results)))
    return 1 if wrong else 0


def _show(cell: Cell, cluster: SlurmCluster | None, results: dict[Cell, Result]) -> bool:
    """Returns whether a cell came to what it has to, having run it and said so."""
    if reason := why_not_here(cell):
        print(f"{cell}: {reason}", flush=True)
        return True
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        try:
            result = results[cell] = run_cell(cell, Path(name), cluster)
        except RuntimeError as error:
            print(f"{cell}: {error}", flush=True)
            return False
    found = problems(cell, result)
    if result.seconds > cell.fault.seconds and not cell.survives:
        found.append(f"more than {cell.fault.seconds:g} s")
    print(f"{cell}: {result.seconds:.1f} s, {result.code}: {'; '.join(found) or 'right'}", flush=True)
    if found:
        print("    " + result.output.replace("\n", "\n    "), flush=True)
    return not found


def _axes(names: list[str]) -> list[list[str]]:
    """Returns what was chosen of faults, of phases and of starters."""
    every = ([fault.name for fault in FAULTS], list(PHASES), list(STARTERS))
    return [[name for name in names if name in axis] for axis in every]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
