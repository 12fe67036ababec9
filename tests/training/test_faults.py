"""A rank that dies, stops or hangs ends the job with one sentence within engine.timeout; a slow save does not."""

import re
import subprocess
import sys
import time

import pytest

from tests.training.test_commands import QUICK, ROOT, environment, ranks_of

pytestmark = [pytest.mark.mpi, pytest.mark.full]  # limits of seconds: not beside other work
TIMEOUT = 5.0
# What the job may take besides: start-up of 2 ranks on a busy machine, three steps, the end of all processes.
PATIENCE = 120.0

ENDS = {
    "exit rank 1": r"rank 1 exited with code 7; it was last seen in forward of layers\.1\.blocks\.1\.mlp of step 3",
    "stop rank 1": r"rank 1 does not answer any more \(engine.timeout=5 s\); it was last seen \d s ago in .* of step",
    "stop rank 0": r"rank 0 does not answer any more \(engine.timeout=5 s\)",
    "stop rank 0 in save": r"rank 0 does not answer any more \(engine.timeout=5 s\)",
    "stop rank 1 in save": r"rank 1 does not answer any more .*; it was last seen \d+ s ago in saving a checkpoint of",
    # The same phase on both ranks: the one outside a collective is behind.
    "hang in forward": r"rank 1 keeps the others waiting .* forward of layers\.1\.blocks\.1\.mlp of step 3",
    "hang in records": r"rank 1 keeps the others waiting in reduction of gradients and update of step 3 ",
}

SELDOM = ("stop rank 0", "stop rank 0 in save", "hang in records")


def train(directory, fault, *options):
    """Returns the finished job of 2 ranks."""
    program = ["-m", "tests.training.faults", fault, "digits_swin_moe", *QUICK, f"run.output={directory}", *options]
    command = [sys.executable, "-m", "launcher", "-n", "2", "--", *program, f"engine.timeout={TIMEOUT}"]
    return subprocess.run(
        command, env=environment(anew=True), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.full if fault in SELDOM else ()) for fault in ENDS]
)
def test_a_rank_that_is_gone_or_hangs_is_named(tmp_path, fault):
    done = train(tmp_path, fault, "optim.epochs=500", *(["checkpoint.every=3"] if "save" in fault else []))
    ended = time.time()
    assert done.returncode not in (0, None), done.stdout
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and re.search(ENDS[fault], errors[0]), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    last = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime  # the record of the last good step
    patience = 2 * TIMEOUT if "save" in fault else TIMEOUT  # in a long phase beats may be late
    assert ended - last < patience + 10, "it took too long"
    assert not ranks_of(tmp_path)


def test_a_slow_save_is_waited_for(tmp_path):
    done = train(tmp_path, "slow save", "optim.epochs=0.07")
    assert done.returncode == 0 and "finished: step 3 of 3" in done.stdout, done.stderr
