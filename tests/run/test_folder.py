"""Two jobs in one run folder: the second is refused by name, and what a killed one left hinders nobody."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from swin_moe.checkpoint import find_latest, list_checkpoints
from swin_moe.checkpoint.directory import lock_directory
from swin_moe.checkpoint.save import write_checkpoint
from swin_moe.run.folder import NAME, FolderLock, holding
from tests.checkpoint.samples import whole_pieces
from tests.training.test_commands import QUICK, ROOT, environment, perform, refused

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


def test_a_second_job_is_refused_and_a_killed_one_is_continued(tmp_path, capfd):
    first = subprocess.Popen(command(tmp_path, "optim.epochs=500"), env=environment(anew=True), cwd=ROOT)
    try:
        deadline, records = time.monotonic() + 100, tmp_path / "run" / "metrics.jsonl"
        while not (records.is_file() and records.stat().st_size):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        second = refused("train", tmp_path, capfd, "optim.epochs=500")
        assert f"in use by process {first.pid} on {socket.gethostname()}" in second
        assert first.poll() is None
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert (tmp_path / "run" / NAME).exists()  # nobody could remove it
    assert "finished: step 5 of 5" in perform("train", tmp_path, capfd)
    assert not (tmp_path / "run" / NAME).exists()


def test_what_a_killed_save_left_goes_at_the_next_start_and_never_counts(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    whole = write_checkpoint(checkpoints, 2, whole_pieces({"w": np.ones(3, "f4")}), state={}, config={})
    half, held, trash = (
        checkpoints / f".{name}" for name in ("0000000004.3f9c01aa.tmp", "0000000006.77.tmp", "0000000001.trash")
    )
    for path in (half, held, trash):
        shutil.copytree(whole, path)
    (checkpoints / "notes.txt").write_text("mine")
    assert list_checkpoints(checkpoints) == [whole] and find_latest(checkpoints) == whole
    writer, lock = lock_directory(held), FolderLock(tmp_path)
    with holding(lock):
        lock.enter()
        assert sorted(path.name for path in checkpoints.iterdir()) == [held.name, whole.name, "notes.txt"]
    os.close(writer)
    with holding(lock):
        lock.enter()
        assert sorted(path.name for path in checkpoints.iterdir()) == [whole.name, "notes.txt"]


def test_a_start_goes_on_where_nothing_can_be_removed(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / ".0000000004.3f9c01aa.tmp").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", _refuse)
    lock = FolderLock(tmp_path)
    with holding(lock):
        lock.enter()
        assert lock.path.exists()


def _refuse(path):
    raise PermissionError(13, "Permission denied", str(path))


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
