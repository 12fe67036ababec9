"""Two jobs in one run folder: the second is refused by name, and what a killed one left hinders nobody."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from swin_moe.run.folder import NAME, FolderLock
from tests.training.test_commands import QUICK, ROOT, environment

HOLD = """
import sys, time
from pathlib import Path
from swin_moe.run.folder import FolderLock
FolderLock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""


def command(folder, *options):
    return [sys.executable, "-m", "swin_moe.train", "digits_swin_moe", *QUICK, f"run.output={folder}", *options]


def run(folder, *options):
    return subprocess.run(
        command(folder, *options), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_a_second_job_is_refused_and_a_killed_one_is_continued(tmp_path):
    first = subprocess.Popen(command(tmp_path, "optim.epochs=500"), env=environment(), cwd=ROOT)
    try:
        deadline, records = time.monotonic() + 100, tmp_path / "run" / "metrics.jsonl"
        while not (records.is_file() and records.stat().st_size):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        second = run(tmp_path, "optim.epochs=500")
        assert second.returncode == 2 and "Traceback" not in second.stderr
        assert f"in use by process {first.pid} on {socket.gethostname()}" in second.stderr
        assert first.poll() is None
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert (tmp_path / "run" / NAME).exists()  # nobody could remove it
    third = run(tmp_path)
    assert third.returncode == 0, third.stderr
    assert not (tmp_path / "run" / NAME).exists()


@pytest.mark.mpi
def test_the_ranks_of_one_job_are_one_job(tmp_path):
    job = [sys.executable, "-m", "launcher", "-n", "2", "--", *command(tmp_path)[1:]]
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        refused = subprocess.run(job, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert refused.returncode == 2
        assert refused.stderr.count("in use by") == 1 and f"process {holder.pid} on" in refused.stderr
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    done = subprocess.run(job, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()
    child = os.fork()
    if not child:
        time.sleep(60)
    os.close(lock._file)  # as the kernel does when the process is killed
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
            FolderLock(tmp_path).take()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        holder.kill()
        holder.wait()
        holder.stdout.close()
