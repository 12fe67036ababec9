"""Ranks that are not like rank 0 are shown, and nobody else."""

import sys

import pytest

from launcher.machine import software
from launcher.machine.software import Software, differences, read_software

FIRST = Software("3.11.2 /bin/python", "570.1", {"torch": "2.13.0", "numpy": "2.1"}, 100.0)


def test_like_ranks_say_nothing():
    other = Software("3.11.2 /bin/python", "570.1", None, 100.4)
    assert differences([FIRST]) == differences([FIRST, other, FIRST]) == []


def test_every_difference_is_a_row_with_its_ranks():
    old = Software("3.11.2 /bin/python", "550.2", {"torch": "2.11.0", "numpy": "2.1", "timm": "1.0"}, 87.0)
    late = Software("3.12.1 /opt/python", "570.1", None, 100.0)
    rows = [line.split("  ") for line in differences([FIRST, FIRST, old, old, late])]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["rank 0", "others", "ranks"],
        ["GPU driver", "570.1", "550.2", "2-3"],
        ["clock", "0 s", "-13 s", "2-3"],
        ["timm", "-", "1.0", "2-3"],
        ["torch", "2.13.0", "2.11.0", "2-3"],
        ["python", "3.11.2 /bin/python", "3.12.1 /opt/python", "4"],
    ]


def test_a_wholly_other_environment_is_cut_short():
    other = Software(FIRST.python, FIRST.driver, {f"p{n}": "1" for n in range(40)}, 100.0)
    said = differences([FIRST, other])
    assert len(said) == 22 and said[-1] == "and 22 more"


def test_what_this_process_stands_on(tmp_path, monkeypatch):
    for name in ("torch-2.13.0+cpu.dist-info", "My_Package-1.0.egg-info", "no-package"):
        (tmp_path / name).mkdir()
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "torch-1.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "missing"), str(tmp_path / "later")])
    found = read_software(packages=True)
    assert found.packages == {"torch": "2.13.0+cpu", "my-package": "1.0"}
    assert found.python.startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert read_software(packages=False).packages is None


def test_the_packages_are_those_importlib_knows():
    metadata = pytest.importorskip("importlib.metadata")
    names = {"torch", "numpy", "mpi4py"}
    found = read_software(packages=True).packages
    assert {name: found[name] for name in names} == {name: metadata.version(name) for name in names}
    assert software.NO_COMPARE.startswith("LAUNCHER_")
