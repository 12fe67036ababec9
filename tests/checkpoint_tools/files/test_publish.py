"""Foreign files appear all together or not at all, also after a kill between two renames."""

import os
import random
import signal

import pytest

from checkpoint_tools.files.publish import Lock, finish_publishing, hidden, publish_files
from swin_moe.checkpoint.errors import CheckpointError
from tests.checkpoint.crash import run_killed
from tests.checkpoint.samples import run_threads

NAMES = ["x.pth.rank0", "x.pth.rank1", "x.pth.rank2"]


def publish(path, comm=None):
    def write(staging):
        for number, name in enumerate(NAMES):
            if comm is None or number % comm.size == comm.rank:
                (staging / name).write_text(name)

    publish_files(path, 100, write, comm=comm)


def found(path):
    return sorted(p.name for p in path.parent.iterdir())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_ranks_files_appear_together(tmp_path, ranks):
    run_threads(ranks, lambda comm: publish(tmp_path / "x.pth", comm))
    assert found(tmp_path / "x.pth") == NAMES
    assert [(tmp_path / name).read_text() for name in NAMES] == NAMES


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.full)])
def test_a_kill_leaves_all_or_nothing(tmp_path, count):
    assert run_killed(lambda: publish(tmp_path / "dry" / "x.pth"), -1, tmp_path / "count") == 0
    total, draw, outcomes = int((tmp_path / "count").read_text()), random.Random(0), set()
    for number in range(count):
        path = tmp_path / str(number) / "x.pth"
        moment = draw.randrange(total)
        assert run_killed(lambda: publish(path), moment, tmp_path / "count") == signal.SIGKILL  # noqa: B023
        path.parent.mkdir(exist_ok=True)
        finish_publishing(path)  # what every verb begins with
        left = [name for name in found(path) if not name.startswith(".")]
        assert left in ([], NAMES)
        outcomes.add(len(left))
        if not left:
            publish(path)
        assert found(path) == NAMES and all((path.parent / name).read_text() == name for name in NAMES)
    assert outcomes == {0, 3}


def test_what_is_there_stays(tmp_path):
    (tmp_path / NAMES[1]).write_text("precious")
    with pytest.raises(CheckpointError, match=f"{NAMES[1]}: exists already"):
        publish(tmp_path / "x.pth")
    assert found(tmp_path / "x.pth") == [NAMES[1]] and (tmp_path / NAMES[1]).read_text() == "precious"


def test_a_failure_on_one_rank_leaves_nothing(tmp_path):
    def run(comm):
        def write(staging):
            (staging / f"x.{comm.rank}").write_text("")
            if comm.rank == 1:
                raise OSError(28, "No space left on device", str(staging / "x.1"))

        publish_files(tmp_path / "x", 1, write, comm=comm)

    results = run_threads(2, run)
    assert all("rank 1: " in str(error) and "x.1: No space left" in str(error) for error in results)
    assert list(tmp_path.iterdir()) == []


def test_files_that_another_process_is_moving_are_left_to_it(tmp_path):
    ready = hidden(tmp_path / "x", "ready")
    ready.mkdir()
    (ready / "x.0").write_text("")
    with Lock(ready) as lock:
        lock.take()
        with pytest.raises(CheckpointError, match="another run is writing it now"):
            finish_publishing(tmp_path / "x")
        assert os.listdir(ready) == ["x.0"]
    finish_publishing(tmp_path / "x")
    assert found(tmp_path / "x") == ["x.0"]
