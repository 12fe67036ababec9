"""Why a job failed: kinds and codes, ranks that stall or are late, memory, and processes that nobody would end."""

import faulthandler
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import guard, watch
from launcher.failure import kinds, line, memory, orphans, reports, stacks
from launcher.failure.reports import Failure, State
from launcher.failure.starting import find_late
from launcher.supervise import Outcome, _explain
from tests.launcher.failure.test_faults import MPIS, pid_of, start, wait_for
from tests.ranks import ROOT

PATIENCE = 60.0  # seconds; tests wait for conditions, and a busy machine is slow


def test_every_code_has_its_kind():
    assert [kinds.kind_of(code) for code in (2, 69, 70, 71, 75, 124, 130)] == [
        "configuration",
        "host",
        "stall",
        "out of memory",
        "preempted",
        "did not stop in time",
        "interrupted",
    ]
    assert {kinds.kind_of(code) for code in (1, 3, 137, 139)} == {"program error"}


def test_reports_come_back_in_the_order_of_time(tmp_path, monkeypatch):
    monkeypatch.setenv(reports.REPORTS, str(tmp_path))
    monkeypatch.setenv("PMI_RANK", "2")
    reports.enter("starting")
    reports.enter("running", pid=7)
    state = reports.states(tmp_path)[2]
    assert (state.rank, state.phase, state.pid) == (2, "running", 7)
    second, first = Failure("1", 3, "later"), Failure("2", 1, "Traceback\n  x\nKeyError: 'a'\n", "step 3", "n1", 9)
    reports.fail(first)
    reports.fail(second)
    (tmp_path / "failed-0-broken.json").write_text("{")
    assert reports.first_failure(tmp_path) == first
    assert Outcome(1, "2", failure=first).describe() == (
        "launcher: program error (exit code 1): rank 2 (n1, pid 9) failed first: KeyError: 'a'"
    )
    monkeypatch.setenv(reports.REPORTS, str(tmp_path / "nowhere"))
    reports.fail(second)  # on a host without the folder, no error


@pytest.mark.parametrize(
    "outcome, failure, memory_short, unheard, code",
    [
        (Outcome(137), Failure("1", 3), False, False, 3),  # what mpirun says of a kill counts less than the rank's word
        (Outcome(137), None, False, False, kinds.HOST),
        (Outcome(9), None, True, False, kinds.MEMORY),
        (Outcome(3), None, False, True, 3),  # a rank on another host may have ended with it
        (Outcome(15, asked_to_stop=True), None, False, False, 15),
        (Outcome(kinds.STALL), None, False, False, kinds.STALL),
    ],
)
def test_the_cause_of_an_outcome(outcome, failure, memory_short, unheard, code):
    assert _explain(outcome, failure, memory_short, unheard).code == code


@pytest.mark.parametrize(
    "groups, files, count",
    [
        ("0::/job\n", {"job/memory.events": "low 0\noom 5\noom_kill 3\n"}, 3),
        ("0::/of/the/host\n", {"memory.events": "oom_kill 2\n"}, 2),  # a container sees its own group as the root
        ("4:memory:/a/b\n0::/\n", {"memory/a/b/memory.oom_control": "under_oom 0\noom_kill 1\n"}, 1),
        ("3:cpu:/a\n0::/\n", {}, 0),
        ("0::/job\n", {"job/memory.events": "oom_kill"}, 0),
    ],
)
def test_kills_for_lack_of_memory(groups, files, count, tmp_path):
    own = tmp_path / "own"
    own.write_text(groups)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory.kills(tmp_path / "root", own) == count
    assert memory.kills(tmp_path / "root", tmp_path / "missing") == 0


def test_a_rank_is_late_when_others_wait_for_it():
    def state(rank, phase, since=100.0):
        return State(rank, f"n{rank}", 10 + rank, phase, since)

    waiting = {0: state(0, "meeting"), 2: state(2, "meeting", 105.0), 1: state(1, "starting")}
    assert find_late(waiting, 3, 109.0, 10.0) == ([], "")
    late, sentence = find_late(waiting, 4, 111.0, 10.0)
    assert late == [1, 3] and sentence.startswith("ranks 1 (n1), 3 did not start within 10 s")
    assert find_late({0: state(0, "starting")}, 2, 999.0, 10.0) == ([], "")  # nobody waits yet
    assert find_late({r: state(r, "running") for r in range(2)}, 2, 999.0, 10.0) == ([], "")
    assert find_late({r: state(r, "meeting") for r in range(2)}, 2, 999.0, 10.0) == ([], "")  # nobody is to be named


def test_a_stack_tells_the_line_and_the_collective(tmp_path):
    c10d = "/venv/lib/python3.11/site-packages/torch/distributed"
    text = (
        'Current thread 0x1 (most recent call first):\n  File "/x/loader.py", line 3 in fetch\n\n'
        "Thread 0x2 (most recent call first):\n"
        f'  File "{c10d}/distributed_c10d.py", line 2 in all_reduce\n'
        f'  File "{c10d}/c10d_logger.py", line 8 in wrapper\n'
        '  File "/x/train.py", line 12 in step\n  File "/x/train.py", line 90 in main\n'
    )
    assert str(stacks.parse(text)) == "at /x/train.py:12 in step, in all_reduce"
    assert str(stacks.parse("")) == "in no Python"
    with (tmp_path / "stack").open("w+") as file:  # what the interpreter of this test really writes
        faulthandler.dump_traceback(file)
        file.seek(0)
        assert stacks.parse(file.read()).line.endswith("in test_a_stack_tells_the_line_and_the_collective")


def lives(pid):
    return watch.start_time(pid) != "gone"


def rests(pid):
    """Whether the process's first thread is asleep at ten looks within 0.2 s."""
    for _ in range(10):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            return False
        time.sleep(0.02)
    return True


def test_a_sweep_ends_a_job_s_processes_and_no_others(tmp_path):
    def sleeper(**variables):
        return subprocess.Popen(["sleep", "600"], env=variables, start_new_session=True)

    token = os.urandom(8).hex()
    mine = sleeper(**{line.TOKEN: token, "PMI_RANK": "1"})
    others = [
        sleeper(**{line.TOKEN: token, "PMI_RANK": "0"}),
        sleeper(**{line.TOKEN: token[:-1] + "x", "PMI_RANK": "1"}),
    ]
    try:
        wait_for(lambda: len(orphans.processes(token)) == 2, "both processes")
        assert orphans.processes(token, rank="1") == [mine.pid]
        assert orphans.processes(token, rank="1", after=int(watch.start_time(mine.pid))) == []
        assert orphans.sweep(token, rank="1") == 1
        assert mine.wait(5) < 0 and all(other.poll() is None for other in others)
        assert orphans.sweep(token) == 1 and others[1].poll() is None
    finally:
        for process in [mine, *others]:
            process.kill()
            process.wait()


@pytest.mark.parametrize("others_rank", ["", "0"])
def test_a_group_is_swept_unless_another_rank_is_in_it(others_rank):
    """Slurm puts all tasks into one group; a child without the token belongs to the rank only if that is alone."""
    token = os.urandom(8).hex()
    leader = subprocess.Popen(["sleep", "600"], env={line.TOKEN: token, "PMI_RANK": "1"}, process_group=0)
    started = [leader, subprocess.Popen(["sleep", "600"], env={}, process_group=leader.pid)]
    try:
        if others_rank:
            other = {line.TOKEN: token, "PMI_RANK": others_rank}
            started.append(subprocess.Popen(["sleep", "600"], env=other, process_group=leader.pid))
        wait_for(lambda: len(orphans.processes(token)) == 1 + bool(others_rank), "the processes")
        found = orphans.processes(token, rank="1", group=leader.pid)
        assert sorted(found) == sorted(process.pid for process in started[: 1 if others_rank else 2])
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.mpi
@pytest.mark.parametrize("victim", ["rank", "proxy", "mpirun", "launcher", "end"])
def test_workers_are_gone_with_their_rank(victim, tmp_path):
    process = start("start_workers", tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("workers-*"))) == 2, "the start of all workers", PATIENCE)
    workers = [int(pid) for path in tmp_path.glob("workers-*") for pid in path.read_text().split()]
    assert len(workers) == 8 and all(map(lives, workers))
    if victim == "end":
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
    else:
        os.kill(pid_of(victim, process, tmp_path), signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    wait_for(lambda: not any(map(lives, workers)), "the end of all workers", 15)


@pytest.mark.mpi
@pytest.mark.parametrize("victim, code", [("proxy", kinds.HOST), ("mpirun", kinds.HOST), ("rank", 137)])
def test_what_was_killed_gives_the_kind(victim, code, tmp_path):
    process = start("sleep", tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("pid-*"))) == 2, "start of both ranks", PATIENCE)
    os.kill(pid_of(victim, process, tmp_path), signal.SIGKILL)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == code, output
    last = output.splitlines()[-1]
    kind = kinds.kind_of(code)
    assert last.startswith(f"launcher: {kind} (exit code {code}): "), output
    assert ("rank 1 (" in last) == (victim == "rank") and "rank 0 (" not in last


@pytest.mark.mpi
@pytest.mark.parametrize("mpi", MPIS)
def test_a_traceback_is_said_once_and_the_error_is_the_last_line(mpi, tmp_path):
    process = start("raise_on_1", tmp_path, *mpi)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 1 and output.count("Traceback") == 1, output
    files = re.findall(r'  File "(.*)", line', output)
    assert files and all(file.endswith("tests/launcher/programs.py") for file in files), (
        output
    )  # none of the launcher's
    expected = (
        r"launcher: program error \(exit code 1\): rank 1 \(\S+, pid \d+\) failed first: RuntimeError: boom on rank one"
    )
    assert re.fullmatch(expected, output.splitlines()[-1]), output


@pytest.mark.mpi
@pytest.mark.parametrize("mpi", MPIS)
def test_a_stopped_rank_is_named_with_its_line(mpi, tmp_path):
    process = start("sleep", tmp_path, "--stall", "3", "--log-dir", str(tmp_path / "logs"), *mpi)
    wait_for(lambda: len(list(tmp_path.glob("pid-*"))) == 2, "start of both ranks", PATIENCE)
    pid = int((tmp_path / "pid-1").read_text())
    wait_for(lambda: rests(pid), "rank 1's sleep", PATIENCE)  # its file is there a moment before it sleeps
    os.kill(pid, signal.SIGSTOP)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == kinds.STALL, output
    last = output.splitlines()[-1]
    assert last.startswith("launcher: stall (exit code 70): rank 1 ("), output
    assert f"pid {pid}) failed first: was stopped by a signal for 3 s (--stall)" in last
    assert re.search(rf"rank 1 is process {pid} of \S+, at \S+programs\.py:\d+ in _sleep", last), last
    assert not lives(pid)
    kept = [(tmp_path / "logs" / "start-0" / f"stacks-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("programs.py" in text for text in kept)


@pytest.mark.mpi
def test_stacks_name_the_collective_that_a_rank_sits_in(tmp_path):
    """As a heartbeat asks for them, from a thread beside the one that hangs in gloo."""
    code = (
        "import sys, threading, time\nfrom launcher import ending, mpi\nenv = mpi.bootstrap()\n"
        "from tests.launcher import programs\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n"
        "def judge():\n"
        "    while len(list(folder.glob('met-*'))) < 2: time.sleep(0.05)\n"
        "    time.sleep(1)\n"
        "    ending.end_stalled(0, 'error: rank 0 keeps the others waiting')\n"
        "if env.rank == 1: threading.Thread(target=judge, daemon=True).start()\n"
        "programs._wait_for_rank_1(folder, str(env.rank))\n"
    )
    (tmp_path / "program.py").write_text(code)
    command = [sys.executable, "-m", "launcher", "-n", "2", "--quiet", "--env", f"PYTHONPATH={Path.cwd()}"]
    finished = subprocess.run(
        [*command, "--", str(tmp_path / "program.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
    )
    assert finished.returncode == kinds.STALL, finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert re.search(
        r"rank 0 is process \d+ of \S+, at \S+programs\.py:\d+ in _wait_for_rank_1, in all_reduce$", last
    ), last


@pytest.mark.parametrize(
    "environ, rounds",
    [
        ({}, 1),
        ({"PMI_RANK": "3", "PMI_SIZE": "999"}, 1),
        ({"PMI_RANK": "3", "PMI_SIZE": "10000"}, 10),
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "4096"}, 4),
    ],
)
def test_a_shared_folder_is_asked_no_more_often_by_many_ranks(environ, rounds):
    """Every rank looks each quarter of a second: 40,000 requests a second of 10,000 ranks, else."""
    assert guard.folder_rounds(environ) == rounds


_DIES = "import os; from launcher import guard; guard.run(lambda: os.kill(os.getpid(), {}))"


@pytest.mark.parametrize(
    ("number", "asked", "blamed"),
    [("SIGUSR1", True, False), ("SIGTERM", True, False), ("SIGUSR1", False, True), ("SIGKILL", True, True)],
)
def test_a_rank_that_has_the_request_to_save_before_its_guard_is_no_culprit(number, asked, blamed, tmp_path):
    """Slurm sends a signal to every process of a task; a rank without a handler is dead before its guard is told."""
    if asked:
        reports.ask(tmp_path, signal.SIGHUP)
    command = [sys.executable, "-c", _DIES.format(int(signal.Signals[number]))]
    environ = os.environ | {reports.REPORTS: str(tmp_path), "PMI_RANK": "1", "PMI_SIZE": "2"}
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.Signals[number]
    assert (f"rank 1 was killed by {number}" in done.stderr) == blamed
    failed, lost = reports.ends(tmp_path)
    assert (failed, lost) == ((1, 0) if blamed else (0, 1))
