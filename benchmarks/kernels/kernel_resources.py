"""Registers, stack and spills of the CUDA kernels by architecture, as ptxas reports them: no GPU needed.

    python benchmarks/kernels/kernel_resources.py [--arch 80 90 100] [--files window_shift ...] [--source csrc/cuda]

Compiles one file after another with nvcc to a cubin, and prints per file and architecture, as a Markdown table, how
many kernels there are, the bytes of their code, the most registers, and how many have a stack or spill, which follow by
name.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kernel_instructions import ROOT, find_tool

_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    stack: int  # bytes
    spilled: int  # bytes stored and loaded
    registers: int


def resources(report: str) -> list[Kernel]:
    """Returns the kernels in what `ptxas -v` wrote."""
    return [
        Kernel(name, int(stack), int(stores) + int(loads), int(registers))
        for name, stack, stores, loads, registers in _ENTRY.findall(report)
    ]


def compile_file(source: Path, csrc: Path, arch: str, cubin: Path) -> list[Kernel]:
    """Returns the kernels of a file that includes files of `csrc`, and leaves their code in `cubin`.

    Raises:
        SystemExit: It does not compile; with what nvcc said.
    """
    command = [find_tool("nvcc"), "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch=sm_{arch}", "-cubin"]
    command.append(f"-I{csrc}")
    done = subprocess.run([*command, "-Xptxas", "-v", "-o", cubin, source], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return resources(done.stderr)


def readable(name: str) -> str:
    """Returns a kernel's name as it is written in C++, without its arguments; as it is where c++filt is missing."""
    try:
        found = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return name
    return found.stdout.strip()


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"], help="compute capabilities without a dot")
    parser.add_argument("--files", nargs="+", default=[], help="names without .cu; all without")
    parser.add_argument("--source", type=Path, default=ROOT / "csrc" / "cuda", help="folder of the kernels")
    options = parser.parse_args()
    files = {path.stem: path for path in sorted(options.source.rglob("*.cu"))}
    names = options.files or sorted(files)
    if unknown := [name for name in names if name not in files]:
        parser.error(f"--files {' '.join(unknown)}: not in {options.source}, which has {', '.join(sorted(files))}")
    print("| file | arch | kernels | bytes of code | most registers | with a stack | spilling |\n" + "|---" * 7 + "|")
    odd: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            for arch in options.arch:
                cubin = Path(directory, "kernels.cubin")
                found = compile_file(files[name], options.source.resolve().parent, arch, cubin)
                most = max((k.registers for k in found), default=0)
                counts = sum(k.stack > 0 for k in found), sum(k.spilled > 0 for k in found)
                numbers = (arch, len(found), cubin.stat().st_size, most, *counts)
                print(f"| {name} | {' | '.join(map(str, numbers))} |", flush=True)
                odd += [
                    f"sm_{arch} {name}: {k.stack} bytes of stack, {k.spilled} spilled: {readable(k.name)}"
                    for k in found
                    if k.stack or k.spilled
                ]
    print("\n".join(["", *odd]))


if __name__ == "__main__":
    main()
