"""Runs and predictions: --check, --refit, layouts that training asks for, and records that runs write."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from launcher.env import without_world
from swin_moe import cli
from swin_moe.config.io import dump_config, load_config
from swin_moe.planner.command import main
from swin_moe.planner.hardware import load_hardware, read_hardware
from swin_moe.planner.layouts import layout_in
from swin_moe.planner.plan import make_plan
from swin_moe.planner.rates import OTHER, UPDATE, Rate
from swin_moe.planner.runs.auto import choose_layout, hardware_of, own_hardware
from swin_moe.planner.runs.check import compare, refit, trace_run
from swin_moe.planner.runs.records import read_run
from tests import preloaded

SMALL = ["data.global_batch=16", "model.depths=[1,1]", "model.num_heads=[3,6]", "model.moe.blocks=[[-1],[0]]"]
SMALL += ["model.pretrained_window_sizes=[0,0]", "model.moe.capacity_scope=rank", "model.moe.group_images=0"]


def write_run(folder, ranks=1, machine=None, records=None, options=()):
    """Returns the folder of a run as training leaves it, whose steps take what a machine predicts."""
    folder.mkdir(parents=True, exist_ok=True)
    dump_config(load_config("digits_swin_moe", [*SMALL, *options]), folder / "config.yaml")
    rows = records
    if rows is None:
        rows = [{"step": 1, "speed/images_per_second": 1.0, "speed/ranks": ranks}]  # warms up
        (folder / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
        traced = trace_run(read_run(str(folder)))
        time, memory = traced.time(machine), traced.memory()
        rows.append(
            {
                "step": 2,
                "speed/images_per_second": 16 / (time.seconds + 0.5),
                "speed/ranks": ranks,
                "speed/s_forward": time.forward,
                "speed/s_backward": time.backward + time.exchange,
                "speed/s_update": time.update + time.reduction,
                "speed/s_loading": 0.5,
                "memory/parameters_bytes": memory.parameters,
                "memory/optimizer_bytes": 2 * memory.optimizer,
                "memory/peak_bytes": 1e9,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "cut')
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_check_compares_what_was_recorded(tmp_path, capsys, ranks):
    machine = load_hardware("cpu")
    run = write_run(tmp_path / "run", ranks, machine)
    assert main(["--check", str(run), "--hardware", "cpu", "--json"]) == 0
    rows = {row["name"].strip(): row for row in json.loads(capsys.readouterr().out)}
    step = rows["step seconds"]
    assert step["measured"] == pytest.approx(step["predicted"] + 0.5)  # loading is not predicted
    assert rows["loading of data"]["measured"] == 0.5 and rows["loading of data"]["error"] is None
    phases = ["forward", "backward"] if ranks == 1 else ["forward, backward, exchange"]
    for name in (*phases, "reduction, update", "bytes of parameters"):
        assert rows[name]["error"] == pytest.approx(0, abs=1e-9) and rows[name]["measured"] > 0, name
    assert rows["bytes of optimizer"]["error"] == pytest.approx(-0.5)
    assert rows["bytes at the peak"]["measured"] is None  # a process on a CPU holds more than tensors
    assert main(["--check", str(run), "--hardware", "cpu"]) == 0
    text = capsys.readouterr().out
    assert f"{ranks} x cpu" in text and "-50.0%" in text and "predicted" in text


def test_a_check_takes_the_hardware_of_the_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", 1, load_hardware("cpu"), options=["parallel.hardware=cpu"])
    assert main(["--check", str(run)]) == 0
    assert "1 x cpu" in capsys.readouterr().out


def test_a_refit_finds_the_machine_that_the_runs_were_timed_on(tmp_path, capsys):
    hidden = dataclasses.replace(load_hardware("cpu"), matrix_share=0.4, memory_share=0.3)
    runs = [
        write_run(tmp_path / f"run{n}", 1, hidden, options=options)
        for n, options in enumerate(([], ["model.embed_dim=96"], ["model.mlp_ratio=8.0"]))
    ]
    out = tmp_path / "fitted.yaml"
    assert main(["--refit", *map(str, runs), "--hardware", "cpu", "--out", str(out)]) == 0
    assert "error" in capsys.readouterr().out
    fitted = read_hardware(out)
    assert fitted.link_share == 1.0 and fitted.nics_per_node == 0  # no run depends on them
    for run in runs:
        rows = {row.name.strip(): row for row in compare(trace_run(read_run(str(run))), fitted)}
        assert rows["step seconds"].predicted == pytest.approx(rows["step seconds"].measured - 0.5, rel=0.1)
        before = trace_run(read_run(str(run))).time(load_hardware("cpu")).seconds
        assert before < 0.6 * (rows["step seconds"].measured - 0.5)
    as_it_is = refit([trace_run(read_run(str(run))) for run in runs], dataclasses.replace(hidden))
    assert as_it_is.matrix_share == pytest.approx(0.4, rel=0.02)


def test_a_refit_of_a_calibrated_cpu_finds_how_fast_runs_are_beside_its_calibration(tmp_path):
    """Its steps are sums of measured operators, on which the shares of peaks have no part."""
    operators = {"fp32": {OTHER: Rate(1e-5, 1e-9, 0.0), UPDATE: Rate(1e-5, 1e-9, 0.0)}}
    products = {"fp32": [(64.0, 64.0, 64.0, 1e11)]}
    calibrated = dataclasses.replace(load_hardware("cpu"), products=products, operators=operators)
    slow = dataclasses.replace(calibrated, steps_share=0.6)
    run = trace_run(read_run(str(write_run(tmp_path / "run", 1, slow))))
    assert run.time(slow).seconds == pytest.approx(run.time(calibrated).seconds / 0.6, rel=1e-3)
    found = refit([run], calibrated)
    assert found.steps_share == pytest.approx(0.6, rel=0.05) and found.matrix_share == calibrated.matrix_share


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["--check", "nowhere", "--hardware", "cpu"],
            "'nowhere' is no folder of a training run: it has no config.yaml",
        ),
        (
            ["--check", "EMPTY", "--hardware", "cpu"],
            "has no records of steps in metrics.jsonl; let it train for log.every",
        ),
        (["--check", "OLD", "--hardware", "cpu"], "do not say how many ranks it had; say it with --gpus N"),
        (["--check", "OLD", "digits_swin_moe"], "--check and --refit read a run's own config"),
        (["--refit", "OLD", "--hardware", "cpu"], "--refit RUN... and --out FILE.yaml go together"),
        (["--refit", "OLD", "--check", "OLD", "--out", "x"], "give one of them"),
        (["--check", "OLD", "--gpus", "1"], "this machine has no file of its own"),
        (["--check", "OLD", "--gpus", "1", "--hardware", "h10"], "did you mean h100?"),
        (["digits_swin_moe", "--gpus", "1", "--hardware", "cpu", "--plot", "a.jpg"], "--plot must be a .png file"),
        (["digits_swin_moe", "--gpus", "1", "--hardware", "cpu", "--images", "-1"], "--images must be >= 0"),
        (["digits_swin_moe", "--gpus", "1", "--hardware", "cpu", "--skew", "nowhere"], "'nowhere' is no folder of a"),
        (["--hardware", "cpu", "--gpus", "1"], "CONFIG is needed"),
    ],
)
def test_wrong_use_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    write_run(tmp_path / "EMPTY", records=[{"step": 1, "eval/loss": 1.0}])
    write_run(tmp_path / "OLD", records=[{"step": 1, "speed/images_per_second": 9.0}])
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert sentence in found.err and found.err.count("\n") == 1 and not found.out


def test_the_machines_own_file_is_taken_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert own_hardware() == tmp_path / "swin_moe" / "hardware.yaml"
    own_hardware().parent.mkdir()
    own_hardware().write_text("matrix_share: 0.5\n" + _text_of("cpu"))
    machine, name = hardware_of("")
    assert machine.matrix_share == 0.5 and name == str(own_hardware())


def _text_of(name):
    from swin_moe.planner.hardware import hardware_folder

    return (hardware_folder() / f"{name}.yaml").read_text()


def test_the_best_layout_is_chosen_within_what_the_command_line_says():
    config = load_config("digits_swin_moe", [*SMALL, "parallel=auto", "parallel.hardware=cpu"])
    assert config.parallel.plan == "auto"
    best = make_plan(config, load_hardware("cpu"), 2).layouts[0].layout
    chosen, text = choose_layout(config, 2, [])
    assert chosen[: len(best.options())] == [f"{k}={v}" for k, v in best.options().items()]
    assert "parallel.plan=none" in chosen and "parallel.hardware=cpu" in chosen and "for 2 x cpu" in text
    asked = ["parallel.zero=2", "parallel.recompute=block"]
    bound = load_config("digits_swin_moe", [*SMALL, *asked])
    chosen, _ = choose_layout(
        dataclasses.replace(bound, parallel=dataclasses.replace(bound.parallel, hardware="cpu")), 2, asked
    )
    assert set(asked) <= set(chosen)
    assert not any(str(2) == word.partition("=")[2] for word in chosen if "world" in word)  # of no world size


def test_a_layout_of_a_config_is_what_the_planner_would_say_of_it():
    config = load_config("digits_swin_moe", SMALL)
    for planned in make_plan(config, load_hardware("cpu"), 2).layouts[::20]:
        assert layout_in(planned.layout.apply(config), 2) == planned.layout


def test_a_file_may_say_parallel_auto(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: digits_swin_moe\nparallel: auto\n")
    assert load_config(path).parallel.plan == "auto"
    path.write_text("base: digits_swin_moe\nparallel: automatic\n")
    with pytest.raises(ValueError, match="parallel"):
        load_config(path)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["-n", "2", "--plan", "--", "-m", "swin_moe.train", "C", "a.b=1"], ["parallel.plan=auto"]),
        (
            ["--plan", "--hardware", "h100", "--", "-m", "swin_moe.train", "C"],
            ["parallel.plan=auto", "parallel.hardware=h100"],
        ),
        (
            ["--hardware=h100", "--plan", "--", "-m", "swin_moe.train", "C"],
            ["parallel.plan=auto", "parallel.hardware=h100"],
        ),
        (["-n", "2", "--", "-m", "swin_moe.train", "C"], []),
        (["-n", "2", "--", "script.py", "--plan"], []),
    ],
)
def test_launch_gives_the_plan_to_training(arguments, expected):
    at = arguments.index("--")
    ours = [word for word in arguments[:at] if word in ("-n", "2")]
    assert cli.with_plan(arguments) == [*ours, "--", *arguments[at + 1 :], *expected]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--plan", "--", "-m", "swin_moe.evaluate", "C"], "--plan chooses the layout of training"),
        (["--plan", "-n", "2"], "--plan chooses the layout of training"),
        (["--hardware", "h100", "--", "-m", "swin_moe.train", "C"], "--hardware is for --plan"),
        (["--plan", "--hardware", "--", "-m", "swin_moe.train", "C"], "argument --hardware: expected one argument"),
    ],
)
def test_a_plan_of_nothing_is_refused(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["swin-moe", "launch", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2])
def test_training_takes_the_layout_and_writes_predicted_against_measured(tmp_path, ranks):
    train = ["-m", "swin_moe.train", "digits_swin_moe", *SMALL, "data.images_per_class=8", "optim.epochs=1"]
    train += ["optim.warmup_epochs=0", "log.every=2", "log.tensorboard=false", f"run.output={tmp_path}"]
    command = ["launch", "-n", str(ranks), "--quiet", "--plan", "--hardware", "cpu", "--", *train]
    finished = subprocess.run(
        [sys.executable, "-m", "swin_moe", *command],
        capture_output=True,
        text=True,
        timeout=900,
        env=preloaded.environment(without_world(os.environ) | {"OMP_NUM_THREADS": "1"}),
    )
    assert finished.returncode == 0, finished.stderr
    out = finished.stdout
    assert f"layouts for {ranks} x cpu" in out and f"predicted for {ranks} x cpu, and measured:" in out
    run = read_run(str(tmp_path / "digits_swin_moe"))
    assert run.ranks == ranks and run.config.parallel.plan == "none" and run.config.parallel.hardware == "cpu"
    chosen, _ = choose_layout(run.config, ranks, [])
    assert layout_in(run.config, ranks).options() == dict(_pair(word, run.config) for word in chosen[:-2])
    rows = {row.name.strip(): row for row in compare(trace_run(run), load_hardware("cpu"))}
    assert rows["bytes of parameters"].error == 0 and rows["bytes of optimizer"].error == 0
    spent = sum(run.median(f"speed/s_{name}") or 0.0 for name in ("forward", "backward", "update", "loading"))
    assert 0.5 * run.step_seconds < spent < 1.5 * run.step_seconds
    assert run.loads and len(run.loads[0]) == run.config.model.moe.num_experts


def _pair(word, config):
    key, _, text = word.partition("=")
    return key, int(text) if text.isdigit() else text
