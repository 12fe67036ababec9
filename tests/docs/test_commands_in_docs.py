"""Commands in README and docs: their options and configs are accepted; those of own_photos.md run (--full)."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from swin_moe.cli import COMMANDS
from swin_moe.config import Config
from swin_moe.config.coerce import schema_keys
from swin_moe.config.io import config_files, load_config
from swin_moe.usage import completion
from tests.commands.test_usage import run
from tests.curate.test_curate import folders

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
START = re.compile(r"(?:swin-moe|(?:\.venv/bin/)?python -m (?:swin_moe|launcher))\b")
NAMES = {path.stem for path in config_files()}
TAKES_CONFIG = ("train", "evaluate", "evaluate-features", "throughput")


def commands(text: str) -> list[list[str]]:
    """Returns the words of every command in the code blocks of a page, without comments, pipes and redirections."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [*fenced, *("\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE)),)]
    found = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines():
        words = re.sub(r"^((?:\w+=\S*|nohup|time|salloc .* --) )+", "", line.strip())
        if not START.match(words):
            continue
        words = re.sub(r"\s+#.*$", "", words)
        lexer = shlex.shlex(words, posix=True, punctuation_chars="|>&;()")
        lexer.whitespace_split, lexer.commenters = True, ""
        split = []
        for word in lexer:
            if word in ("|", ">", "&", ";", ">>", "&&", "2>", "||"):
                break
            split.append(word)
        found.append(split)
    return found


def wrong_with(words: list[str]) -> str:
    """Returns why a command would be refused before it does anything; "" where it would not be."""
    if words[0] != "swin-moe":
        if words[2].count(".") > 1:  # no command, but a module of ours
            return "" if importlib.util.find_spec(words[2]) else f"no module {words[2]}"
        name = words[2].removeprefix("swin_moe").lstrip(".").replace("_", "-")
        words = ["swin-moe", *(["launch"] if words[2] == "launcher" else [name] if name else []), *words[3:]]
    command, rest = words[1], words[2:]
    if command.startswith("-") or command not in COMMANDS:
        return "" if command in ("--version", "--help", "COMMAND", "VERB") else f"no command {command}"
    if command == "launch":
        program = rest[rest.index("--") + 1 :] if "--" in rest else []
        if program[:1] == ["-m"] and len(program) > 2 and program[1].startswith("swin_moe."):
            return wrong_with(["python", *program])
        return ""
    if command in TAKES_CONFIG and rest and rest[0] in NAMES:
        overrides = [w for w in rest[1:] if "=" in w and "..." not in w and not w.startswith("-")]
        overrides = [w for w in overrides if re.search(r"=.*[a-z0-9\[\"'=]", w) or w.endswith("=")]
        try:
            load_config(rest[0], overrides)
        except ValueError as error:
            return str(error)
    known = set(schema_keys(Config))
    for word in rest:
        key = word.partition("=")[0]
        if command in TAKES_CONFIG and re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", key) and "=" in word:
            if key not in known and not key.startswith("task.own."):
                return f"no option {key}"
    options = [word.partition("=")[0] for word in rest if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)]
    if command == "checkpoint" and rest and rest[0] in completion.VERBS["checkpoint"]:
        shown = run(["checkpoint", rest[0], "--help"])[1]
        return "".join(f"no {option}" for option in options if not re.search(rf"{option}\b", shown))
    return "".join(f"no {o}" for o in options if o not in (*completion.OPTIONS[command], "--help"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_would_be_accepted(page):
    refused = {" ".join(words): wrong_with(words) for words in commands(page.read_text())}
    assert {command: why for command, why in refused.items() if why} == {}


def test_wrong_commands_are_seen():
    text = "x\n\n    swin-moe train digits_dense optim.lrr=2   # no\n    FOO=1 swin-moe data check p --jso | less\n"
    bad, worse = commands(text)
    assert bad[-1] == "optim.lrr=2" and "optim.lrr" in wrong_with(bad) and wrong_with(worse) == "no --jso"
    assert wrong_with(["python", "-m", "swin_moe.trian", "x"]) == "no command trian"


@pytest.mark.full
def test_own_photos_without_weights_are_as_written(tmp_path):
    """Every command of that block, in a folder with photos of three classes; one epoch."""
    text = (ROOT / "docs" / "own_photos.md").read_text().partition("## Without pretrained weights")[2]
    typed = commands(text)
    assert [words[1] for words in typed] == ["data", "data", "train", "report", "predict", "train"] and len(typed) <= 12
    folders(tmp_path / "photos", 10)
    folders(tmp_path / "new", 1, ("a",))
    folders(tmp_path / "more", 10)
    subprocess.run(
        [sys.executable, "-m", "swin_moe", *"data split more --out more_split".split()], cwd=tmp_path, check=True
    )
    for words in typed:
        more = ["optim.epochs=1", "optim.warmup_epochs=0", "log.tensorboard=false"] if words[1] == "train" else []
        last = ["new"] if words[1] == "predict" else words[3:]
        line = [sys.executable, "-m", "swin_moe", *words[1:3], *last, *more]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr[-800:])
    assert "initial weights: output/mine" in (tmp_path / "output/more/log-rank0.txt").read_text()
