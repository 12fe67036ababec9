"""A fork of the server is what the process itself would have been: what it finds, says, and how it ends."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.env import without_world
from tests import preloaded

PROGRAM = str(Path(__file__).with_name("facts.py"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def start(environ, folder, how="exit 0", name="facts.json", **options):
    """Returns a process that writes facts into folder/name."""
    words = [sys.executable, "-m", "launcher.rank", PROGRAM, str(folder / name), how, "a word", "ä"]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environ, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options)


def environ_of(**others):
    return without_world(os.environ) | ONE_THREAD | {"PYTHONPATH": str(preloaded.ROOT)} | others


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return json.loads(path.read_text())


def end(process):
    """Returns its exit code."""
    with process.stdout, process.stderr:
        return process.wait(60)


def limit_files():
    os.umask(0o027)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@pytest.mark.parametrize("how, code", [("exit 0", 0), ("exit 7", 7), ("raise", 1)])
def test_it_finds_and_says_what_the_process_would(tmp_path, how, code):
    (tmp_path / "held").write_text("")
    found = []
    for environ in (environ_of(), preloaded.environment(environ_of())):
        with open(tmp_path / "held") as held:
            process = start(environ, tmp_path, how, pass_fds=[held.fileno()], preexec_fn=limit_files)
            output, errors = process.communicate("typed", timeout=60)
        assert process.returncode == code, errors
        facts = wait_for(tmp_path / "facts.json")
        (tmp_path / "facts.json").unlink()
        # What says that it is a fork, and what differs in any two processes.
        assert facts.pop("process") != process.pid
        client = environ["PYTHONPATH"].partition(os.pathsep)[0]
        path = [place for place in facts.pop("path") if place != client or place == str(preloaded.ROOT)]
        variables = {n: v for n, v in facts.pop("variables").items() if n not in ("PYTHONPATH", preloaded.ADDRESS)}
        found.append((facts.pop("torch"), [*facts.items(), path, variables, output, errors.partition("Traceback")[0]]))
    (alone, expected), (forked, got) = found
    assert (alone, forked) == (False, True)
    assert got == expected
    assert [path for _, path in dict(expected[:-4])["files"]].count(str(tmp_path / "held")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_it_and_its_end_is_told(tmp_path, number):
    process = start(preloaded.environment(environ_of()), tmp_path, "wait")
    process.stdin.close()
    assert wait_for(tmp_path / "facts.json")["torch"]
    process.send_signal(number)
    assert end(process) == number


def test_it_ends_with_the_process_that_waits_for_it(tmp_path):
    process = start(preloaded.environment(environ_of()), tmp_path, "wait")
    process.stdin.close()
    facts = wait_for(tmp_path / "facts.json")
    assert facts["torch"]
    fork = facts["process"]
    process.kill()
    end(process)
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{fork}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("others", [{"OMP_NUM_THREADS": "2"}, {preloaded.ADDRESS: "/nowhere"}])
def test_where_a_fork_would_differ_or_none_is_to_be_had_it_runs_by_itself(tmp_path, others):
    process = start(preloaded.environment(environ_of()) | others, tmp_path)
    output, errors = process.communicate("", timeout=60)
    assert process.returncode == 0 and output == "said\n", errors
    assert not wait_for(tmp_path / "facts.json")["torch"]
