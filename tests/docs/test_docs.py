"""What README and docs name exists: files, symbols of our packages, commands, options; and the limits of the guide."""

import importlib
import re
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from checkpoint_tools.__main__ import VERBS
from swin_moe.cli import COMMANDS
from swin_moe.config import Config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
OUTSIDE = re.compile(r"(microsoft|torch|timm|huggingface|tutel|caffe2|models|docker|site-packages)/")
FILE = re.compile(r"(?<![\w/.*<>-])((?:[\w-]+/)*[\w-]+\.(?:py|sh|cpp|cu|cuh|h|toml|txt))\b(?![\w*<])")
SYMBOL = re.compile(r"(?<![\w/])((?:swin_moe|checkpoint_tools|launcher)(?:\.[A-Za-z_]\w*)+)")
PARTS_WITHOUT_MODULE = {"_C": "swin_moe/ops/extension.py", "configs": "configs"}  # of swin_moe, once installed
# Names of files that runs, builds and other programs make.
MADE = {"log.txt", "nccl.h", "include/cuda_runtime.h", "utils_simmim.py", "classes.txt"}
MADE |= {"objectInfo150.txt"}  # of ADE20K


def tracked() -> list[str]:
    """Returns the files of the checkout, as git or the disk knows them."""
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0:
        return found.stdout.split()
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts]


FILES = tracked()


def missing_files(text: str) -> list[str]:
    """Returns the files named in a text that are no file here; a name may be the end of a path."""
    names = {name for name in FILE.findall(text) if not OUTSIDE.match(name)} - MADE
    ours = (name for name in names if not name.startswith("my_"))  # the reader's own
    return sorted(n for n in ours if not any(f == n or f.endswith(f"/{n}") for f in FILES))


def missing_symbols(text: str) -> list[str]:
    """Returns the dotted names of our packages in a text that nothing here has."""
    names = {name for name in SYMBOL.findall(text) if not name.endswith(".md")}
    return sorted(name for name in names if not exists(name))


def exists(name: str) -> bool:
    """Returns whether a dotted name is a module, an attribute, or an operator or library of ours."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for attribute in parts[end:]:
            if not hasattr(found, attribute):
                return attribute in PARTS_WITHOUT_MODULE
            found = getattr(found, attribute)
        return True
    return False


def options(section: type = Config, prefix: str = "") -> set[str]:
    """Returns all dotted option names."""
    found = set()
    hints = get_type_hints(section)
    for field in fields(section):
        kind = hints[field.name]
        found.add(prefix + field.name)
        if isinstance(kind, type) and is_dataclass(kind):
            found |= options(kind, f"{prefix}{field.name}.")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_symbol_it_names_exists(page):
    text = page.read_text()
    assert missing_files(text) == []
    assert missing_symbols(re.sub(r"torch\.ops\.swin_moe\.\S*", "", text)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_it_names_exists(page):
    text = page.read_text()
    commands = set(re.findall(r"swin-moe ([a-z][a-z-]+)\b", text)) - {"checkpoint"}
    assert commands <= set(COMMANDS)
    assert set(re.findall(r"swin-moe checkpoint ([a-z]+)\b", text)) <= set(VERBS)
    known = options()
    sections = {name.partition(".")[0] for name in known if "." in name}
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})(?:\.[a-z_0-9]+)+)(?==)", text)
    assert {name for name in named if not name.startswith("task.own.")} <= known  # those the reader's task brings


def test_the_architecture_page_keeps_its_limits():
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    assert len(lines) <= 300
    assert max(map(len, lines)) <= 120


def test_the_architecture_page_names_every_command():
    named = re.search(r"`swin-moe \{([^}]*)\}`", (ROOT / "docs" / "architecture.md").read_text())
    assert named and set(re.sub(r"\s", "", named[1]).split(",")) == set(COMMANDS)


def test_the_checks_see_what_is_not_there():
    assert missing_files("see swin_moe/nowhere.py and layout.py and models/swin.py") == ["swin_moe/nowhere.py"]
    assert missing_symbols("swin_moe.layout.Chunk, swin_moe.layout.Box, swin_moe.nowhere") == [
        "swin_moe.layout.Box",
        "swin_moe.nowhere",
    ]
