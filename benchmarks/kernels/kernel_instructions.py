"""Counts warp instructions of the window-attention kernels in compiled code: no GPU needed.

    python benchmarks/kernels/kernel_instructions.py [--arch 90] [--source csrc/cuda] [--all]

Compiles the bfloat16 kernels with nvcc, disassembles them with cuobjdump, and prints per kernel the registers, the
bytes spilled, and the instructions of its main loops per 1024 scores of a warp, as a Markdown table. A main loop is the
code around tensor-core instructions: the innermost loop that holds them, or, where that holds other loops (copies of
rows), from the last barrier or loop before the first of them to the last. Scores follow from the number of these
instructions: 16 per product and 1024 scores at head dimension 32. Two counts: on the shortest way through it (no seam
in the window, most windows) and on the longest (a seam). `others at a time`: queries or keys that a block holds beside
its own; of two kernels that differ in it alone, a device takes the one with more if its shared memory suffices.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("window_forward_bf16.cu", "window_backward_bf16.cu")  # in a folder of --source
# Products of scores that a kernel computes, loop by loop; further loops are copies of the last.
PRODUCTS = {
    "window_forward": (2,),
    "window_backward_whole": (3, 2),
    "window_backward_once": (4, 1),
    "window_backward_keys": (4,),
    "window_backward_queries": (2, 3),
}
PER_PRODUCT = 16  # tensor-core instructions, head dimension 32, 1024 scores


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @property
    def name(self) -> str:
        """The operation, without its predicate."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def target(self) -> int | None:
        """Where it jumps, or None."""
        found = re.search(r"BRA\S*\s.*?(0x[0-9a-f]+)", self.text)
        return int(found.group(1), 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether the next instruction may follow it."""
        return self.text.startswith("@") or self.name == "BRA.DIV" or " P" in self.text.split("0x")[0]

    @property
    def ends(self) -> bool:
        """Whether nothing follows it."""
        return self.target is not None and not self.conditional or self.name in ("EXIT", "RET") and self.text[0] != "@"


def find_tool(name: str) -> str:
    """Returns the path of a CUDA tool: of CUDA_HOME, the search path, or those that triton brings along."""
    places = [Path(os.environ["CUDA_HOME"], "bin")] if "CUDA_HOME" in os.environ else []
    places += [Path(found).parent for found in [shutil.which(name)] if found]
    try:
        import triton

        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    for place in [*places, Path("/usr/local/cuda/bin")]:
        if (place / name).exists():
            return str(place / name)
    raise SystemExit(f"needs {name}: set CUDA_HOME, or pip install nvidia-cuda-{name} and put it on PATH")


def compile_source(source: Path, csrc: Path, arch: str, directory: Path) -> tuple[str, dict[str, tuple[int, int]]]:
    """Returns the disassembly of a file that includes files of `csrc`, and by kernel its registers and bytes
    spilled."""
    cubin = directory / f"{source.stem}.cubin"
    command = [find_tool("nvcc"), "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch=sm_{arch}", "-cubin"]
    command.append(f"-I{csrc}")
    report = subprocess.run([*command, "-Xptxas", "-v", "-o", cubin, source], capture_output=True, text=True)
    if report.returncode != 0:
        raise SystemExit(report.stderr)
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) regis"
    kernels = re.findall(pattern, report.stderr, re.DOTALL)
    sass = subprocess.run([find_tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True)
    if sass.returncode != 0:
        find_tool("nvdisasm")  # which cuobjdump starts
        raise SystemExit(sass.stderr)
    return sass.stdout, {name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in kernels}


def functions(sass: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of every kernel."""
    parts = re.split(r"\n\s+Function : ", sass)[1:]
    lines = {part.split("\n", 1)[0].strip(): re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", part) for part in parts}
    return {name: [Instruction(int(a, 16), text.strip()) for a, text in found] for name, found in lines.items()}


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Returns (first, last) index of every loop: a jump back, and where it goes. Out-of-line code is none."""
    at = {i.address: n for n, i in enumerate(code)}
    found = []
    for n, i in enumerate(code):
        begin = at.get(i.target, n + 1) if i.target is not None else n + 1
        # A jump back after code that is never fallen into returns from a rare case: division, a seam.
        if begin < n and any("BAR" in j.name or j.target == code[begin].address for j in code[begin : n + 1]):
            found.append((begin, n))
    return found


def main_loops(code: list[Instruction]) -> list[tuple[int, int, int]]:
    """Returns (first, last) index of the code around tensor-core instructions, and how many there are."""
    last_exit = max(n for n, i in enumerate(code) if i.name == "EXIT" and i.text[0] != "@")
    products = [n for n, i in enumerate(code) if i.name.startswith("HMMA")]
    cycles = [c for c in loops(code) if c[1] < last_exit]
    simple = [c for c in cycles if not any(o != c and c[0] <= o[0] and o[1] <= c[1] for o in cycles)]
    found: list[list[int]] = []
    for n in products:
        inside = next((c for c in simple if c[0] <= n <= c[1]), None)
        if inside:
            begin, end = inside
        else:
            borders = [m for m in range(n) if code[m].name.startswith("BAR") or any(c[1] == m for c in simple)]
            begin, end = max(borders, default=0) + 1, n
        if found and (found[-1][0] == begin or inside is None and found[-1][1] >= begin):
            found[-1][1] = max(found[-1][1], end)
            found[-1][2] += 1
        else:
            found.append([begin, end, 1])
    return [(begin, end, count) for begin, end, count in found]


def path_lengths(code: list[Instruction], begin: int, end: int) -> tuple[int, int]:
    """Returns the fewest and the most instructions from one to another, without jumps back."""
    at = {i.address: n for n, i in enumerate(code)}
    shortest, longest = {begin: 1}, {begin: 1}
    for n in range(begin, end):
        if n not in shortest:
            continue
        following = [] if code[n].ends else [n + 1]
        jump = code[n].target
        target = -1 if jump is None else at.get(jump, -1)
        following += [target] if n < target <= end else []
        for m in following:
            shortest[m] = min(shortest.get(m, 1 << 30), shortest[n] + 1)
            longest[m] = max(longest.get(m, 0), longest[n] + 1)
    return shortest.get(end, end - begin + 1), longest.get(end, end - begin + 1)


def per_1024_scores(code: list[Instruction], products: tuple[int, ...], head_dim: int) -> tuple[float, float]:
    """Returns the fewest and the most instructions of a kernel's main loops for 1024 scores."""
    sums = [[0, 0, 0] for _ in products]
    for number, (begin, end, count) in enumerate(main_loops(code)):
        place = sums[min(number, len(products) - 1)]
        for n, more in enumerate((*path_lengths(code, begin, end), count)):
            place[n] += more
    parts = [(wanted * PER_PRODUCT * head_dim / 32 / max(s[2], 1), s) for wanted, s in zip(products, sums)]
    return sum(factor * s[0] for factor, s in parts), sum(factor * s[1] for factor, s in parts)


def describe(mangled: str) -> tuple[str, list[int]]:
    """Returns a kernel's name and the numbers of its shape: head dimension, window, warps, others."""
    name = re.search(r"\d+(window_\w+?)_kernel", mangled)
    return name[1] if name else mangled, [int(n) for n in re.findall(r"L[ib](\d+)E", mangled)]


def rows(sass: str, resources: dict[str, tuple[int, int]], everything: bool) -> list[str]:
    """Returns the lines of the table."""
    lines = []
    for mangled, code in functions(sass).items():
        if "_kernel" not in mangled or not any(i.name.startswith("HMMA") for i in code):
            continue
        name, numbers = describe(mangled)
        if not everything and (numbers[0] != 32 or numbers[1] == 0):
            continue
        shortest, longest = per_1024_scores(code, PRODUCTS[name], numbers[0])
        registers, spilled = resources[mangled]
        shape = f"{numbers[0]}, {numbers[1] or 'any'}, {numbers[2] * 32}, {numbers[3]}"
        lines.append(f"| {name} | {shape} | {registers} | {spilled} | {shortest:.0f} | {longest:.0f} |")
    return sorted(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="compute capability without a dot")
    parser.add_argument("--source", type=Path, default=ROOT / "csrc" / "cuda", help="folder of the kernels")
    parser.add_argument("--all", action="store_true", help="also head dimensions and windows read at run time")
    arguments = parser.parse_args()
    sources = [path for name in SOURCES for path in sorted(arguments.source.rglob(name))]
    if len(sources) != len(SOURCES):
        parser.error(f"--source {arguments.source}: has not one each of {', '.join(SOURCES)}")
    print("| kernel | head dim, window, threads, others at a time | registers | bytes spilled | no seam | seam |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for source in sources:
            sass, resources = compile_source(source, arguments.source.resolve().parent, arguments.arch, Path(directory))
            print("\n".join(rows(sass, resources, arguments.all)))


if __name__ == "__main__":
    main()
