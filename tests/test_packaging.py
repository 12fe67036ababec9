"""The wheel and the source archive: what is in them, and that one is built from the other, with and without kernels."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(kind: str, source: Path, out: Path, **variables: str) -> Path:
    """Returns the archive that setuptools makes of a source tree, without compiling where nothing else is said."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=source,
        env=os.environ | (variables or {"SWIN_MOE_NO_EXT": "1"}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Returns (source archive of a copy of the tree, wheel built from what the archive holds)."""
    pytest.importorskip("setuptools", minversion="77")
    root = tmp_path_factory.mktemp("package")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (root / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tree" / name).write_bytes((ROOT / name).read_bytes())
    source = build("build_sdist", root / "tree", root / "dist")
    with tarfile.open(source) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    return source, build("build_wheel", unpacked, root / "dist")


def test_the_source_archive_holds_what_kernels_are_built_from(archives):
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh")
    }
    assert kernels <= names and {"setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc/build_facts.py"} <= names


def test_the_wheel_holds_packages_configs_and_types(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
        metadata = next(wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
    wanted = {f"{package}/py.typed" for package in ("swin_moe", "launcher", "checkpoint_tools")}
    configs = {
        f"swin_moe/{path.relative_to(ROOT)}" for kind in ("*.yaml", "*.tsv") for path in ROOT.glob(f"configs/**/{kind}")
    }
    modules = {str(p.relative_to(ROOT)) for package in ("swin_moe", "launcher") for p in (ROOT / package).rglob("*.py")}
    assert wanted | configs | modules <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"Version: {version}\n" in metadata and "License-Expression: MIT\n" in metadata
    assert "Classifier: Typing :: Typed\n" in metadata


def test_the_wheel_works_where_nothing_else_of_it_is(archives, tmp_path):
    with zipfile.ZipFile(archives[1]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = "import swin_moe; from swin_moe.config.shipped import listing; "
    code += "print(swin_moe.__file__); listing.run(['digits_swin_moe'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert str(tmp_path / "site") in done.stdout and "digits_swin_moe" in done.stdout, done.stderr


# What one kernel computes, beside what PyTorch does.
KERNELS = """
import torch
import swin_moe
from swin_moe.ops import extension
print(swin_moe.__file__, [extension.why_not("cpu")])
boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
print(torch.ops.swin_moe.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), None, 0.5).tolist())
"""
# A build in a process that has no torch, as pip's isolated ones.
NO_TORCH = "import sys\nsys.modules['torch'] = None\n"


def run_installed(wheel: Path, site: Path, code: str) -> str:
    """Returns what Python code prints where the package is what a wheel holds, in an empty folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site / "site")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site,
        env=os.environ | {"PYTHONPATH": str(site / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.full
def test_the_wheel_of_a_clean_archive_has_kernels_that_compute(archives, tmp_path):
    """As README's `pip install --no-build-isolation .`: the archive is unpacked elsewhere, nothing was built in it."""
    with tarfile.open(archives[0]) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not list(unpacked.rglob("*.so"))
    wheel = build("build_wheel", unpacked, tmp_path / "dist", SWIN_MOE_REQUIRE_EXT="1", MAX_JOBS="1")
    assert "swin_moe/_C.so" in zipfile.ZipFile(wheel).namelist() and "none-any" not in wheel.name
    said = run_installed(wheel, tmp_path, KERNELS)
    assert said == f"{tmp_path / 'site' / 'swin_moe' / '__init__.py'} ['']\n[0, 2]\n"


def test_a_build_without_torch_says_so_and_so_does_the_first_use(archives, tmp_path):
    with tarfile.open(archives[0]) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    command = [sys.executable, "-c", NO_TORCH + BUILD, "build_wheel"]
    own = {key: value for key, value in os.environ.items() if not key.startswith("SWIN_MOE_")}
    done = subprocess.run([*command, str(tmp_path)], cwd=unpacked, env=own, capture_output=True, text=True)
    assert "built without its compiled kernels" in done.stderr and "--no-build-isolation" in done.stderr
    code = "from swin_moe.ops import extension; print(extension.EXTENSION.problem)"
    said = run_installed(tmp_path / done.stdout.split()[-1], tmp_path, code)
    assert "they were not built" in said and "--no-build-isolation" in said
    required = own | {"SWIN_MOE_REQUIRE_EXT": "1"}
    done = subprocess.run([*command, str(tmp_path)], cwd=unpacked, env=required, capture_output=True, text=True)
    assert done.returncode and "the compiled kernels cannot be built: torch cannot be imported" in done.stderr


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "docs" / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_every_place_asks_for_the_same_python():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    oldest = project["requires-python"].removeprefix(">=")
    asked = ", ".join(oldest.split("."))
    assert settings["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    for file in ("Makefile", "swin_moe/doctor.py"):
        assert f">= ({asked})" in (ROOT / file).read_text(), file
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text()
    versions = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert min(versions, key=lambda v: int(v.partition(".")[2])) == oldest
