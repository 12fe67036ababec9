"""Finding and loading the compiled library; what each instruction set computes, with any number of threads."""

import os
import subprocess
import sys

import pytest
import torch

from swin_moe.ops import extension, row_products
from swin_moe.ops.extension import find_and_load

CAPABILITIES = ("default", "avx2", "avx512_bf16")


def test_a_library_that_was_not_built(tmp_path):
    found = find_and_load(tmp_path, allowed=True, required=False)
    assert found.path is None and not found.loaded and "not built (pip install" in found.problem
    with pytest.raises(ImportError, match="SWIN_MOE_REQUIRE_EXT=1, but the compiled kernels are missing: they"):
        find_and_load(tmp_path, allowed=True, required=True)


def test_a_library_that_must_not_be_loaded(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"not looked at")
    assert find_and_load(tmp_path, allowed=False, required=False).problem == "SWIN_MOE_NO_EXT=1 is set"


def test_a_library_of_another_torch_is_named(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"\x7fELF\0swin_moe built for torch 1.13.1\0")
    problem = find_and_load(tmp_path, allowed=True, required=False).problem
    assert problem.startswith(f"_C.so was built for torch 1.13, this is {torch.__version__}: pip install")


def test_a_file_that_is_no_library(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"garbage")
    found = find_and_load(tmp_path, allowed=True, required=False)
    assert found.path.name == "_C.so" and "_C.so does not load with torch" in found.problem
    assert "\n" not in found.problem


def test_several_libraries_are_not_guessed_among(tmp_path):
    for name in ("_C.so", "_C.abi3.so"):
        (tmp_path / name).write_bytes(b"")
    assert "_C.abi3.so, _C.so; delete" in find_and_load(tmp_path, allowed=True, required=False).problem


def test_why_not(monkeypatch):
    monkeypatch.setattr(extension, "COMPILED", frozenset({"cpu"}))
    assert extension.why_not("cpu") == ""
    monkeypatch.setattr(extension, "EXTENSION", extension.Extension(None, "a reason"))
    assert extension.why_not("cuda") == "a reason" and extension.digest() == ""


PROGRAM = """
import hashlib, sys, torch
from swin_moe.ops import extension, row_products
from tests.ops.attention.window_attention_cases import check_against_eager, random_case, value_and_gradients
assert extension.cpu_capability() == sys.argv[1]
for dtype in (torch.float32, torch.bfloat16):
    check_against_eager(range(int(sys.argv[2])), dtype)
digests = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for number in range(20, 32):
        for dtype in (torch.float32, torch.bfloat16):
            case = random_case(number)
            shape = (case.batch, case.height, case.width, case.heads * case.head_dim)
            operator = lambda *t: torch.ops.swin_moe.window_attention(*t, *case.numbers)
            found = value_and_gradients(operator, case.tensors(number, dtype), torch.ones(shape))
            for value in found.values():
                digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digests.append(digest.hexdigest())
assert len(set(digests)) == 1, digests
"""


def run_with(capability: str, cases: int) -> None:
    environment = {**os.environ, "SWIN_MOE_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", PROGRAM, capability, str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "must be one of" in done.stderr and "on this processor" in done.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not extension.available("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_is_exact_and_the_same_for_any_number_of_threads(capability):
    run_with(capability, cases=60)


@pytest.mark.full
@pytest.mark.skipif(not extension.available("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_is_exact_over_many_shapes(capability):
    run_with(capability, cases=560)


THREADS = """
import os, torch
from swin_moe.ops import row_products
torch.set_num_threads(1)  # as making x starts threads
x = torch.ones(1024, 256)
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
torch.ops.swin_moe.row_linear(x, x, None)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not row_products._has_kernels(), reason="no compiled kernels that are built with threads"
)
def test_kernels_run_on_as_many_threads_as_torch_is_told():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


def test_a_library_of_before_an_operator_has_none_of_it():
    assert extension.compiled_for("no_such_operator") == frozenset()
    extension.add_fake("no_such_operator", lambda x: x)
