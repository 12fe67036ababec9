"""Which CUDA a build takes, what a library says it was built from, and when it is built anew."""

import runpy
from dataclasses import replace
from pathlib import Path

import gpu_machine
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FACTS = runpy.run_path(str(ROOT / "csrc" / "build_facts.py"))
CPU = torch.device("cpu")


def install(directory: Path, *, headers: bool = True) -> str:
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "nvcc").touch()
    if headers:
        (directory / "include").mkdir()
        (directory / "include" / "cuda_runtime.h").touch()
    return str(directory)


def test_a_directory_with_a_wrapper_alone_is_passed_over(tmp_path):
    wrapper, real = install(tmp_path / "local", headers=False), install(tmp_path / "local" / "cuda")
    named = install(tmp_path / "named")
    find = FACTS["cuda_home"]
    assert find([None, None, wrapper], tmp_path / "local") == real
    assert find([named, wrapper], tmp_path / "local") == named
    assert find([str(tmp_path / "gone"), None], tmp_path / "local") == real
    assert find([wrapper, ""], tmp_path / "nothing") is None


def test_of_several_versions_the_newest(tmp_path):
    for name in ("cuda-9.2", "cuda-13.0", "cuda-12.8"):
        install(tmp_path / name)
    assert FACTS["cuda_home"]([], tmp_path) == str(tmp_path / "cuda-13.0")


def test_a_digest_knows_every_source(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "a.cuh").write_text("1")
    (tmp_path / "note.py").write_text("1")
    digest = FACTS["sources_digest"]
    first = digest(tmp_path)
    (tmp_path / "note.py").write_text("2")
    assert digest(tmp_path) == first and len(first) == 16
    (tmp_path / "cuda" / "a.cuh").write_text("2")
    second = digest(tmp_path)
    (tmp_path / "cuda" / "a.cuh").rename(tmp_path / "cuda" / "b.cuh")
    assert len({first, second, digest(tmp_path)}) == 3


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Returns a file in the place of the library, which says that it was built from the sources here."""
    path = tmp_path / "_C.so"
    path.write_bytes(b"\x7fELF.. from sources " + FACTS["sources_digest"](ROOT / "csrc").encode() + b"\x00")
    monkeypatch.setattr(gpu_machine.extension, "EXTENSION", replace(gpu_machine.extension.EXTENSION, path=path))
    monkeypatch.setattr(gpu_machine.extension, "why_not", lambda kind: "")
    return path


def test_a_library_that_fits_is_used(library):
    assert gpu_machine.problem(CPU) == ""


def test_a_library_of_other_sources_is_not(library):
    library.write_bytes(b" from sources 0123456789abcdef")
    assert "built from other sources" in gpu_machine.problem(CPU)
    library.write_bytes(b"an older one says nothing")
    assert "built from other sources" in gpu_machine.problem(CPU)


def test_a_library_whose_kernel_does_not_run_is_not(library, monkeypatch):
    def attention(qkv, table, **_):
        raise RuntimeError("no kernel image is available for execution on the device\nand more")

    monkeypatch.setattr(gpu_machine, "fused_window_attention", attention)
    assert gpu_machine.problem(CPU) == (
        "its kernel does not run here: no kernel image is available for execution on the device"
    )
    monkeypatch.setattr(gpu_machine, "fused_window_attention", lambda qkv, *_, **__: torch.zeros(1, 8, 8, 32))
    assert "does not run here" in gpu_machine.problem(CPU)


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu_machine.shutil, "which", lambda name: None)
    monkeypatch.setitem(gpu_machine.FACTS, "cuda_home", lambda named: None)
    monkeypatch.setattr(gpu_machine, "problem", lambda device: "there is none")
    monkeypatch.setattr("sys.argv", ["gpu_machine.py", "--device", "cpu"])
    assert gpu_machine.main() == gpu_machine.UNUSABLE
    out = capsys.readouterr().out
    assert "ninja MISSING" in out and "CUDA_HOME NOT FOUND" in out and "NOT USABLE, there is none" in out


def test_a_build_is_for_this_device_and_looked_at_again(monkeypatch):
    calls = []

    def call(command, cwd=None, env=None):
        calls.append((command[1:], env))
        return codes.pop(0)

    monkeypatch.setattr(gpu_machine.subprocess, "call", call)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("SWIN_MOE_CUDA_ARCHITECTURES", raising=False)
    codes = [0, 0]
    assert gpu_machine.build(torch.device("cuda")) == 0
    (command, environment), (again, _) = calls
    assert command == ["setup.py", "build_ext", "--inplace"] and again[1:] == ["--device", "cuda"]
    assert environment["SWIN_MOE_CUDA_ARCHITECTURES"] == "90" and environment["SWIN_MOE_REQUIRE_EXT"] == "1"
    codes = [1]
    assert gpu_machine.build(CPU) == 1 and len(calls) == 3
