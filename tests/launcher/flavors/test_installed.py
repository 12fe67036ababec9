"""Real ranks under every MPI that is installed here, and under Slurm's srun: they start, get signals, and end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.env import without_world
from tests.launcher.flavors.starters import pmix_works, starters
from tests.ranks import ROOT

pytestmark = pytest.mark.mpi
WORLDS = [2, pytest.param(4, marks=pytest.mark.full)]


@pytest.fixture
def launch(request, tmp_path):
    """Returns a function that starts a program of tests.launcher.programs under a starter."""
    started: list[subprocess.Popen] = []

    def start(starter, world, program, *options):
        environ = without_world(os.environ)
        prefix: list[str] = []
        if starter.slurm:
            cluster = request.getfixturevalue("slurm")
            environ = without_world(cluster.environ)
            if "Open MPI" in starter.library and not pmix_works():
                pytest.skip("Slurm's plugin for PMIx finds no libpmix.so (Debian: libpmix-dev)")
            prefix = ["salloc", "--quiet", f"--nodes={starter.nodes}", f"--ntasks={world}", "--overcommit"]
        ranks = [] if starter.slurm else ["-n", str(world)]
        command = [*prefix, sys.executable, "-m", "launcher", *ranks, *starter.options, *options]
        command += ["--", "-m", "tests.launcher.programs", program, str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=environ | starter.environ, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("starter", starters())
def test_ranks_start_and_meet(starter, world, launch, tmp_path):
    process = launch(starter, world, "count_ranks", "--env", "COLOUR=dark blue")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    found = [(tmp_path / f"count-{rank}").read_text() for rank in range(world)]
    for text in found:
        assert text.startswith(f"{world} dark blue {ROOT} ") and starter.library in text, text


def launcher_pid(folder):
    """Returns the launcher's process: salloc, where it started it, ends everything at a SIGTERM."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[1:3] == ["-m", "launcher"] and str(folder) in words:
            return int(path.name)
    raise AssertionError("there is no launcher")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("starter", starters())
def test_a_request_to_stop_reaches_every_rank(starter, world, launch, tmp_path):
    process = launch(starter, world, "save_on_signal")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < world:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate(timeout=60)[0]
        time.sleep(0.05)
    os.kill(launcher_pid(tmp_path), signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert len(list(tmp_path.glob("saved-*"))) == world


@pytest.mark.full
@pytest.mark.parametrize("starter", starters())
def test_every_line_tells_its_rank(starter, launch):
    process = launch(starter, 2, "say_two_lines", "--tag")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    for rank in (0, 1):
        said = [line for line in output.splitlines() if f"of rank {rank}" in line]
        assert len(said) == 2 and all(re.match(rf"\[{rank}( \w+)?\] ", line) for line in said), output


@pytest.mark.full
@pytest.mark.parametrize("starter", starters())
def test_a_failing_rank_ends_all_and_is_named(starter, launch):
    process = launch(starter, 4, "sentence_on_1")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert "[rank 1] the data set is gone" in output and "[rank 0]" not in output


@pytest.mark.parametrize("how", ["grace", "kill"])
def test_a_step_of_srun_ends_with_its_launcher(how, slurm, tmp_path):
    """Ranks that ignore every signal: their time to save is over, or somebody kills the launcher."""
    command = [sys.executable, "-m", "launcher", "-n", "2", "--mpi", "srun", "--grace", "0.5"]
    command += ["--", "-m", "tests.launcher.programs", "ignore_signals", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=without_world(slurm.environ), **pipes)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate(timeout=60)[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM if how == "grace" else signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (124 if how == "grace" else -9), output
    while slurm.run("squeue", "--steps", "--noheader").stdout.strip():
        assert time.monotonic() < deadline, slurm.run("squeue", "--steps").stdout
        time.sleep(0.1)


@pytest.mark.parametrize("options", [(), ("--mpi", "srun")], ids=["mpich", "srun"])
@pytest.mark.parametrize("tasks, locals", [(["--ntasks-per-node=2"], [0, 1, 0, 1]), (["--ntasks=3"], [0, 1, 0])])
def test_nodes_of_an_allocation_know_their_own_ranks(options, tasks, locals, slurm, tmp_path):
    """Equal and unequal nodes, and ranks bound to their share of all cores: Slurm would bind a daemon to one core."""
    command = ["salloc", "--quiet", "--nodes=2", *tasks, sys.executable, "-m", "launcher", *options]
    command += ["--", "-m", "tests.launcher.programs", "write_environment", str(tmp_path)]
    finished = slurm.run(*command, timeout=120, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    facts = [(tmp_path / f"facts-{rank}").read_text().split() for rank in range(len(locals))]
    assert [(int(rank[2]), int(rank[3])) for rank in facts] == [
        (local, 2 if number < 2 else len(locals) - 2) for number, local in enumerate(locals)
    ]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 2:
        assert [rank[-1] for rank in facts[:2]] == [str(core) for core in cores]


@pytest.mark.parametrize("options", [(), ("--mpi", "srun")], ids=["mpich", "srun"])
def test_the_preflight_reaches_nodes_whose_names_only_slurm_knows(options, slurm, tmp_path):
    command = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "launcher", *options]
    command += ["--preflight", "--preflight-over", "none", "--preflight-file", str(tmp_path / "figures.json")]
    finished = slurm.run(*command, timeout=240, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [rank["rank"] for rank in figures["ranks"]] == [0, 1] and not figures["unusable_hosts"]


PLAIN = [
    ["mpirun", "-n", "2"],
    ["srun", "-n", "2", "-N", "1", "--overcommit", "--mpi=none"],
    ["srun", "-n", "2", "-N", "1", "--overcommit", "--mpi=pmi2"],
    [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"],
]


@pytest.mark.parametrize("starter", PLAIN, ids=["mpirun", "srun", "srun-pmi2", "torchrun"])
def test_without_the_launcher_ranks_find_the_same_world(starter, request, tmp_path):
    environ = without_world(os.environ)
    if starter[0] == "srun":
        environ = without_world(request.getfixturevalue("slurm").environ)
    elif starter[0] == "mpirun":
        starter = [str(Path(sys.prefix, "bin", "mpirun")), *starter[1:]]
    command = [*starter, sys.executable, "-m", "tests.launcher.programs", "write_environment", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    for rank in (0, 1):
        world = (tmp_path / f"facts-{rank}").read_text().split()[:5]
        assert world[:4] == [str(rank), "2", str(rank), "2"] and world[4] in ("127.0.0.1", "localhost")
