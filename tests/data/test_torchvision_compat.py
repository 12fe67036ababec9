"""torchvision and timm import beside any torch, in whatever order."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from swin_moe.data.torchvision_site import NAME, install

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


def test_a_users_own_script_imports_both_where_the_site_file_is(tmp_path):
    """As after `make`: nothing of swin_moe is imported first, and the file needs nothing of it."""
    install(tmp_path)
    code = f"import site; site.addsitedir({str(tmp_path)!r})\nimport torchvision, timm, sys, torch\n"
    code += "from torchvision.transforms import v2\nimport torchvision.ops\n"
    code += "print('swin_moe' in sys.modules, hasattr(torch.ops.torchvision, 'nms'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]


def test_the_environment_of_make_has_it():
    """make runs `python -m swin_moe.data.torchvision_site`, which does nothing where torchvision fits torch."""
    plain = run("import torchvision, timm")
    installed = Path(sysconfig.get_path("purelib"), f"{NAME}.pth").is_file()
    if plain.returncode and not installed:
        pytest.skip(f"this environment was made before {NAME}.pth; make installs it")
    assert plain.returncode == 0, plain.stderr
