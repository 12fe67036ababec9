"""Help, completion and did-you-mean of every command: they tell what is there, and load no torch for it."""

import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from checkpoint_tools.__main__ import VERBS
from swin_moe import cli
from swin_moe.config import Config
from swin_moe.config.arguments import refuse_options
from swin_moe.config.coerce import schema_keys
from swin_moe.config.io import config_files, load_config
from swin_moe.config.synonyms import ELSEWHERE, WORDS
from swin_moe.usage import completion
from swin_moe.usage.completion import candidates
from swin_moe.usage.texts import USAGES

# It imports what it measures.
HEAVY = ("doctor",)


def run(words: list[str]) -> tuple[int, str, str]:
    """Returns (exit code, output, errors) of swin-moe, run in this process."""
    before, sys.argv = sys.argv, ["swin-moe", *words]
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_options_and_three_examples(name):
    code, out, _ = run([name, "--help"])
    assert code == 0 and out.lower().startswith("usage: ") and "examples:" in out
    examples = out.partition("examples:")[2]
    assert len(re.findall(r"^    (?:find .*\| )?(?:swin-moe|python -m launcher)\b", examples, re.M)) >= 3
    for option in completion.OPTIONS[name]:
        shown = out
        if name == "data":
            shown = run([name, "check", "-h"])[1] + run([name, "split", "-h"])[1]
        assert re.search(rf"{option}\b", shown), f"{name} has no {option}"


EXAMPLE = re.compile(
    r"(?:swin-moe (?!launch|checkpoint|data|weights|report|configs)\S+|-m swin_moe\.\w+) ([a-z][\w-]+)\b(?![./=])"
)


def test_configs_in_examples_are_shipped():
    named = {
        config
        for name in cli.COMMANDS
        for config in EXAMPLE.findall(run([name, "--help"])[1].partition("examples:")[2])
    }
    assert "digits_swin_moe" in named and not EXAMPLE.findall("swin-moe train mine.yaml")
    shipped = {path.stem for path in config_files()}
    assert named - shipped - {"bash", "zsh", "fish"} == set()


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "launch"])
def test_completion_knows_every_option_of_the_help(name):
    pages = [run([name, "--help"])[1]]
    if name == "data":
        pages += [run([name, verb, "-h"])[1] for verb in completion.VERBS["data"]]
    text = "\n".join(page.partition("examples:")[0] for page in pages)
    told = set(re.findall(r"(?:^  |\[)(--[a-z0-9][\w-]*)", text, re.M))  # in a list of options, or in the first lines
    assert told - {"--help"} == set(completion.OPTIONS[name])


def test_every_command_completes_and_verbs_are_those_there_are():
    assert completion.OPTIONS.keys() == cli.COMMANDS.keys()
    assert completion.VERBS["checkpoint"] == tuple(VERBS)
    for verb in completion.VERBS["weights"] + completion.VERBS["data"]:
        assert verb in run(["weights" if verb in completion.VERBS["weights"] else "data", "--help"])[1]


@pytest.mark.parametrize(
    "words, found",
    [
        (["tr"], ["train "]),
        (["evaluate-"], ["evaluate-features "]),
        (["train", "digits_swin"], ["digits_swin_moe "]),
        (
            ["train", "digits_swin_moe", "optim.warmup_"],
            ["optim.warmup_lr=", "optim.warmup_epochs=", "optim.warmup_prefix="],
        ),
        (["predict", "x", "--to"], ["--top "]),
        (["data", ""], ["check ", "split "]),
        (["data", "split", "photos", "--ho"], ["--how "]),
        (["weights", "fetch", "swin_tiny_patch4_window7_224_22k"], None),
        (["launch", "-n", "2", "--", "-m", "swin_moe.train", "digits_pro"], ["digits_probe "]),
        (["launch", "-n", "2", "--", "-m", "swin_moe.train", "x", "run.se"], ["run.seed="]),
        (["predict", "output/mine", "photo"], []),
        (["nonsense", "x"], []),
        ([], [f"{name} " for name in cli.COMMANDS] + ["--version ", "--help "]),
    ],
)
def test_what_is_completed(words, found):
    if found is None:
        assert {"swin_tiny_patch4_window7_224_22k ", "swin_tiny_patch4_window7_224_22kto1k_finetune "} == set(
            candidates(words)
        )
    else:
        assert sorted(candidates(words)) == sorted(found)


COMPLETE_IN_BASH = """
swin-moe() { "$PYTHON" -m swin_moe "$@"; }
source <(swin-moe completion bash)
COMP_WORDS=(swin-moe train digits_swin_moe optim.warmup_l); COMP_CWORD=3
_swin_moe; printf '[%s]' "${COMPREPLY[@]}"
COMP_WORDS=(swin-moe pred); COMP_CWORD=1
_swin_moe; printf '[%s]' "${COMPREPLY[@]}"
"""


def test_bash_completes_with_the_script():
    done = subprocess.run(
        ["bash", "-c", COMPLETE_IN_BASH],
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[optim.warmup_lr=][predict ]", done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_the_script(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    script = run(["completion", shell])[1]
    assert subprocess.run([shell, "-n"], input=script, text=True).returncode == 0


WITHOUT_TORCH = """
import json, sys
from swin_moe import cli
for words in json.loads(sys.argv[1]):
    sys.argv = ["swin-moe", *words]
    try:
        cli.main()
    except SystemExit:
        assert "torch" not in sys.modules, words
"""


def test_no_torch_is_loaded_to_be_asked():
    asked = [["--version"], ["--help"], ["trian"], ["completion", "bash"], ["throughput"], ["data", "check", "-h"]]
    asked += [
        ["completion", "words", "--", "train", "x", "optim."],
        ["predict", "-h"],
        ["show", "digits_swin_moe", "lr=1"],
    ]
    asked += [[name, "--help"] for name in cli.COMMANDS if name not in HEAVY]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, json.dumps(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


UNREAD = {
    "swin_moe": ["show digits_swin_moe", "checkpoint --help", "predict --help", "plan --help", "data check --help"],
    "checkpoint_tools": ["--help", "inspect --help"],
    "launcher": ["--help", "-n 2 --dry-run -- -m swin_moe.train digits_swin_moe"],
    "swin_moe.doctor": ["--help"],
}


@pytest.mark.parametrize(("module", "command"), [(module, words) for module in UNREAD for words in UNREAD[module]])
@pytest.mark.parametrize(
    "buffered", [pytest.param(True, marks=pytest.mark.full, id="buffered"), pytest.param(False, id="unbuffered")]
)
def test_an_output_that_nobody_reads_on_ends_in_silence(module, command, buffered, tmp_path):
    """Unbuffered, argparse itself meets the closed pipe, and would swallow that."""
    errors = tmp_path / "errors"
    words = f"{sys.executable} -m {module} {command} 2>{errors} | true; echo ${{PIPESTATUS[0]}}"
    own = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    own |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=own)
    assert done.stdout == "141\n" and not done.stderr
    assert "Error" not in errors.read_text() and "Traceback" not in errors.read_text()


@pytest.mark.parametrize("command", ["-m swin_moe --help", "-m swin_moe configs", "-m checkpoint_tools --help"])
def test_a_full_disk_behind_the_output_is_one_sentence(command):
    done = subprocess.run(["bash", "-c", f"{sys.executable} {command} > /dev/full"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_without_a_stream_a_command_does_its_work(closed, tmp_path):
    program = "import csv, sys; from pathlib import Path; from swin_moe.run.session import run_main; "
    program += (
        f"run_main(lambda _: (csv.writer(sys.stdout), sys.stderr.flush(), Path({str(tmp_path / 'x')!r}).touch()), [])"
    )
    for command in ("-m swin_moe --version", f"-c {shlex.quote(program)}"):
        words = ["bash", "-c", f"{sys.executable} {command} {closed}"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), command
    assert (tmp_path / "x").exists()


def test_a_rank_that_nobody_reads_on_ends_in_silence():
    program = "from swin_moe.run.session import run_main; run_main(lambda _: print('x'), [])"
    words = f"{sys.executable} -c {shlex.quote(program)} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert done.stdout == "141\n" and not done.stderr


def test_the_usage_of_a_module_is_that_of_the_command():
    for name, text in USAGES.items():
        assert text.split()[2] == name and hasattr(importlib.import_module(cli.COMMANDS[name][0]), "main")


def test_words_of_other_programs_name_options_that_there_are():
    keys = set(schema_keys(Config))
    assert {key for key, _ in WORDS.values()} <= keys
    assert not WORDS.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize(
    "word, said",
    [
        ("learning_rate", "did you mean optim.lr?"),
        ("optim.learning_rate", "did you mean optim.lr"),
        ("epochs", "did you mean optim.epochs?"),
        ("batch_size", "did you mean data.global_batch (images of a step over all ranks)?"),
        ("data.batch_size", "did you mean data.global_batch (images of a step over all ranks)?"),
        ("optim.optimizer", "did you mean optim.name?"),
        ("optim.wd", "did you mean optim.weight_decay?"),
        ("fp16", "did you mean engine.precision?"),
        ("gpus", "ranks are the launcher's: swin-moe launch -n N"),
        ("pretrained", "did you mean checkpoint.init (weights to begin with)?"),
        ("data_dir", "did you mean data.path?"),
        ("model.experts", "did you mean model.moe.num_experts (over all ranks)?"),
        ("optim.lrr", "did you mean optim.lr"),
    ],
)
def test_a_word_of_another_program_is_answered_with_ours(word, said):
    with pytest.raises(ValueError) as refused:
        load_config("digits_swin_moe", [f"{word}=1"])
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("word", ["--batch-size", "--batch_size=8", "--lr", "--num-epochs"])
def test_an_option_of_another_program_is_answered_with_ours(word):
    with pytest.raises(
        ValueError, match=r"train has no option .*; did you mean (data\.global_batch|optim\.\w+)=\.\.\."
    ):
        refuse_options("train", [word])
