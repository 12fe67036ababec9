"""Every command of README and docs is executed by a test, or says why not (documented.py); a new one needs a row."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launcher.env import without_world
from swin_moe import cli
from swin_moe.planner.hardware import hardware_folder
from tests.docs import documented
from tests.docs.test_commands_in_docs import PAGES, ROOT, commands

TYPED = {" ".join(words) for page in PAGES for words in commands(page.read_text())}


def test_every_command_has_a_row_and_every_row_a_command():
    tables = (documented.RUN, documented.STARTED, documented.ELSEWHERE)
    rows = {typed for table in tables for typed in table}
    assert rows - TYPED == set() and TYPED - rows == set()
    assert len(rows) == sum(map(len, tables))


def test_most_are_executed_and_what_executes_them_is_there():
    reasons = {value for name, value in vars(documented).items() if name.isupper() and isinstance(value, str)}
    files = {value for value in documented.ELSEWHERE.values() if value.startswith("tests/")}
    assert all((ROOT / file).is_file() for file in files)
    unexecuted = {typed for typed, how in documented.ELSEWHERE.items() if not how.startswith("tests/")}
    assert {documented.ELSEWHERE[typed] for typed in unexecuted} <= reasons
    assert len(unexecuted) <= 36


def code_of(words: list[str]) -> int:
    """Returns the exit code of swin-moe, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["swin-moe", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """Returns the folder that commands are typed in."""
    root = tmp_path_factory.mktemp("documented")
    draw = np.random.default_rng(0)
    for name in ("photos/cat", "photos/dog", "new"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, 256, (40, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    shutil.copy(hardware_folder() / "cpu.yaml", root / "mine.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert code_of(f"train digits_swin_moe run.name=digits {documented.SMALL}".split()) == 0
    return root


@pytest.mark.parametrize(
    "typed",
    [pytest.param(t, marks=pytest.mark.full if t.startswith(documented.LONG) else ()) for t in documented.RUN],
)
def test_it_runs(typed, desk, monkeypatch, capfd):
    monkeypatch.chdir(desk)
    words = documented.RUN[typed] or typed.removeprefix("swin-moe ")
    assert code_of(words.split()) == 0, capfd.readouterr().err


@pytest.mark.mpi
@pytest.mark.full
@pytest.mark.parametrize("typed", documented.STARTED)
def test_it_starts_ranks_and_ends(typed, desk):
    if "deepspeed" in typed:
        pytest.importorskip("deepspeed")
    words = (documented.STARTED[typed] or typed).split()
    module = words[1:] if words[0] == "python" else ["-m", "swin_moe", *words[1:]]
    environ = without_world(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *module], cwd=desk, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
