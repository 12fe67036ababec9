"""docs/swinv2_giant.md, followed literally: the giant's commands start, and its small twin is trained by them all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.env import without_world
from swin_moe.planner.command import main as plan

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "swinv2_giant.md").read_text(encoding="ascii")
LAPTOP = "## The same on a laptop"
LINES = re.findall(r"^    \$ (.*)$", TEXT, re.MULTILINE)
EXPORTS = {
    "giant": re.findall(r"^    \$ (export .*)$", TEXT[: TEXT.index(LAPTOP)], re.MULTILINE),
    "laptop": re.findall(r"^    \$ (export .*)$", TEXT[TEXT.index(LAPTOP) :], re.MULTILINE),
}
COMMANDS = [line for line in LINES if not line.startswith(("export ", "swin-moe plan "))]
PROGRAM = f"{sys.executable} -m swin_moe"


def script(where: str, *commands: str) -> str:
    """Returns a shell script of a place's variables and commands."""
    return "\n".join(["set -e", *EXPORTS[where], *(c.replace("swin-moe ", f"{PROGRAM} ", 1) for c in commands)])


def start(text: str, folder: Path) -> subprocess.Popen:
    environment = without_world(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        ["bash", "-c", text],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(text: str, folder: Path) -> str:
    """Returns what a script wrote; it must end well."""
    process = start(text, folder)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    return output


def records(folder: Path, run: str) -> list[dict]:
    lines = (folder / "output" / run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def test_the_page_has_the_commands_that_are_tried():
    verbs = [" ".join(command.split()[1:3]) for command in COMMANDS]
    trains = ["launch $RANKS", "launch $RANKS", "launch $FEWER"]
    assert verbs == [
        *trains,
        "checkpoint upcycle",
        "launch $RANKS",
        "evaluate swinv2_moe_giant_3b_patch4_window12_192_64expert_22k",
    ]
    names = [{line.split("=")[0] for line in re.findall(r"\w+=", " ".join(EXPORTS[where]))} for where in EXPORTS]
    assert (
        names[0] & {"RANKS", "FEWER", "DATA", "DATA_1K", "STAGE1", "STAGE2", "STAGE3", "EXPERTS", "BLOCKS", "MOE"}
        <= names[1]
    )


def test_every_command_of_the_giant_starts(tmp_path):
    (tmp_path / "hosts").write_text("n[001-064]:8\n")
    launches = [c.replace("swin-moe launch ", "swin-moe launch --dry-run ", 1) for c in COMMANDS if " launch " in c]
    assert len(launches) == 4
    output = finish(script("giant", *launches), tmp_path)
    assert output.count("-n 512 ") == 3 and output.count("-n 64 ") == 1
    wrong = launches[0].replace("$STAGE1", "data.micro_batch=19")
    process = start(script("giant", wrong), tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and "is not a multiple of data.micro_batch=19 x 512 ranks" in output


@pytest.mark.full  # five starts on two ranks; tests/tasks and tests/checkpoint_tools have each step by itself
@pytest.mark.mpi
def test_the_small_twin_is_trained_from_simmim_to_experts(tmp_path):
    simmim, fine, large, upcycle, moe, evaluate = COMMANDS
    output = finish(script("laptop", simmim, fine, large, upcycle), tmp_path)
    assert "initial weights: output/giant_simmim" in output and "initial weights: output/giant_22k" in output
    assert "giant_moe_start: the same function" in output
    for run in ("giant_simmim", "giant_22k", "giant_1k"):
        assert records(tmp_path, run)[-1]["step"] == 10
    first = start(script("laptop", moe + " optim.epochs=200 checkpoint.every=2"), tmp_path)
    saved = tmp_path / "output" / "giant_moe" / "checkpoints"
    deadline = time.monotonic() + 900
    while not list(saved.glob("0*/index.json")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGTERM)
    assert "initial weights: giant_moe_start" in first.communicate(timeout=600)[0]
    before = max(int(path.parent.name) for path in saved.glob("0*/index.json"))
    longer = f" optim.epochs={-(-before // 5) + 1}"
    output = finish(script("laptop", moe + longer + " checkpoint.accept_changes=true"), tmp_path)
    assert f"step {before}" in output and "initial weights" not in output
    assert records(tmp_path, "giant_moe")[-1]["step"] == 5 * (-(-before // 5) + 1)
    assert "top1" in finish(script("laptop", evaluate), tmp_path)


@pytest.mark.parametrize(
    "gpus", [64, pytest.param(8, marks=pytest.mark.full), pytest.param(512, marks=pytest.mark.full)]
)
def test_plans_of_the_page_are_the_planners(gpus, capsys):
    (command,) = [line for line in LINES if line.startswith("swin-moe plan ")]
    words = command.replace("--gpus 64", f"--gpus {gpus}").split()[2:]
    assert plan([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["layouts"][0]
    options, giga = found["options"], found["memory_bytes"] / 2**30
    layout = f"{options['engine.name']} ZeRO-{options['parallel.zero']}, "
    (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| {gpus} | ")]
    assert layout in row and options["parallel.recompute"] == "none"
    assert f"| {options['data.micro_batch']} x {found['accumulation']} |" in row
    assert f"| {found['images_per_second']:,.0f} | {found['step_seconds']:.3f} | {giga:.1f} |" in row
