"""How a job ends: all ways to fail end all processes soon, and signals reach the ranks. Real MPI, torch in one row."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.env import without_world
from tests.ranks import ROOT, TWO_AND_FOUR

pytestmark = pytest.mark.mpi
# The environment's MPICH, and Open MPI where the machine has it.
OPEN_MPI = shutil.which("mpirun.openmpi")
MPIS = [
    pytest.param((), id="mpich"),
    pytest.param(
        ("--mpi", str(OPEN_MPI)), id="openmpi", marks=pytest.mark.skipif(not OPEN_MPI, reason="needs Open MPI")
    ),
]


def start(program, folder, *options, world=2):
    command = [sys.executable, "-m", "launcher", "-n", str(world), *options, "--env", f"JOB_TOKEN={folder}"]
    command += ["--", "-m", "tests.launcher.programs", program, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=without_world(os.environ), **pipes)


def processes(folder):
    """Returns {pid: command line} of the mpirun, proxies and ranks of the job; zombies are not running."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"JOB_TOKEN={folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return {pid: line for pid, line in found.items() if line}


def wait_for(condition, what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def assert_nothing_left(folder, seconds=5.0):
    wait_for(lambda: not processes(folder), f"the end of {list(processes(folder).values())}", seconds)


@pytest.mark.parametrize(
    "program, code, message",
    [
        ("raise_on_1", 1, "RuntimeError: boom on rank one"),
        ("raise_on_1_with_gloo", 1, "RuntimeError: boom on rank one"),
        ("exit_3_on_1", 3, ""),
        ("sentence_on_1", 1, "[rank 1] the data set is gone"),
    ],
)
def test_failure_of_one_rank_ends_all(program, code, message, tmp_path):
    process = start(program, tmp_path)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == code, output
    assert message in output and "[rank 0]" not in output
    assert_nothing_left(tmp_path)


def pid_of(victim, launcher, folder):
    if victim == "launcher":
        return launcher.pid
    if victim == "rank":
        return int((folder / "pid-1").read_text())
    program = {"mpirun": "bin/mpirun", "proxy": "hydra_pmi_proxy"}[victim]
    return next(pid for pid, line in processes(folder).items() if line.split()[0].endswith(program))


@pytest.mark.parametrize("victim", ["rank", "proxy", "mpirun", "launcher"])
def test_kill_9_of_any_process_leaves_no_orphan(victim, tmp_path):
    process = start("sleep", tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("pid-*"))) == 2, "start of both ranks")
    os.kill(pid_of(victim, process, tmp_path), signal.SIGKILL)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("delay", [0.03, 0.06, 0.09, 0.12, 0.15, 0.2, 0.3])
def test_kill_9_of_the_launcher_while_it_starts_leaves_no_orphan(delay, tmp_path):
    process = start("sleep", tmp_path)
    time.sleep(delay)
    process.kill()
    process.wait()
    time.sleep(0.5)  # a rank that was just being forked shows up within this time
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_signals_reach_every_rank_and_a_clean_exit_is_reported(number, tmp_path):
    process = start("save_on_signal", tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "readiness of both ranks")
    process.send_signal(number)
    output = process.communicate(timeout=10)[0]
    assert process.returncode == 0, output
    expected = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
    assert [int((tmp_path / f"saved-{rank}").read_text()) for rank in (0, 1)] == [expected] * 2


def test_ranks_are_asked_to_save_when_their_time_is_over(tmp_path):
    process = start("save_on_signal", tmp_path, "--save-after", "3")
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    assert "launcher: 3 s are over; the ranks have 120 s to save" in output
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_who_supervises_learns_how_a_job_ended(tmp_path):
    """As a program that starts failed jobs again would: which rank failed first, and whether it was asked to stop."""
    outcomes = {}
    for program, save_after in (("leave_with_5_on_1", "inf"), ("ignore_signals", "3")):
        code = (
            "import sys; from launcher import supervise; from launcher.job.options import parser\n"
            "from launcher.job.prepare import prepare\n"
            f"options = parser().parse_args(['-n', '2', '--grace', '1'])\n"
            f"job = prepare(options, ['-m', 'tests.launcher.programs', {program!r}, {str(tmp_path)!r}])\n"
            f"print(supervise.supervise(job.command, job.environment({{**__import__('os').environ}}), "
            f"flavor=job.mpi.flavor, limits=supervise.Limits(options.grace, float({save_after!r})), "
            "world=supervise.World()))"
        )
        command, pipes = [sys.executable, "-c", code], {"capture_output": True, "text": True}
        finished = subprocess.run(command, cwd=ROOT, env=without_world(os.environ), timeout=60, **pipes)
        outcomes[program] = finished.stdout.splitlines()[-1]
    assert outcomes == {
        "leave_with_5_on_1": "Outcome(code=5, rank='1', asked_to_stop=False, killed=False)",
        "ignore_signals": "Outcome(code=124, rank='', asked_to_stop=True, killed=True)",
    }


@pytest.mark.parametrize(
    "numbers, options, code, said",
    [
        ([signal.SIGTERM], ("--grace", "0.5"), 124, "did not stop in time (exit code 124): not saved in 0.5 s"),
        ([signal.SIGINT], ("--grace", "0.5"), 130, "interrupted (exit code 130): not saved in 0.5 s"),
        ([signal.SIGINT, signal.SIGINT], (), 130, "interrupted (exit code 130): Ctrl-C twice"),
    ],
)
def test_ranks_that_ignore_signals_are_killed(numbers, options, code, said, tmp_path):
    process = start("ignore_signals", tmp_path, *options)
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "readiness of both ranks")
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)
    output = process.communicate(timeout=10)[0]
    assert process.returncode == code
    assert output.splitlines()[-1] == f"launcher: {said}; what was saved before is kept"
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize("world", TWO_AND_FOUR)
@pytest.mark.parametrize(
    "program, code, words",
    [
        ("sentence_on_all", 1, ["the disk is full"]),
        ("raise_on_all", 1, ["RuntimeError: boom everywhere"]),
        ("sentence_on_every_other", 1, ["[ranks 0, 2] rank 0 of 2", "[ranks 1, 3] rank 1 of 2"]),
        ("exit_3_on_all", 3, ["exited with code 3"]),
    ],
)
def test_what_ranks_say_alike_is_printed_once(program, code, words, world, mpi, tmp_path):
    process = start(program, tmp_path, *mpi, world=world)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == code, output
    for line in words:
        line = line if world == 4 else line.replace("s 0, 2]", " 0]").replace("s 1, 3]", " 1]")
        assert [found for found in output.splitlines() if found.endswith(line.removeprefix("["))].count(line) == 1, (
            output
        )
    assert "Abort" not in output and "BAD TERMINATION" not in output and "MPI_ABORT" not in output


@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize(
    "program, code, culprit",
    [
        ("exit_3_on_1", 3, "[rank 1] exited with code 3"),
        ("leave_with_5_on_1", 5, "[rank 1] error: rank 1 exited with code 5 without a word"),
        ("crash_on_1", 139, "[rank 1] error: rank 1 was killed by SIGSEGV without a word"),
        ("kill_1", 137, "[rank 1] error: rank 1 was killed by SIGKILL (kill -9, or the kernel for lack of memory)"),
    ],
)
def test_the_culprit_is_named_and_gives_the_exit_code(program, code, culprit, mpi, tmp_path):
    process = start(program, tmp_path, *mpi, world=4)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == code, output
    assert culprit in output
    assert not any(f"[rank {rank}]" in output for rank in (0, 2, 3)), output
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_know_their_world_and_own_their_cores(world, tmp_path):
    process = start("write_environment", tmp_path, "--env", "COLOUR=blue", world=world)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 0, output
    facts = [(tmp_path / f"facts-{rank}").read_text().split() for rank in range(world)]
    cores = len(os.sched_getaffinity(0))
    threads = str(max(1, cores // world)) if "OMP_NUM_THREADS" not in os.environ else os.environ["OMP_NUM_THREADS"]
    for rank, (*world_facts, omp, colour, bound) in enumerate(facts):
        assert world_facts == [str(rank), str(world), str(rank), str(world), "127.0.0.1"]
        assert colour == "blue" and (cores % world or omp == threads)
        assert len(bound.split(",")) in (max(1, cores // world), max(1, -(-cores // world)))


def test_plain_mpirun_needs_no_launcher(tmp_path):
    mpirun = Path(sys.prefix, "bin", "mpirun")
    command = [mpirun, "-n", "2", sys.executable, "-m", "tests.launcher.programs", "raise_on_1", tmp_path]
    pipes = {"capture_output": True, "text": True}
    finished = subprocess.run(command, cwd=ROOT, env=without_world(os.environ), timeout=20, **pipes)
    assert finished.returncode == 1
    assert "[rank 1]" in finished.stderr and "boom on rank one" in finished.stderr


def test_torchrun_is_left_alone(tmp_path):
    facts = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    environ = without_world(os.environ) | facts
    command = [sys.executable, "-m", "tests.launcher.programs", "write_environment", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environ, check=True, timeout=20)
    assert (tmp_path / "facts-0").read_text().startswith("0 1 ")
