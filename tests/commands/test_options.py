"""Options that a command does not have are refused before anything starts, with the one that was meant."""

import importlib
import sys

import pytest

from checkpoint_tools.__main__ import main as tools
from swin_moe import cli
from swin_moe.config.arguments import refuse_options

WRONG = {
    "train": ("--eval", "train has no option --eval; options are given as section.key=value"),
    "evaluate": ("--last", "evaluate has no option --last; options are given as section.key=value"),
    "throughput": ("-n", "throughput has no option -n; ranks are the launcher's: swin-moe launch -n N"),
    "predict": ("--eval", "predict has no option --eval; it has --top, --json, --csv, --batch, --names"),
    "inspect_routing": (
        "--imges=3",
        "inspect-routing has no option --imges; did you mean --images? it has --out, --im",
    ),
    "evaluate_features": ("--shot", "evaluate-features has no option --shot; did you mean --shots? it has --k, "),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("command", WRONG)
def test_an_unknown_option_is_refused_wherever_it_stands(command, place):
    option, said = WRONG[command]
    words = ["digits_dense", "data.name=digits"]
    words.insert(place, option)
    with pytest.raises(ValueError) as refused:
        importlib.import_module(f"swin_moe.{command}").main(words)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("command", WRONG)
def test_help_is_given_wherever_it_is_asked_for(command, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"swin_moe.{command}").main(["digits_dense", "--help"])
    assert ended.value.code == 0 and "usage: swin-moe" in capsys.readouterr().out


def test_files_numbers_and_known_options_are_no_unknown_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x.png").touch()
    refuse_options("predict", ["-x.png", "-1", "-0.5", "--top", "--top=3", "a=b", "-"], ["--top"])


@pytest.mark.parametrize(
    "words, meant", [(["inspect", "x", "--jsn"], "--json"), (["export", "x", "y", "--to", "onnx", "--lst"], "--last")]
)
def test_a_verb_says_which_option_was_meant(words, meant, capsys):
    assert tools(words) == 2
    error = capsys.readouterr().err
    assert f"unrecognized arguments: {words[-1]}; did you mean {meant}?" in error and error.count("\n") == 1


EMPTY = {
    "predict": (["--out", ""], "predict: --out is followed by an empty word"),
    "inspect_routing": (["--out", ""], "inspect-routing: --out is followed by an empty word"),
    "evaluate_features": (["--shots="], "evaluate-features: --shots= has no value"),
}


@pytest.mark.parametrize("command", EMPTY)
def test_an_empty_value_is_refused(command):
    words, said = EMPTY[command]
    with pytest.raises(ValueError, match=said):
        importlib.import_module(f"swin_moe.{command}").main(["digits_dense", *words])


@pytest.mark.parametrize(
    "words, said",
    [
        (["inspect", ""], "the command is followed by an empty word; give a value, or leave it out"),
        (["convert", "a", "", "--to", "native"], "a is followed by an empty word"),
        (["experts", "a", "b", "--load", ""], "--load is followed by an empty word"),
        (["average", "a", "b", "--weights="], "--weights= has no value; give one, or leave it out"),
    ],
)
def test_a_verb_refuses_an_empty_word(words, said, tmp_path, monkeypatch, capsys):
    """An unset variable of a script: as a path it would be the folder we are in."""
    monkeypatch.chdir(tmp_path)
    assert tools(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["plan", "digits_dense", "--gpus", "2", "--plot", ""], "--plot is followed by an empty word"),
        (["report", "run", "--out="], "--out= has no value"),
        (["show", ""], "the command is followed by an empty word"),
        (["weights", "list", "--folder", ""], "--folder is followed by an empty word"),
        (
            ["launch", "-n", "2", "--log-dir", "", "--", "-m", "swin_moe.train", "x"],
            "--log-dir is followed by an empty",
        ),
    ],
)
def test_a_command_refuses_an_empty_word(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swin-moe", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1
