"""Loader processes keep order, pass errors on and end with their parent, whatever ends it."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from swin_moe.data import workers as worker_module
from swin_moe.data.transforms import Patch
from swin_moe.data.workers import WorkerPool


class Square:
    """Doubles as a slow source: later requests finish first."""

    def __getitem__(self, request):
        time.sleep(0.02 * (request % 2))
        if request == 99:
            raise RuntimeError("cannot square 99")
        return request * request


@pytest.mark.parametrize("workers", [0, 2])
def test_order(workers):
    pool = WorkerPool(Square(), range(10), workers=workers)
    assert list(pool) == [n * n for n in range(10)]
    pool.close()
    pool.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_keeps_its_type_and_text(workers):
    pool = WorkerPool(Square(), [1, 99, 2], workers=workers)
    with pytest.raises(RuntimeError, match="cannot square 99"):
        list(pool)
    pool.close()


class OwnProcess:
    """Gives the number of the process that loads; each waits long enough for the other to load too."""

    def __getitem__(self, request):
        time.sleep(0.05)
        return os.getpid()


@pytest.mark.parametrize("number, cause", [(signal.SIGKILL, "lack of memory"), (signal.SIGBUS, "/dev/shm is full")])
def test_a_killed_process_is_one_sentence_at_the_next_batch(number, cause):
    pool = WorkerPool(OwnProcess(), itertools.count(), workers=2)
    items = iter(pool)
    victim = next(items)
    os.kill(victim, number)
    time.sleep(0.5)  # a handler of SIGCHLD that raises would do it here
    sentence = rf"^loader process {victim} \(of data.workers=2\) was killed by {number.name} "
    with pytest.raises(ChildProcessError, match=sentence) as error:
        for _ in items:
            pass
    assert cause in str(error.value)
    pool.close()


PROGRAM = textwrap.dedent("""
    import itertools, os, signal, sys, time
    from swin_moe.data.workers import WorkerPool
    class Source:
        def __getitem__(self, request):
            return os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: print("saving", flush=True))
    pool = WorkerPool(Source(), itertools.count(), workers=2)
    items = iter(pool)
    print(os.getpid(), next(items), next(items), flush=True)
    if sys.argv[1] == "group_signal":
        os.killpg(0, signal.SIGTERM)
        time.sleep(0.3)
        pids = {next(items) for _ in range(20)}
        print(len(pids), flush=True)
    elif sys.argv[1] == "exception":
        raise SystemExit("boom")
    elif sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
""")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("end", ["return", "exception", "group_signal", "killed"])
def test_processes_end_with_their_parent(end):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    out, _ = process.communicate(timeout=60)
    _, *workers = map(int, out.splitlines()[0].split())
    assert len(set(workers)) == 2
    if end == "group_signal":
        assert out.splitlines()[1:] == ["saving", "2"]
    assert process.returncode == {"exception": 1, "killed": -signal.SIGKILL}.get(end, 0)
    deadline = time.monotonic() + 3
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers)), os.getpid()


def test_named_tuples_are_pinned_as_such(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    levels = np.zeros((2, 2, 3), dtype=np.uint8)
    made = worker_module.pin({"patches": [[Patch(1, 2, levels)]], "pixels": Pair(torch.zeros(2), 3)})
    assert made["patches"] == [[Patch(1, 2, levels)]] and torch.equal(made["pixels"].first, torch.ones(2))


class Pair(NamedTuple):
    first: torch.Tensor
    second: int
