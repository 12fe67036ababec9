"""Kills saves with SIGKILL at chosen system calls and checks what is left.

    python -m tests.checkpoint.crash ROOT COUNT SEED

A program of its own, because the byte path needs no torch and forking is quick without it.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

from swin_moe.checkpoint.directory import find_latest, list_checkpoints
from swin_moe.checkpoint.load import verify
from swin_moe.checkpoint.save import write_checkpoint
from tests.checkpoint.samples import CONFIG, FILE_SIZE, STATE, read_state, same, sample_state, whole_pieces

CALLS = ("open", "mkdir", "ftruncate", "pwrite", "fsync", "rename", "replace", "unlink", "rmdir", "close")


def save(root: Path, step: int, seed: int, **options) -> Path:
    pieces = whole_pieces(sample_state(seed))
    return write_checkpoint(root, step, pieces, state=STATE, config=CONFIG, file_size=FILE_SIZE, **options)


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
                if name == "pwrite":
                    fd, data, offset = args
                    real(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if self._is_now():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def _is_now(self) -> bool:
        self.count += 1
        return self.count - 1 == self.moment


def run_killed(root: Path, step: int, moment: int) -> int:
    """Returns the signal that ended a save in a forked process, 0 if it came to its end; counts go to ROOT.count."""
    child = os.fork()
    if child == 0:
        killer = Killer(moment)
        save(root, step, step, keep=1, best=1.0)
        Path(f"{root}.count").write_text(str(killer.count))
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


def main(root: Path, count: int, seed: int) -> None:
    outcomes: dict[str, int] = {}
    for step in (2, 3):
        prepare(root / f"dry{step}", step)
        assert run_killed(root / f"dry{step}", step, -1) == 0
        total = int(Path(f"{root / f'dry{step}'}.count").read_text())
        for moment in random.Random(seed + step).sample(range(total), min(total, count // 2)):
            here = root / f"{step}-{moment}"
            prepare(here, step)
            assert run_killed(here, step, moment) == signal.SIGKILL
            text = check(here, step)
            outcomes[text] = outcomes.get(text, 0) + 1
    print(json.dumps({"outcomes": outcomes, "torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
