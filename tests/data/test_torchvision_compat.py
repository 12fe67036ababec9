"""torchvision and timm import beside any torch, in whatever order."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )


@pytest.mark.parametrize("attempts", [1, 2], ids=["once", "twice"])
def test_timm_imports_in_a_fresh_process(attempts):
    code = "from swin_moe.data.torchvision_compat import import_torchvision as f\n" + "f()\n" * attempts
    code += "import timm.data, torchvision\nprint(torchvision.__version__, timm.data.create_transform.__name__)"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "create_transform"


def test_data_package_imports_neither():
    code = "import sys, swin_moe.data\nprint({'timm', 'torchvision', 'sklearn'} & set(sys.modules))"
    done = run(code)
    assert done.stdout.strip() == "set()", done.stderr
