"""run_ranks itself: results in order, the traceback of a failing rank, the time limit."""

import os
import subprocess
import time

import pytest
import torch
from torch import distributed

from tests.ranks import run_ranks

pytestmark = pytest.mark.mpi


def add_ranks(offset):
    total = torch.tensor([distributed.get_rank() + offset])
    distributed.all_reduce(total)
    return distributed.get_rank(), total


def fail_on_rank_1():
    if distributed.get_rank() == 1:
        raise KeyError("rank one is unhappy")
    distributed.barrier()


def sleep_and_say_pid(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(120)


@pytest.mark.parametrize("world", [1, 2])
def test_returns_results_in_rank_order(world, tmp_path):
    results = run_ranks(add_ranks, world, tmp_path, 10)
    assert [rank for rank, _ in results] == list(range(world))
    assert all(total.item() == 10 * world + world * (world - 1) // 2 for _, total in results)


def test_a_failing_rank_raises_with_its_traceback(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)\[rank 1\].*fail_on_rank_1.*rank one is unhappy"):
        run_ranks(fail_on_rank_1, 2, tmp_path)


def test_a_timeout_kills_every_rank(tmp_path, monkeypatch):
    communicate = subprocess.Popen.communicate

    def started() -> list[int]:
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]

    def run_out(process, input=None, timeout=None):
        if timeout is None:
            return communicate(process)
        while len(started()) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", run_out)
    with pytest.raises(AssertionError, match="took over 100 s"):
        run_ranks(sleep_and_say_pid, 2, tmp_path, tmp_path, timeout=100)
    deadline = time.monotonic() + 60  # they would sleep for 120
    while any(os.path.exists(f"/proc/{pid}/cmdline") and open(f"/proc/{pid}/cmdline").read() for pid in started()):
        assert time.monotonic() < deadline, "a rank outlived the time limit"
        time.sleep(0.1)
