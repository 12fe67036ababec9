"""Wrong input to every command, config key and Python entry point: refused in one sentence, or it works.

Never a traceback, a message of torch or numpy, a hang or a memory blow-up. `make test` runs 50 inputs, `make test-full`
2,000; docs/test_full.md has the counts.
"""

import collections
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.fuzz import broken
from tests.fuzz.cases import draw_case
from tests.fuzz.children import Runner
from tests.fuzz.files import make_files
from tests.fuzz.oracle import judge_call, judge_command
from tests.ranks import ROOT

SEED, CHUNK = 31, 100


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as started:
        yield started


def check(runner: Runner, first: int, count: int, files: dict[str, str], folder) -> collections.Counter:
    """Returns how often what happened; fails with every input that went wrong and the line that repeats it."""
    results = runner.run_cases(SEED, range(first, first + count), files, folder)
    assert [r.number for r in results] == list(range(first, first + count))
    wrong = [r.report(SEED, draw_case(SEED, r.number, files, folder)) for r in results if r.outcome == "wrong"]
    assert not wrong, "\n\n".join(wrong)
    return collections.Counter(r.outcome for r in results)


def test_wrong_input_is_refused_in_one_sentence_or_works(runner, files, tmp_path):
    counts = check(runner, 0, 50, files, tmp_path)
    assert counts["refused"] >= 25 and counts["works"] >= 3, counts


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
def test_much_wrong_input(first, runner, files, tmp_path):
    counts = check(runner, first, CHUNK, files, tmp_path)
    assert counts["refused"] >= CHUNK // 2 and counts["works"] > 0, counts


def test_a_case_depends_on_its_number_alone(files, tmp_path):
    texts = [draw_case(SEED, number, files, tmp_path).text for number in range(200)]
    assert [draw_case(SEED, number, files, tmp_path).text for number in reversed(range(200))] == texts[::-1]
    assert len(set(texts)) > 190


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-m", "swin_moe.train", "{image.png}", "optim.lr=1"], "image.png"),
        (["-m", "checkpoint_tools", "convert", "{cut.pth}", "x", "--to", "nope"], "--to"),
        (["-m", "launcher", "-n", "x", "--", "-m", "swin_moe.train"], "-n"),
    ],
)
def test_real_processes(words, named, files, tmp_path):
    words = [re.sub(r"\{(.+)\}", lambda match: files[match[1]], word) for word in words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert judge_command("", done.returncode, done.stderr, (named,)) == ("refused", ""), done.stderr
    assert named in done.stderr


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (1, "Traceback (most recent call last):\n  x\nKeyError: 'a'\n"),
        (2, ""),
        (2, "error: optim.lr must be >= 0\nerror: twice\n"),
        (2, "error: optim.lr must be >= 0\nUserWarning: more\n"),
        (2, "error: 'NoneType' object has no attribute 'lr' in /x.yaml\n"),
        (2, "error: [Errno 2] No such file or directory: '/x.yaml'\n"),
        (2, "error: invalid literal for int() with base 10: optim.lr\n"),
        (2, "error: something is wrong\n"),
        (2, f"error: optim.lr {'x' * 2000}\n"),
        (
            2,
            'Traceback (most recent call last):\n  File "/x/numpy.py", line 1, in f\n    reshape(x)\n'
            "ValueError: optim.lr\nerror: optim.lr\n",
        ),
        (130, "error: optim.lr must be >= 0\n"),
        (-11, ""),
    ],
)
def test_the_oracle_refuses(code, error):
    assert judge_command("train", code, error, ())[0] == "wrong"


@pytest.mark.parametrize("error", [KeyError("optim.lr"), RuntimeError("optim.lr"), ValueError("optim.lr")], ids=repr)
def test_the_oracle_refuses_what_we_did_not_raise(error):
    try:
        raise error
    except Exception as raised:
        assert judge_call(raised, ("optim.lr",))[0] == "wrong"


def test_a_check_that_is_broken_is_found(runner, files, tmp_path):
    results = runner.run_cases(SEED, range(50), files, tmp_path, broken=broken.accept_everything)
    assert any(r.outcome == "wrong" for r in results)


def test_a_child_that_dies_or_hangs_is_told_and_the_others_run(runner, files, tmp_path):
    results = runner.run_cases(SEED, range(7), files, tmp_path, seconds=3, broken=broken.end_and_hang)
    assert [r.outcome for r in results] == ["works"] * 3 + ["wrong", "works", "wrong", "works"]


def test_memory_is_limited(runner, files, tmp_path):
    results = runner.run_cases(SEED, range(1), files, tmp_path, broken=broken.take_memory)
    assert [r.why for r in results] == ["raises MemoryError"]


def test_threads_that_ran_here_before_are_not_waited_for(runner, files, tmp_path):
    # What another test of this process may have done: a fork of it would wait for these threads for ever.
    torch.set_num_threads(2)
    torch.ones(1 << 20).add_(1)
    torch.set_num_threads(1)
    results = runner.run_cases(SEED, range(1), files, tmp_path, seconds=20, broken=broken.loop_in_parallel)
    assert [r.outcome for r in results] == ["works"], results
