"""Every command of README and docs is executed by a test, or says why not (documented.py); a new one needs a row."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swin_moe import cli
from tests.docs import documented
from tests.docs.test_commands_in_docs import PAGES, ROOT, commands

TYPED = {" ".join(words) for page in PAGES for words in commands(page.read_text())}


def test_every_command_has_a_row_and_every_row_a_command():
    rows = documented.RUN.keys() | documented.ELSEWHERE.keys()
    assert rows - TYPED == set() and TYPED - rows == set()
    assert not documented.RUN.keys() & documented.ELSEWHERE.keys()


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
