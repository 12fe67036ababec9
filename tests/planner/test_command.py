"""`swin-moe plan` as a user calls it."""

import errno
import importlib
import json
import subprocess
import sys

import pytest

from swin_moe.planner.command import main

SMALL = ["digits_swin_moe", "--hardware", "cpu", "data.global_batch=64"]


def test_the_json_has_layouts_best_first(capsys):
    assert main([*SMALL, "--gpus", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    rates = [layout["images_per_second"] for layout in plan["layouts"]]
    assert rates == sorted(rates, reverse=True) and len(rates) > 10
    for layout in plan["layouts"]:
        assert layout["degrees"]["world"] == 2
        assert layout["images_per_second"] == pytest.approx(64 / layout["step_seconds"])
        assert layout["memory_bytes"] == pytest.approx(sum(layout["memory"].values()))
        assert layout["bound_by"] in ("compute", "memory", "launches", "link", "network")
    options = [json.dumps(layout["options"], sort_keys=True) for layout in plan["layouts"]]
    assert len(set(options)) == len(options)
    assert any("stage 0 clips by a wrong norm" in rejected["reason"] for rejected in plan["rejected"])


def test_the_table_names_the_best(capsys):
    assert main([*SMALL, "--gpus", "1", "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert "best: parallel.expert=1" in text and "more (--top K" in text and "rejected" in text


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([*SMALL, "--gpus", "0"], "--gpus must be >= 1, got 0"),
        ([*SMALL, "--gpus", str((1 << 20) + 1)], "--gpus must be at most 1048576, got 1048577"),
        ([*SMALL, "--gpus", "1" * 400], "argument --gpus: must be at most 9223372036854775807, got 111"),
        (["digits_swin_moe", "--gpus", "2", "--hardware", "h10"], "did you mean h100?"),
        ([*SMALL, "--gpus", "7"], "no layout of 7 ranks runs this config: data.global_batch=64 is not a multiple"),
        ([*SMALL, "--gpus", "2", "optim.lrr=1"], "optim.lr"),
        ([*SMALL, "--gpus", "2", "parallel.expert=3"], "parallel.expert=3"),
        (["digits_swin_moe", "--gpus", "2", "--hardware", "v100_32", "engine.precision=bf16"], "no figure for"),
        (["digits_swin_moe", "--hardware", "cpu"], "--gpus"),
        ([*SMALL, "--gpus", "1", "--jsn"], "did you mean --json?"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, arguments, sentence):
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert sentence in found.err and found.err.count("\n") == 1 and not found.out


PARSES = [("planner", "parsers.plan"), ("planner.simulation", "parsers.simulate"), ("weights", "parse")]


@pytest.mark.parametrize("name, parse", PARSES)
def test_a_file_that_cannot_be_written_is_named_first(name, parse, monkeypatch, capsys):
    module = importlib.import_module(f"swin_moe.{name}.command")

    def fail(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "p.png")

    monkeypatch.setattr(f"swin_moe.{name}.command.{parse}", fail)
    assert module.main([]) == 2
    assert capsys.readouterr().err == "error: p.png: No space left on device\n"


def test_what_is_too_large_is_told_with_what_would_fit(capsys, tmp_path):
    from swin_moe.planner.hardware import hardware_folder

    small = tmp_path / "small.yaml"
    small.write_text((hardware_folder() / "cpu.yaml").read_text().replace("memory_bytes: 8.0e9", "memory_bytes: 1.0e6"))
    assert main(["digits_swin_moe", "--hardware", str(small), "--gpus", "2"]) == 2
    error = capsys.readouterr().err
    assert "no layout fits 2 ranks of small with 0.0 GiB each: the smallest needs" in error and "more ranks" in error


def test_it_is_a_command_of_the_package():
    finished = subprocess.run([sys.executable, "-m", "swin_moe", "plan", "--help"], capture_output=True, text=True)
    assert finished.returncode == 0 and "--hardware NAME" in finished.stdout


def test_the_giant_on_512_devices_is_planned_in_little_memory():
    arguments = "swinv2_giant_3b_patch4_window12_192_22k --gpus 512 --hardware a100_80 engine.precision=bf16".split()
    code = (
        f"import sys\nfrom swin_moe.planner.command import main\ncode = main({arguments!r})\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(peak.split()[1]) / 2**20)\nsys.exit(code)"  # getrusage would tell of this process as well
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(finished.stdout.splitlines()[-1]) < 1, finished.stdout  # GiB
