"""`swin-moe doctor`: what it says and its exit code, with parts missing and broken."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

from launcher.env import without_world
from swin_moe import cli, doctor
from swin_moe.ops import extension
from tests import preloaded


def lines(capsys, *arguments):
    code = doctor.main(["--no-measure", *arguments])
    return code, capsys.readouterr().out.splitlines()


def test_a_whole_installation(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["swin-moe", "doctor", "--no-measure"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "BROKEN" not in text
    parts = {line.split()[1] for line in text.splitlines()}
    assert {"Python", "swin_moe", "torch", "numpy", "cpu", "compiled"} <= parts


def test_packages_missing_and_required(capsys, monkeypatch):
    required = ["torch>=2.11", "nowhere-to-be-found>=1", "absent-too>=2; extra == 'mpi'", "ruff; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    code, said = lines(capsys)
    assert code == 1
    assert any(line.startswith("BROKEN  nowhere-to-be-found") and line.endswith("not installed") for line in said)
    assert any(line.startswith("-       absent-too") and "swin-moe[mpi]" in line for line in said)
    assert not any("ruff" in line for line in said)


def test_a_part_that_raises_hides_no_other(capsys, monkeypatch):
    def fail(requested):
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr("launcher.command.find_mpi", fail)
    code, said = lines(capsys)
    assert code == 1
    (broken,) = [line for line in said if line.startswith("BROKEN")]
    assert broken.split(None, 2)[1:] == ["mpi", "RuntimeError: boom"]
    assert any("kernels" in line for line in said)


def test_no_mpi_is_no_error(capsys, monkeypatch):
    def fail(requested):
        raise ValueError("no mpirun in PATH")

    monkeypatch.setattr("launcher.command.find_mpi", fail)
    code, said = lines(capsys)
    assert code == 0 and any(line.startswith("-") and "no mpirun in PATH; one process" in line for line in said)


def test_a_kernel_that_computes_something_else_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(extension, "COMPILED", frozenset({"cpu"}))
    monkeypatch.setattr(extension, "cpu_capability", lambda: "some")
    monkeypatch.setattr(doctor, "_kernel_error", lambda device: 0.5)
    code, said = lines(capsys)
    assert code == 1 and any(line.startswith("BROKEN  cpu kernels") and "(some)" in line for line in said)


def test_the_check_of_kernels_is_exact():
    assert 0 < doctor._kernel_error("cpu") < 1e-6


def test_paths_of_common_shapes(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "COMMON", {"tiny": ((2, 2), 1, 8, True)})
    monkeypatch.setattr(doctor, "WINDOWS", 4)
    said = list(doctor.path_lines())
    assert [text.partition(":")[0] for _, _, text in said] == [
        f"{dtype}, {kind}" for dtype in ("float32", "bfloat16") for kind in ("evaluation", "training")
    ]
    chosen = [text.partition(": ")[2].split(" ")[0] for _, _, text in said]
    assert set(chosen) <= {"fused", "sdpa", "reference", "analytic"}


@pytest.mark.mpi
@pytest.mark.parametrize("broken, code", [({}, 0), ({"SWIN_MOE_NO_EXT": "1", "SWIN_MOE_REQUIRE_EXT": "1"}, 1)])
def test_on_many_ranks_they_check_each_other_and_rank_0_itself(broken, code):
    command = [sys.executable, "-m", "launcher", "--quiet", "-n", "2", "--", "-m", "swin_moe.doctor", "--no-measure"]
    environ = preloaded.environment(without_world(os.environ) | {"OMP_NUM_THREADS": "1"} | broken)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    missing = "SWIN_MOE_REQUIRE_EXT=1, but the compiled kernels are missing: SWIN_MOE_NO_EXT=1 is set"
    assert (missing in done.stdout) == bool(broken) and torch.__version__ in done.stdout, said
    lines = done.stdout.splitlines()
    assert sum("Python" in line for line in lines) == 1 and lines[-1].endswith("2 ranks on 1 host can be used"), said
    assert any("all_reduce of 2 ranks takes" in line for line in lines), said
