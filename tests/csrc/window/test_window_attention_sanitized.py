"""The CPU kernels under the address and undefined-behaviour sanitizers, against loops in float64."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CXX = shutil.which("g++") or ""
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

# Compiling with sanitizers takes most of a minute.
pytestmark = [pytest.mark.full, pytest.mark.skipif(not CXX, reason="needs g++")]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    sources = [
        *(ROOT / "csrc" / "cpu" / "window").glob("window_attention_*.cpp"),
        Path(__file__).parent / "window_attention_check.cpp",
    ]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        flags = ["-std=c++20", "-O1", "-g1", "-Wno-psabi", *SANITIZERS, f"-I{ROOT / 'csrc'}"]
        subprocess.run([CXX, *flags, "-c", str(source), "-o", str(target)], check=True, timeout=300)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([CXX, *SANITIZERS, *map(str, objects), "-o", str(folder / "check")], check=True, timeout=100)
    return folder / "check"


def test_kernels_read_and_write_only_what_is_theirs_and_compute_the_formula(program, cases=200):
    done = subprocess.run([program, str(cases)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "default float64" in done.stdout and f"{cases} cases" in done.stdout
