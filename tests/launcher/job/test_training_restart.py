"""A real training run loses a rank, is started again by the launcher, and ends as the run that lost nothing."""

import json
import math
import re
import subprocess
import sys

import pytest

from tests.training.test_commands import QUICK, ROOT, environment

pytestmark = [pytest.mark.mpi, pytest.mark.full]
EVERY_STEP = ["log.every=1", "log.eval_every=0", "checkpoint.every=2", "data.workers=0"]
TEN_STEPS = [*QUICK, *EVERY_STEP, "data.global_batch=96", "optim.epochs=0.667"]  # 15 steps an epoch
OF_TIME = re.compile(r"speed/|memory/|.*/ms_")  # what differs from run to run
CONFIG = "digits_swin_moe"


def train(folder, ranks, fault, *options, launcher=(), patience=300.0):
    """Returns the output of a job, which has to end well."""
    program = ["-m", "tests.training.faults", fault, CONFIG] if fault else ["-m", "swin_moe.train", CONFIG]
    command = [sys.executable, "-m", "launcher", "-n", str(ranks), "--no-bind", *launcher, "--", *program]
    command += [*TEN_STEPS, f"run.output={folder}", "engine.timeout=1200", *options]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(anew=True),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def curve(folder):
    """Returns {step: its record without what time it took}; a step that was done twice counts as it was last."""
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        record["step"]: {name: value for name, value in record.items() if not OF_TIME.match(name)}
        for record in records
        if "train/loss" in record
    }


def assert_near(found, expected, tolerance):
    assert found.keys() == expected.keys() == set(range(1, 11))
    for step, record in expected.items():
        same = math.isclose(found[step]["train/loss"], record["train/loss"], rel_tol=tolerance)
        assert same, (step, found[step], record)


def test_the_same_ranks_go_on_to_the_bit(tmp_path):
    train(tmp_path / "whole", 2, "", "model.moe.group_images=12")
    output = train(
        tmp_path / "broken",
        2,
        "kill rank 1 once",
        "model.moe.group_images=12",
        launcher=("--restarts", "1", "--backoff", "0.1", "--log-dir", str(tmp_path / "logs")),
    )
    assert "failure 1 at step 3, of 1 that may be survived; starting again in 0.1 s with 2 ranks" in output
    assert_near(curve(tmp_path / "broken"), curve(tmp_path / "whole"), 0.0)
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")  # routing and gradients, too
    logs = [(tmp_path / "logs" / f"start-{start}" / "rank-00000.log").read_text() for start in (0, 1)]
    assert "finished: step 10 of 10" in logs[1] and "finished" not in logs[0]


def test_32_ranks_lose_one_and_finish_on_24(tmp_path):
    """Oversubscribed: the times of docs/launcher.md are of two cores. A routing group spans 4 ranks, later 3."""
    options = ("model.moe.group_images=12", "data.eval_batch=96")
    train(tmp_path / "whole", 32, "", *options, patience=3600)
    output = train(
        tmp_path / "broken",
        32,
        "kill rank 1 once",
        *options,
        patience=3600,
        launcher=("--restarts", "1", "--backoff", "0.1", "--allowed-ranks", "32,24,16"),
    )
    assert "failure 1 at step 3, of 1 that may be survived; starting again in 0.1 s with 24 ranks" in output
    assert "launcher: program error (exit code 137): rank 1 (" in output
    assert_near(curve(tmp_path / "broken"), curve(tmp_path / "whole"), 1e-6)
