"""The pages docs/adding_*.md, followed literally: the file of a page is written down, its command runs."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from swin_moe import train
from swin_moe.run.session import run_main
from tests.training.test_commands import QUICK

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [page for page in sorted(DOCS.glob("adding_*.md")) if "    $ " in page.read_text()]
TINY = [word for word in QUICK if not word.startswith(("model.moe", "run.name"))]


def code_of(text: str) -> tuple[str, str]:
    """Returns (name, content) of the file that a page shows."""
    block = re.search(r"^    # (\w+\.py)\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    assert block, "the page shows none"
    return block[1], re.sub(r"^    ", "", block[2], flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_works(page, tmp_path, monkeypatch):
    text = page.read_text()
    name, code = code_of(text)
    (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = shlex.split(re.search(r"^    \$ (.*)", text, re.MULTILINE)[1])
    assert command[:2] == ["swin-moe", "train"]
    config, *options = command[2:]
    tiny = QUICK if config == "digits_swin_moe" else [*TINY, "task.mask_patch_size=4"]
    try:
        run_main(train.main, [config, *tiny, *options, f"run.output={tmp_path}", "run.name=run"])
    finally:
        sys.modules.pop(name.removesuffix(".py"), None)
    assert list((tmp_path / "run" / "checkpoints").glob("0*/index.json"))


def test_all_kinds_have_a_page():
    assert {page.stem for page in PAGES} == {"adding_a_router", "adding_a_choice", "adding_a_task", "adding_an_engine"}
