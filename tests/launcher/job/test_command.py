"""The command line for each MPI, and one sentence for each request that cannot work. Nothing is started."""

import re
import subprocess
import sys

import pytest

from launcher import command
from launcher.__main__ import main
from launcher.command import Mpi, find_mpi
from launcher.flavors.hydra import MPICH
from launcher.flavors.openmpi import OPEN_MPI_4
from launcher.job.options import parser
from launcher.job.program import check_program
from tests.ranks import ROOT

PROGRAM = ["-m", "swin_moe.train", "a.yaml", "optim.lr=1"]


def fake_mpirun(folder, version):
    """Returns a system-like tree: PREFIX/bin/mpirun that answers --version."""
    path = folder / "bin" / "mpirun"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return path


def test_a_system_mpirun_brings_its_own_library(tmp_path, monkeypatch):
    monkeypatch.delenv("MPI4PY_LIBMPI", raising=False)
    monkeypatch.setattr(command, "_wheel", lambda: "mpich")
    mpirun = fake_mpirun(tmp_path, "mpirun (Open MPI) 4.1.4")
    with pytest.raises(ValueError, match="no libmpi.so.40 lies under .* set MPI4PY_LIBMPI"):
        find_mpi(str(mpirun))
    library = tmp_path / "lib" / "libmpi.so.40"
    library.parent.mkdir()
    library.touch()
    assert find_mpi(str(mpirun)) == Mpi(str(mpirun), OPEN_MPI_4, str(library))
    monkeypatch.setenv("MPI4PY_LIBMPI", "mine")
    assert find_mpi(str(mpirun)) == Mpi(str(mpirun), OPEN_MPI_4)


def test_a_system_mpirun_of_the_wheel_s_kind_needs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_wheel", lambda: "mpich")
    mpirun = fake_mpirun(tmp_path, "HYDRA build details:")
    assert find_mpi(str(mpirun)) == Mpi(str(mpirun), MPICH)


def test_mpirun_of_the_environment_comes_before_path(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_wheel", lambda: None)
    in_path = fake_mpirun(tmp_path / "system", "HYDRA build details:")
    monkeypatch.setenv("PATH", str(in_path.parent))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    with pytest.raises(ValueError, match="libmpi.so.12"):  # found in PATH, but mpi4py has nothing to load
        find_mpi("")
    own = fake_mpirun(tmp_path / "venv", "HYDRA build details:")
    assert find_mpi("") == Mpi(str(own), MPICH)


def test_no_mpirun_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ValueError, match="no mpirun in .* pip install mpich"):
        find_mpi("")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["-n", "0", "--", *PROGRAM], "-n must be at least 1, got 0"),
        (["-n", str((1 << 20) + 1), "--", *PROGRAM], "-n must be at most 1048576, got 1048577"),
        (["-n", "1" * 400, "--", *PROGRAM], "argument -n/--ranks: must be at most 2147483647, got 111"),
        (["-n", "two", "--", *PROGRAM], "argument -n/--ranks: invalid int value: 'two'"),
        (["-n", "2", "train.py", "x"], "unrecognized arguments: train.py x; the program and its words stand after --"),
        (["-n", "2"], "nothing to run"),
        (["-n", "2", "--"], "nothing to run"),
        (["--", "missing.py"], "program 'missing.py' is not a file"),
        (["--hostfile", "missing", "--", *PROGRAM], "--hostfile 'missing' does not exist"),
        (["--env", "A", "--", *PROGRAM], "--env takes NAME=VALUE, got 'A'"),
        (["--env", "A B=c", "--", *PROGRAM], "--env takes NAME=VALUE, got 'A B=c'"),
        (["--log-dir", "", "--", *PROGRAM], "--log-dir is followed by an empty word; give a value, or leave it out"),
        (["--preflight-file=", "--", *PROGRAM], "--preflight-file= has no value; give one, or leave it out"),
        (["--hostfile", "", "-n", "2", "--", *PROGRAM], "--hostfile is followed by an empty word"),
        (["--exclude", "", "--", *PROGRAM], "--exclude is followed by an empty word"),
        (["", "--", *PROGRAM], "the command is followed by an empty word"),
        (["--mpi", "missing", "--", *PROGRAM], "--mpi 'missing' is not an executable file"),
        (
            ["--", "-m", "swin_moe.trian", "a.yaml"],
            "-m swin_moe.trian: there is no module 'trian' in swin_moe; did you mean swin_moe.train?",
        ),
        (["--", "-m", "swin_mo.train"], "-m swin_mo.train: there is no module 'swin_mo'; did you mean swin_moe.train?"),
        (["--", "-m", "swin_moe.train.x"], "-m swin_moe.train.x: there is no module 'x' in swin_moe.train"),
        (["--", "-m", "swin_moe.data", "a.yaml"], "-m swin_moe.data: this package is no program"),
        (["--", "-m", "swin_moe/train.py"], "-m takes the name of a module, such as swin_moe.train, got"),
    ],
)
def test_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"launcher: {sentence}") and message.count("\n") == 1


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        (
            "a.yaml",
            "model: {}\n",
            "is no program but a YAML file; name the program before it, as in: -- -m swin_moe.train",
        ),
        ("a.json", "{}", "is no program but a JSON file"),
        ("train", "#!/bin/sh\nexec python x\n", "is not Python, line 2: Missing parentheses"),
        ("binary", "\0\1", "is not Python: source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_is_no_program(name, text, sentence, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main(["--", str(tmp_path / name)]) == 2
    message = capsys.readouterr().err
    assert sentence in message and str(tmp_path / name) in message and message.count("\n") == 1


def test_modules_are_found_without_importing_anything(tmp_path, monkeypatch):
    for name in ("__init__", "inner", "spread/late"):
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pack" / f"{name}.py").write_text("raise SystemExit('imported')\n")
    own = {"PYTHONPATH": str(tmp_path)}
    check_program(["-m", "pack.inner"], own)  # as ranks with --env PYTHONPATH will find it
    check_program(["-m", "pack.spread.late"], own)
    with pytest.raises(ValueError, match="no module 'pack'"):
        check_program(["-m", "pack.inner"], {})
    monkeypatch.chdir(tmp_path)
    check_program(["-m", "pack.inner"], {})
    # A package that widens its own path when it is imported is believed.
    (tmp_path / "pack" / "__init__.py").write_text("__path__.append(__path__[0] + '/spread')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_program(["-m", "pack.late"], {})
    assert "pack.inner" not in sys.modules


def test_missing_mpi4py(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["--", *PROGRAM]) == 2
    assert "mpi4py is not installed" in capsys.readouterr().err


def test_dry_run_prints_a_command_and_starts_nothing():
    line = [sys.executable, "-m", "launcher", "-n", "2", "--dry-run", "--env", "A=b c", "--", "-m", "does.not.exist"]
    finished = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0
    assert re.match(r"env (-u \w+ )*'A=b c' ", finished.stdout) and " -n 2 " in finished.stdout
    assert finished.stdout.endswith("-m launcher.rank -m does.not.exist\n")


@pytest.mark.parametrize("option", ["--log-dir", "--mpi", "--env", "--hostfile", "--allowed-ranks", "-n", "--grace"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_word_is_refused_by_its_option(option, value):
    """As of a variable that is not set: it asked for a log folder, and there was none."""
    said = "is followed by an empty word" if not value else ".*: needs a value, got ' '"
    with pytest.raises(ValueError, match=f"{option}{' ' if not value else ''}{said}"):
        parser().parse_args([option, value])
