"""Lets `import torchvision`, and so `import timm`, work beside a torch that torchvision was not built for.

The torchvision wheel on PyPI is a CUDA build: its `_C.so` does not load beside a CPU torch. That alone would be
harmless, as transforms and data sets are pure Python, but `torchvision/_meta_registrations.py` registers fake kernels
for `torchvision::nms` and `torchvision::qnms` without checking that the operators exist (all others are guarded), and
the import fails. Declaring these two schemas just before is all that is missing (torchvision 0.26 and 0.28).

Imports the standard library only: `python -m swin_moe.data.torchvision_site` copies this file into an environment whose
torchvision does not import, where every Python then starts with it, a user's own scripts among them.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "swin_moe_torchvision"  # of the copy, and of the .pth file that imports it
_UNGUARDED = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class MissingOperators:
    """Finds no module: declares the operators before the module that needs them is looked for elsewhere."""

    library: object = None  # owns the schemas, which live as long as it does

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Returns None; see the class."""
        if name != "torchvision._meta_registrations":
            return
        import torch  # torchvision has it, and has tried to load its own operators

        missing = [schema for name, schema in _UNGUARDED.items() if not hasattr(torch.ops.torchvision, name)]
        if missing:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in missing:
                library.define(schema)
            MissingOperators.library = library


def watch() -> None:
    """From now on torchvision imports, whether its operators load or not; does nothing the second time."""
    if not any(isinstance(finder, MissingOperators) for finder in sys.meta_path):
        sys.meta_path.insert(0, MissingOperators())


def install(directory: Path) -> None:
    """Makes every Python of an environment start with `watch`; `directory` is its site-packages."""
    (directory / f"{NAME}.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (directory / f"{NAME}.pth").write_text(f"import {NAME}\n", encoding="utf-8")


def why_not_imported() -> str:
    """Returns the last line of what `import torchvision` says in a new process; "" where it works."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else ""


def main() -> None:
    """Installs the file where torchvision does not import without it; says what was done."""
    reason = why_not_imported()
    if "torchvision::" not in reason:
        print(f"torchvision: {reason or 'imports as it is'}; nothing done")
        return
    install(Path(sysconfig.get_path("purelib")))
    print(f"torchvision: {why_not_imported() or f'imports now, through {NAME}.pth'}")


if __name__ == NAME:
    watch()
elif __name__ == "__main__":
    main()
