"""Kills saves, or reshards, with SIGKILL at chosen system calls and checks what is left.

    python -m tests.checkpoint.crash ROOT COUNT SEED [save | background | reshard]

A program of its own, because the byte path needs no torch and forking is quick without it.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options
from checkpoint_tools.sources.stream import write_native
from swin_moe.checkpoint.background import BackgroundSaver
from swin_moe.checkpoint.directory import find_latest, list_checkpoints
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.load import verify
from swin_moe.checkpoint.save import write_checkpoint
from tests.checkpoint.samples import (
    CONFIG,
    FILE_SIZE,
    STATE,
    directory_bytes,
    read_state,
    same,
    sample_state,
    whole_pieces,
)

CALLS = ("open", "mkdir", "ftruncate", "pwrite", "write", "fsync", "rename", "replace", "unlink", "rmdir", "close")


def save(root: Path, step: int, seed: int, *, background: bool = False, **options) -> Path:
    pieces = whole_pieces(sample_state(seed))
    options |= {"state": STATE, "config": CONFIG, "file_size": FILE_SIZE}
    if not background:
        return write_checkpoint(root, step, pieces, **options)
    saver = BackgroundSaver()
    path = saver.start(root, step, pieces, **options)
    for piece in pieces:
        piece.tensor.fill(0)  # as training would
    saver.wait()
    return path


class Killer:
    """Counts system calls, and kills this process half-way through the chosen one."""

    def __init__(self, moment: int) -> None:
        self.count, self.moment = 0, moment
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, real):
        def call(*args, **kwargs):
            # Two moments for each call: before it (a write: after half of it), and after it.
            if self._is_now():
                if name in ("pwrite", "write"):
                    fd, data, *offset = args
                    real(fd, data[: len(data) // 2], *offset)
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if self._is_now():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def _is_now(self) -> bool:
        self.count += 1
        return self.count - 1 == self.moment


def run_killed(work: Callable[[], object], moment: int, count: Path) -> int:
    """Returns the signal that ended `work` in a forked process, 0 if it ended by itself; its calls are counted."""
    child = os.fork()
    if child == 0:
        killer = Killer(moment)
        try:
            work()
            count.write_text(str(killer.count))
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def check(root: Path, step: int) -> str:
    """Returns which checkpoint is there after a kill while `step` was saved; raises if that is not a whole one."""
    latest = find_latest(root, report=lambda text: None)
    assert latest is not None, "every checkpoint was lost"
    for path in list_checkpoints(root):
        verify(path)
    found = verify(latest).step
    state = read_state(latest)
    contents = {1: [1], 2: [2], 3: [3, 103]}[found]  # step 3 may be the one that was there before (seed 103)
    assert any(same(state, sample_state(seed)) for seed in contents), "a mixture was published"
    text = f"{found}:{'new' if same(state, sample_state(step)) else 'old'}"
    save(root, 4, 4)  # the next save works and cleans up
    assert not [p.name for p in root.iterdir() if p.name.startswith(".")], "leftovers stay"
    for path in list_checkpoints(root):
        verify(path)
    return text


def prepare(root: Path, step: int) -> None:
    save(root, 1, 1)
    if step == 3:
        save(root, 3, 103)  # the save that will be killed replaces this one


def kill_saves(root: Path, count: int, seed: int, *, background: bool) -> list[str]:
    """Returns what was there after each kill."""
    outcomes = []
    for step in (2, 3):

        def work(here: Path, step: int = step) -> None:
            save(here, step, step, keep=1, best=1.0, background=background)

        prepare(root / f"dry{step}", step)
        assert run_killed(lambda: work(root / f"dry{step}"), -1, root / "count") == 0  # noqa: B023 - runs now
        total = int((root / "count").read_text())
        for moment in random.Random(seed + step).sample(range(total), min(total, count // 2)):
            here = root / f"{step}-{moment}"
            prepare(here, step)
            assert run_killed(lambda: work(here), moment, root / "count") == signal.SIGKILL  # noqa: B023
            outcomes.append(check(here, step))
    return outcomes


def reshard(source: Path, target: Path, reports: list[str]) -> None:
    options = Options(file_size=FILE_SIZE // 2, report=reports.append)
    with open_source(source, options) as opened:
        write_native(opened, target, options)


def kill_reshards(root: Path, count: int, seed: int) -> list[str]:
    """Returns, after each kill, whether the target was there, and whether the second run continued the first."""
    source, expected = save(root, 1, 1), root / "expected"
    original = directory_bytes(source)
    assert run_killed(lambda: reshard(source, expected, []), -1, root / "count") == 0
    total, outcomes = int((root / "count").read_text()), []
    moments = random.Random(seed)
    for number in range(count):
        target, kills = root / f"{number}" / "out", 0
        # A second kill falls into a run that continues.
        while kills < 2 and run_killed(
            lambda: reshard(source, target, []),  # noqa: B023
            moments.randrange(total),
            root / "count",
        ):
            kills += 1
        there = target.exists()
        reports: list[str] = []
        if there:
            verify(target)
        reshard_again(source, target, reports)
        assert directory_bytes(target) == directory_bytes(expected), "another result"
        assert [p.name for p in target.parent.iterdir()] == ["out"], "leftovers stay"
        assert directory_bytes(source) == original, "the source was changed"
        outcomes.append("there" if there else "continued" if reports else "anew")
    return outcomes


def reshard_again(source: Path, target: Path, reports: list[str]) -> None:
    """Runs the same command to its end; one that finds its work complete and noticed says that it exists."""
    try:
        reshard(source, target, reports)
    except CheckpointError as error:
        assert "exists already" in str(error) and target.exists(), error


def main(root: Path, count: int, seed: int, what: str = "save") -> None:
    if what == "reshard":
        outcomes = kill_reshards(root, count, seed)
    else:
        outcomes = kill_saves(root, count, seed, background=what == "background")
    counted = {text: outcomes.count(text) for text in outcomes}
    print(json.dumps({"outcomes": counted, "torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
