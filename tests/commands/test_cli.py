"""The command itself, and what `swin-moe launch` refuses before a single rank is started."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from launcher import __main__ as launcher
from launcher.env import without_world
from swin_moe import cli

TRAIN = ["-m", "swin_moe.train", "digits_swin_moe"]


@pytest.fixture
def started(monkeypatch):
    """Returns the list of argument lists that reached the launcher."""
    calls = []
    monkeypatch.setattr(launcher, "main", lambda arguments: calls.append(arguments) or 0)
    return calls


def launch(monkeypatch, ranks, *program):
    """Returns the exit code of `swin-moe launch -n ranks -- program`."""
    monkeypatch.setattr(sys, "argv", ["swin-moe", "launch", "-n", str(ranks), "--", *program])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.mark.parametrize(
    ("ranks", "option", "sentence"),
    [
        (2, "parallel.expert=3", "parallel.expert=3"),
        (4, "parallel.expert_shard=3", "parallel.expert_shard=3 does not divide the world of 4 ranks"),
        (3, "model.moe.num_experts=8", "the nearest that is: 66"),  # 64 images over 3 ranks
        (2, "model.moe.group_images=5", "model.moe.group_images=5 must divide"),
        (2, "optim.lrr=1", "optim.lr"),
        (2, "engine.name=fairscale", "parallel.zero"),
    ],
)
def test_a_bad_layout_starts_nothing(monkeypatch, capsys, started, ranks, option, sentence):
    assert launch(monkeypatch, ranks, *TRAIN, option) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and sentence in errors[0]
    assert not started


@pytest.mark.parametrize("options", [["-n", "2", "--grace", "nan"], ["script", "--scheduler", "slurm", "--nodes", "0"]])
def test_a_bad_option_of_the_launcher_is_said_before_torch_is_imported(monkeypatch, capsys, options):
    monkeypatch.setattr(cli, "check_before_launch", lambda *_: pytest.fail("reads the config first"))
    monkeypatch.setattr(sys, "argv", ["swin-moe", "launch", *options, "--", *TRAIN])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("launcher: --")


def test_a_bad_config_gets_no_batch_script(monkeypatch, capsys):
    """It would be refused when the job's turn comes, which may be days later. A container has files of its own."""
    shape = ["launch", "script", "--nodes", "2", "--ranks-per-node", "2"]
    bad = ["--", *TRAIN, "parallel.expert_shard=3"]
    for scheduler, code in (["slurm"], 2), (["k8s", "--image", "x"], 0):
        monkeypatch.setattr(sys, "argv", ["swin-moe", *shape, "--scheduler", *scheduler, *bad])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, errors = capsys.readouterr()
        assert stop.value.code == code and bool(out) != (code == 2)
        assert ("does not divide the world of 4 ranks" in errors) == (code == 2)


def test_a_missing_config_starts_nothing(monkeypatch, capsys, started):
    assert launch(monkeypatch, 2, "-m", "swin_moe.evaluate", "/nowhere.yaml") == 2
    assert "/nowhere.yaml" in capsys.readouterr().err and not started


@pytest.mark.parametrize("program", [TRAIN, ["-m", "swin_moe.train", "-h"], ["-m", "other.module", "x"], ["script.py"]])
def test_everything_else_is_the_launchers(monkeypatch, started, program):
    assert launch(monkeypatch, 2, *program) == 0
    assert started == [["-n", "2", "--", *program]]


def test_help_of_launch_lists_the_launchers_options_and_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swin-moe", "launch", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(
        name in shown for name in ("--plan", "--hardware NAME", "--hostfile", "--dry-run")
    )


def test_the_version_and_the_module_are_the_command():
    finished = subprocess.run([sys.executable, "-m", "swin_moe", "--version"], capture_output=True, text=True)
    assert finished.stdout == f"swin-moe {importlib.metadata.version('swin-moe')}\n" and finished.returncode == 0


def test_a_checkout_that_is_not_installed_has_no_version_and_says_so(monkeypatch, capsys):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "argv", ["swin-moe", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and "pip install -e ." in capsys.readouterr().out


WITHOUT_TORCH = {
    "import": ("import swin_moe", 0),
    "help": ("cli.main()", 0, "--help"),
    "no command": ("cli.main()", 2, "trian"),
    "help of a command": ("cli.main()", 0, "train", "--help"),
    "no config": ("cli.main()", 2, "train", "digits_swin_mo"),
    "an option that is none": ("cli.main()", 2, "evaluate", "digits_swin_moe", "optim.lrr=1"),
    "a value that is none": ("cli.main()", 2, "throughput", "digits_swin_moe", "optim.lr=fast"),
    "options that are none": ("cli.main()", 2, "plan", "digits_swin_moe", "--gpu", "2", "--jsn"),
    "options that do not go together": ("cli.main()", 2, "plan", "--check", "here", "--refit", "there"),
    "a checkpoint that is none": ("cli.main()", 2, "checkpoint", "inspect", "/nowhere"),
}


@pytest.mark.parametrize("case", WITHOUT_TORCH)
def test_what_needs_no_torch_does_not_import_it(case):
    statement, code, *words = WITHOUT_TORCH[case]
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"from swin_moe import cli\nsys.argv[1:] = {words!r}\n{statement}\n"
    )
    environ = without_world(os.environ)
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert done.returncode == code and done.stdout.endswith("False\n"), done.stdout + done.stderr
    assert done.stderr.count("error:") == (code == 2), done.stderr


@pytest.mark.parametrize("typed, meant", [("trian", "train"), ("pedict", "predict"), ("xyz", None)])
def test_a_misspelled_command_is_answered_with_the_right_one(typed, meant, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swin-moe", typed])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert f"did you mean {meant}?" in message if meant else "did you mean" not in message


def test_configs_are_listed(capsys):
    from swin_moe.config.io import find_config
    from swin_moe.config.shipped.listing import run, shipped

    run(["swin_moe", "32expert"])
    lines = capsys.readouterr().out.splitlines()
    assert "swin_moe/" in lines and "detection/" in lines
    assert any(line.startswith("  swin_moe_base_patch4_window12_192_32expert_32gpu_22k ") for line in lines)
    assert all(find_config(name).is_file() for names in shipped([]).values() for name in names)
    with pytest.raises(SystemExit) as ended:
        run(["nowhere"])
    assert ended.value.code == 2 and "'nowhere'" in capsys.readouterr().err
