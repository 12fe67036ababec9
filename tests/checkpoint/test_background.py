"""Saving in the background: the state at the call whatever happens to the tensors, one copy, errors at the next."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from swin_moe.checkpoint.background import BackgroundSaver
from swin_moe.checkpoint.directory import list_checkpoints
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.load import verify
from swin_moe.checkpoint.manager import CheckpointManager
from swin_moe.checkpoint.pieces import Piece
from swin_moe.checkpoint.save import write_checkpoint
from tests.checkpoint.samples import (
    CONFIG,
    FILE_SIZE,
    STATE,
    directory_bytes,
    rank_pieces,
    run_threads,
    sample_state,
    whole_pieces,
)
from tests.ranks import ROOT

OPTIONS = {"state": STATE, "config": CONFIG, "file_size": FILE_SIZE}
SAVE = sys.modules["swin_moe.checkpoint.save"]


@pytest.fixture
def gate(monkeypatch):
    """An event that the threads wait for before they write."""
    event, real = threading.Event(), SAVE.write_shares

    def write(*arguments):
        assert event.wait(10)
        real(*arguments)

    monkeypatch.setattr(SAVE, "write_shares", write)
    yield event
    event.set()


@pytest.mark.parametrize("ranks", [1, 4])
def test_what_is_written_is_the_state_at_the_call(tmp_path, gate, ranks):
    started = threading.Barrier(ranks)

    def save_rank(comm):
        saver = BackgroundSaver()
        pieces = rank_pieces(sample_state(), comm.rank, expert=ranks, shard=1)
        path = saver.start(tmp_path / "background", 1, pieces, comm=comm, **OPTIONS)
        assert not path.exists()
        for piece in pieces:
            piece.tensor.fill(1)
        started.wait()
        gate.set()
        saver.wait()
        return path

    path = run_threads(ranks, save_rank)[0]
    gate.set()
    expected = write_checkpoint(tmp_path / "direct", 1, whole_pieces(sample_state()), **OPTIONS)
    assert directory_bytes(path) == directory_bytes(expected)


def test_a_rank_copies_only_what_it_writes_and_once(tmp_path):
    def save_rank(comm):
        saver = BackgroundSaver()
        pieces = rank_pieces(sample_state(), comm.rank, expert=2, shard=1)
        copies = []
        for step in (1, 2):
            saver.start(tmp_path, step, pieces, comm=comm, **OPTIONS)
            copies.append({key: id(copy) for key, copy in saver._copies.items()})
        saver.wait()
        assert copies[0] == copies[1], "memory of the first save serves the second"
        return sum(copy.nbytes for copy in saver._copies.values())

    total = sum(array.nbytes for array in sample_state().values())
    experts = sum(array.nbytes for name, array in sample_state().items() if ".experts." in name)
    # Rank 0 writes the dense tensors, which both hold.
    assert run_threads(2, save_rank) == [total - experts // 2, experts // 2]


def test_saves_follow_each_other_and_reuse_no_tensor_of_another_shape(tmp_path, gate):
    saver = BackgroundSaver()
    saver.start(tmp_path, 1, whole_pieces({"w": np.ones(3)}), **OPTIONS)
    second = threading.Thread(
        target=saver.start, args=(tmp_path, 2, whole_pieces({"w": np.ones((2, 2), "f4")})), kwargs=OPTIONS
    )
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second waits for the first"
    gate.set()
    second.join()
    saver.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0000000002", "0000000001"]


def fail_on_rank(monkeypatch, failing):
    real = SAVE.write_shares

    def write(staging, plan, pieces, shares, to_raw):
        if failing(pieces):
            raise OSError(28, "No space left on device", str(staging))
        real(staging, plan, pieces, shares, to_raw)

    monkeypatch.setattr(SAVE, "write_shares", write)


@pytest.mark.parametrize("then", ["wait", "start"])
def test_a_failure_is_raised_on_every_rank_at_the_next_call_once(tmp_path, monkeypatch, then):
    write_checkpoint(tmp_path, 1, whole_pieces(sample_state()), **OPTIONS)

    def save_rank(comm):
        saver = BackgroundSaver()
        pieces = rank_pieces(sample_state(), comm.rank, expert=2, shard=1)
        with monkeypatch.context() as patch:
            if comm.rank == 0:
                fail_on_rank(patch, lambda held: len(held) < 5)  # rank 1 holds only its experts
            comm.all_gather(None)
            saver.start(tmp_path, 2, pieces, comm=comm, **OPTIONS)
            saver._thread.join()
            comm.all_gather(None)
        assert saver.failed
        with pytest.raises(CheckpointError, match="rank 1: .*No space left on device"):
            saver.wait() if then == "wait" else saver.start(tmp_path, 3, pieces, comm=comm, **OPTIONS)
        assert not saver.failed
        saver.start(tmp_path, 4, pieces, comm=comm, **OPTIONS)
        saver.wait()

    assert run_threads(2, save_rank) == [None, None]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000001", "0000000004"]


def test_a_save_that_cannot_be_planned_fails_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint.file_size"):
        BackgroundSaver().start(tmp_path, 1, whole_pieces(sample_state()), **(OPTIONS | {"file_size": 0}))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_manager_saves_torch_tensors_either_way(tmp_path, asynchronous):
    tensors = {"w": torch.randn(5, 3).t(), "b": torch.randn(4).bfloat16(), "s": torch.tensor(7)}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    manager = CheckpointManager(tmp_path, keep=1, asynchronous=asynchronous)
    for step in (1, 2):
        path = manager.save(step, [Piece.of(n, t) for n, t in tensors.items()], state={}, config={}, best=0.5)
    for tensor in tensors.values():
        tensor.zero_()
    manager.wait()
    assert list_checkpoints(tmp_path) == [path] and not manager.failed
    manager.resume([Piece.of(n, t) for n, t in tensors.items()])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def test_several_ranks_need_a_group_of_their_own(tmp_path):
    group = type("Group", (), {"rank": 0, "size": 2, "all_gather": lambda self, value: [value] * 2})()
    with pytest.raises(ValueError, match="a process group of its own"):
        CheckpointManager(tmp_path, group=group, asynchronous=True)


def test_closing_reports_a_failure_and_hides_no_other_error(tmp_path, monkeypatch):
    fail_on_rank(monkeypatch, lambda held: True)
    manager, said = CheckpointManager(tmp_path, asynchronous=True), []
    manager.save(1, whole_pieces(sample_state()), state={}, config={})
    manager.close(report=said.append)
    assert len(said) == 1 and "could not be saved" in said[0] and "No space left" in said[0]
    manager.close(report=said.append)
    assert len(said) == 1


def test_the_interpreter_waits_for_a_save_that_a_daemon_started(tmp_path):
    """The last save of a run that ends without `wait`, begun in a thread of a framework that is a daemon."""
    code = (
        "import sys, threading, time\n"
        "import numpy as np\n"
        "from swin_moe.checkpoint.background import BackgroundSaver\n"
        "from swin_moe.checkpoint.pieces import Piece, array_to_raw\n"
        "def slow(array):\n"
        "    time.sleep(0.3)\n"
        "    return array_to_raw(array)\n"
        "def begin():\n"
        "    pieces = [Piece.of('a', np.ones(4))]\n"
        "    BackgroundSaver().start(sys.argv[1], 1, pieces, state={}, config={}, to_raw=slow)\n"
        "thread = threading.Thread(target=begin, daemon=True)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["0000000001"] and verify(tmp_path / "0000000001")
