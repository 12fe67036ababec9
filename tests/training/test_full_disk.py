"""A disk that fills up ends a run with one sentence, leaves the checkpoints before, and the run goes on afterwards."""

import errno
import os
import re
import subprocess
import sys
import threading

import pytest

from swin_moe.config.io import dump_config, load_config
from swin_moe.run import metrics
from swin_moe.run.folder import FolderLock
from tests.training.test_commands import QUICK, ROOT, checkpoints, command, environment, perform, run

FULL = [*QUICK, "optim.epochs=0.14", "checkpoint.every=2", "log.tensorboard=true"]  # 6 steps; 3 checkpoints
# Room, in bytes that a rank writes into checkpoints, for what -> what is named. A checkpoint of one rank has 381,024 of
# tensors and 61,000 beside.
ROOM = {
    "shard": (450_000, r"checkpoints/\.0000000004\.\w+\.tmp/shard-00000\.safetensors"),
    "index": (850_000, r"checkpoints/\.0000000004\.\w+\.tmp/(index|provenance)\.json"),
}


def train(directory, room, ranks, *options):
    start = [sys.executable, "-m", "launcher", "-n", str(ranks), "--"] if ranks > 1 else [sys.executable]
    words = ["-m", "tests.training.full_disk", str(room), "digits_swin_moe", *FULL, f"run.output={directory}", *options]
    return subprocess.run([*start, *words], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "ranks, place, background",
    [
        (1, "shard", "false"),
        (1, "index", "true"),
        pytest.param(2, "shard", "false", marks=[pytest.mark.mpi, pytest.mark.full]),
        pytest.param(2, "shard", "true", marks=[pytest.mark.mpi, pytest.mark.full]),
    ],
)
def test_a_disk_that_fills_up_ends_a_run_with_a_sentence(tmp_path, capfd, ranks, place, background):
    room, named = ROOM[place]
    options = [f"checkpoint.asynchronous={background}"]
    done = train(tmp_path, room, ranks, *options)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert re.search(rf"{tmp_path}/run/{named}: No space left on device", errors[0]), errors
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoints(tmp_path) == ["0000000002"] and not list(folder.glob(".*"))
    assert not (tmp_path / "run" / "run.lock").exists()
    options += FULL[len(QUICK) :]
    if ranks == 1:
        assert "resumed from step 2" in perform("train", tmp_path, capfd, *options)
    else:
        again = run(command(tmp_path, *options, ranks=ranks), timeout=120)
        assert again.returncode == 0 and "resumed from step 2" in again.stdout, again.stderr
    assert checkpoints(tmp_path)[:3] == ["0000000002", "0000000004", "0000000006"]
    steps = [line.partition(",")[0] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps.count('{"step": 4') == 1


@pytest.fixture
def small_disk(tmp_path):
    """Yields a disk of 16 pages that is full but for one, which takes folders and names alone."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def fill(path):
    with open(path / "rest", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_what_is_written_at_the_start_names_its_file_and_leaves_what_was_there(small_disk):
    config = load_config("digits_swin_moe", [])
    dump_config(config, small_disk / "config.yaml")
    fill(small_disk)
    before = (small_disk / "config.yaml").read_bytes()
    with pytest.raises(OSError, match="No space left on device: '.*/config.yaml'"):
        dump_config(config, small_disk / "config.yaml")
    assert (small_disk / "config.yaml").read_bytes() == before and not list(small_disk.glob(".config*"))
    with pytest.raises(OSError, match="No space left on device: '.*/run.lock'"):
        FolderLock(small_disk / "run").take()


def test_a_thread_of_tensorboard_that_finds_no_room_at_its_start_prints_no_traceback(small_disk, monkeypatch):
    printed: list = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    fill(small_disk)
    with pytest.raises(OSError, match="No space left on device: '.*/tb'"):
        for step in range(100):
            metrics._open_board(small_disk / "tb", 0).add_scalar("loss", 1.0, step)
    assert not printed
