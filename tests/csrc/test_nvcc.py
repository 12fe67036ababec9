"""Every CUDA kernel compiles for the architectures that setup.py builds, and keeps its values in registers."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").rglob("*.cu"))
FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-I{CSRC}", "-Xptxas", "-v"]
# One small source per kind of kernel in `make test`; every one for every architecture with --full.
QUICK = ("window_attention", "window_forward_bf16", "window_shift")
# Bytes of a thread: a few registers around a loop, never inside of it; 176 measured at most (bfloat16, sm_100). float32
# holds its factors in full words: 452 in its backward (sm_80), at most 80 in its forward.
MAX_SPILL = {"window_backward_fp32": 512}
MAX_SPILL_OF_OTHERS = 192
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compile_source(source: Path, architecture: str, directory: Path) -> str:
    """Returns what ptxas says of registers and spills."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command: list[str | Path] = [
        "nvcc",
        *FLAGS,
        code,
        "-c",
        source,
        "-o",
        directory / f"{source.stem}_{architecture}.o",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stderr


def check(sources: list[Path], architectures: tuple[str, ...], directory: Path) -> None:
    pairs = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda pair: compile_source(pair[0], pair[1], directory), pairs))
    for (source, architecture), report in zip(pairs, reports):
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
        assert max(spills, default=0) <= MAX_SPILL.get(source.stem, MAX_SPILL_OF_OTHERS), (source, architecture, spills)


def test_kernels_compile_for_one_architecture(tmp_path):
    check([s for s in SOURCES if s.stem in QUICK], ("90",), tmp_path)


@pytest.mark.full
def test_all_kernels_compile_for_all_architectures(tmp_path):
    check(SOURCES, ("80", "90", "100"), tmp_path)
