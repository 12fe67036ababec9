"""The wheel and the source archive: what is in them, and that the one is built from the other without a compiler."""

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


def build(kind: str, source: Path, out: Path) -> Path:
    """Returns the archive that setuptools makes of a source tree, without compiling."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=source,
        env=os.environ | {"SWIN_MOE_NO_EXT": "1"},
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


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "docs" / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_every_place_asks_for_the_same_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    asked = ", ".join(oldest.split("."))
    assert f"v >= ({asked})" in (ROOT / "Makefile").read_text()
    versions = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert min(versions, key=lambda v: int(v.partition(".")[2])) == oldest
