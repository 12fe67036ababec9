"""What this machine has for gpu.sh, and whether the compiled kernels here are usable: the right torch, sources, device.

    python benchmarks/gpu_machine.py [--device cuda] [--build]

Exit code 0: the library loads and has CUDA kernels made from these sources, and one of them ran on the device.
3: it is missing, of another torch, of other sources, without CUDA, or not for this device; --build makes it first.
1: there is no device.
"""

import argparse
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from swin_moe.ops import extension
from swin_moe.ops.attention.fused import fused_window_attention

ROOT = Path(__file__).resolve().parent.parent
FACTS = runpy.run_path(str(ROOT / "csrc" / "build_facts.py"))
TOOLS = ("nvcc", "ninja", "g++", "ncu", "compute-sanitizer", "git")
UNUSABLE = 3


def describe(device: torch.device) -> str:
    """Returns the device, versions and tools, one line each."""
    where = FACTS["cuda_home"]([os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")])
    tools = [f"{name} {shutil.which(name) or 'MISSING'}" for name in TOOLS]
    lines = [
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPUs, CUDA_HOME {where or 'NOT FOUND (bin/nvcc and include/cuda_runtime.h)'}",
        ", ".join(tools),
    ]
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(0)
        lines.insert(0, f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
    return "\n".join(lines)


def problem(device: torch.device) -> str:
    """Returns why the kernels here cannot be used as they are, one clause; "" if they can."""
    kind = "cuda" if torch.version.cuda else device.type
    if reason := extension.why_not(kind):
        return reason
    path = extension.EXTENSION.path
    assert path is not None, "there are kernels"
    marks = re.findall(rb"from sources ([0-9a-f]{16})", path.read_bytes())
    if not marks or marks[0].decode() != FACTS["sources_digest"](ROOT / "csrc"):
        return f"{path.name} was built from other sources than those in csrc/"
    qkv, table = torch.ones(1, 8, 8, 96, device=device), torch.zeros(225, 1, device=device)
    try:
        out = fused_window_attention(qkv, table, num_heads=1, window=(8, 8))
        torch.testing.assert_close(out, torch.ones_like(out))
    except (RuntimeError, AssertionError) as error:
        return f"its kernel does not run here: {str(error).splitlines()[0]}"
    return ""


def build(device: torch.device) -> int:
    """Builds the library in place, for this device alone, and returns the exit code of looking again."""
    environment = os.environ | {"SWIN_MOE_REQUIRE_EXT": "1", "SWIN_MOE_NO_EXT": "0"}
    if device.type == "cuda":
        capability = "".join(map(str, torch.cuda.get_device_capability()))
        environment.setdefault("SWIN_MOE_CUDA_ARCHITECTURES", capability)
    if code := subprocess.call([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment):
        print("the build failed: its first error stands above")
        return code
    return subprocess.call([sys.executable, __file__, "--device", device.type])


def main() -> int:
    """Prints what is here and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--build", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: this torch sees no CUDA device")
        return 1
    if options.build:
        return build(device)
    print(describe(device))
    reason = problem(device)
    print(f"compiled kernels: NOT USABLE, {reason}" if reason else f"compiled kernels: {extension.digest()}, they run")
    return UNUSABLE if reason else 0


if __name__ == "__main__":
    sys.exit(main())
