"""Memory and time of the checkpoint tools, and how long training stands still for a save.

    python benchmarks/checkpoints/checkpoint.py official | large | save [--directory DIR]

official: Swin-MoE-S with 32 experts as 32 official rank files without optimizer, to a native checkpoint: peak resident
    memory, and seconds over those of `cp` of the files read and of the files written. Warm cache, three times in turns.
large: SwinV2-MoE of about 1 B parameters with float32 masters and both moments, resharded from a cold cache.
save: blocked seconds of a save in the background over those of a synchronous one with fsync, at training's side, and
    host memory it takes; 1.1 GB of state.

Prints a markdown table. Needs 2.5 times the size of the source in DIR (default: a directory beside this file), which is
removed at the end; `large` is scaled to the space there is, and says so.
"""

import argparse
import json
import math
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MIB, GB = 2**20, 1e9
OFFICIAL = "swin_moe_small_patch4_window12_192_32expert_32gpu_22k"
LARGE = "swinv2_moe_base_patch4_window12_192_32expert_22k"
RANKS = 32
LAYERS = 18  # of its third stage
TURNS = 3


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    cpu: float  # seconds in user and system mode
    peak: int  # resident bytes

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.cpu + other.cpu, max(self.peak, other.peak))


def run_measured(*command: str) -> Cost:
    """Returns what a command took, which has to succeed.

    The peak of a process includes that of the one it was forked from, so this one must not load torch.
    """
    assert "torch" not in sys.modules
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return Cost(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def tool(*arguments: object) -> Cost:
    """Returns what a verb of the checkpoint tools took."""
    return run_measured(sys.executable, "-m", "checkpoint_tools", *map(str, arguments))


def run_output(*arguments: object) -> str:
    """Returns what a verb of the checkpoint tools prints."""
    command = [sys.executable, "-m", "checkpoint_tools", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def idle_peak() -> int:
    """Returns the resident bytes of the interpreter with the tool's modules, before it does anything."""
    code = "import checkpoint_tools.__main__, checkpoint_tools.verbs.convert, checkpoint_tools.formats.native"
    return run_measured(sys.executable, "-c", code).peak


def copy(paths: list[Path], target: Path) -> Cost:
    """Returns what a `cp` of files into a new directory took, which is removed again."""
    target.mkdir()
    cost = run_measured("cp", *map(str, paths), str(target))
    shutil.rmtree(target)
    return cost


def files_of(path: Path) -> list[Path]:
    """Returns the files of a directory."""
    return sorted(path.iterdir())


def size_of(paths: list[Path]) -> int:
    """Returns the bytes of files together."""
    return sum(path.stat().st_size for path in paths)


def forget(paths: list[Path]) -> None:
    """Takes files out of the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def shapes_of(name: str, *overrides: str) -> tuple[dict[str, tuple[int, ...]], dict]:
    """Returns (parameter -> shape, config as JSON) of a network; nothing is allocated."""
    import dataclasses

    import torch

    from swin_moe.config.io import load_config
    from swin_moe.models import build_model

    config = load_config(name, overrides)
    with torch.device("meta"):
        model = build_model(config.model)
    return {n: tuple(p.shape) for n, p in model.named_parameters()}, dataclasses.asdict(config)


def official_name(name: str) -> str:
    """Returns what the official code calls a parameter (Tutel's names inside MoE blocks)."""
    name = re.sub(r"mlp\.experts\.(fc[12])_weight$", r"mlp._moe_layer.experts.batched_\1_w", name)
    name = re.sub(r"mlp\.experts\.(fc[12])_bias$", r"mlp._moe_layer.experts.batched_\1_bias", name)
    return name.replace("mlp.router.weight", "mlp._moe_layer.gates.0.wg.weight")


def write_rank_files(directory: Path) -> None:
    """Writes what each of 32 ranks of the official training saves after an epoch, without its optimizer."""
    import torch

    shapes, _ = shapes_of(OFFICIAL, "model.num_classes=1000")
    random = torch.Generator().manual_seed(0)
    dense = {official_name(n): torch.randn(s, generator=random) for n, s in shapes.items() if ".experts." not in n}
    layers = sorted({n[: n.index("experts.")] for n in shapes if ".experts." in n})
    for layer in layers:
        dense[f"{layer}_moe_layer._num_global_experts"] = torch.tensor(RANKS)
    for rank in range(RANKS):
        own = {
            official_name(n): torch.randn((1, *shape[1:]), generator=random)
            for n, shape in shapes.items()
            if ".experts." in n
        }
        torch.save({"model": dense | own, "epoch": 0}, directory / f"ckpt_epoch_0.pth.rank{rank}")


def measure_official(directory: Path) -> None:
    """Prints the row of the official rank files."""
    source = directory / "source"
    source.mkdir()
    run_measured(sys.executable, __file__, "write-rank-files", "--directory", str(source))
    files = files_of(source)
    tools, plains = [], []
    for turn in range(TURNS + 1):
        run_measured("cat", *map(str, files))  # warm
        target = directory / "out"
        took = tool("convert", source / "ckpt_epoch_0.pth", target, "--from", "official-moe", "--to", "native")
        os.sync()  # what cp leaves to the system is not charged to the next measurement
        plain = copy(files, directory / "copy")
        plain = plain + copy(files_of(target), directory / "copy")
        os.sync()
        read, written = size_of(files), size_of(files_of(target))
        shutil.rmtree(target)
        if turn:  # the first turn warms up
            tools.append(took)
            plains.append(plain)
    ratios = [a.seconds / b.seconds for a, b in zip(tools, plains)]
    print_row(
        {
            "what": "32 official rank files to native",
            "read": f"{read / GB:.2f} GB",
            "written": f"{written / GB:.2f} GB",
            "peak resident": f"{max(cost.peak for cost in tools) / MIB:.0f} MiB",
            "idle": f"{idle_peak() / MIB:.0f} MiB",
            "seconds": f"{statistics.median(cost.seconds for cost in tools):.1f}",
            "over cp": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            "CPU over cp": f"{statistics.median(a.cpu / b.cpu for a, b in zip(tools, plains)):.2f}",
        }
    )


def print_row(row: dict[str, str]) -> None:
    """Prints a table of one row."""
    for cells in (row.keys(), ["---"] * len(row), row.values()):
        print(f"| {' | '.join(cells)} |")


def write_large(directory: Path) -> None:
    """Writes a native checkpoint of a large network with masters and moments, streamed; as large as the disk allows."""
    import numpy as np

    from checkpoint_tools.sources.base import Options, Source, SourceTensor
    from checkpoint_tools.sources.stream import write_native

    room = shutil.disk_usage(directory).free
    layers = next(n for n in range(LAYERS, 0, -2) if 2.2 * 16 * count_large(n) < room)
    shapes, network = shapes_of(LARGE, f"model.depths=[2,2,{layers},2]", f"model.moe.blocks={moe_blocks(layers)}")
    kinds = ("", "master/", "optim.exp_avg/", "optim.exp_avg_sq/")

    class Numbers(Source):
        format, path, files, state, provenance = "random", directory, [], {}, {}
        tensors = {kind + name: SourceTensor(shape, "F32") for name, shape in shapes.items() for kind in kinds}
        config = network
        noise = np.random.default_rng(0).integers(-(1 << 30), 1 << 30, 1 << 22, dtype="i4")

        def read(self, name: str, box: object, destination: np.ndarray) -> None:
            """See Source."""
            destination.reshape(-1)[:] = np.resize(self.noise, destination.size)

    write_native(Numbers(), directory / "source", Options())


def moe_blocks(layers: int) -> str:
    """Returns the option for experts in every second block of the two last stages."""
    return f"[[-1],[-1],[{','.join(map(str, range(1, layers, 2)))}],[1]]"


def count_large(layers: int) -> int:
    """Returns the parameters of the large network."""
    shapes, _ = shapes_of(LARGE, f"model.depths=[2,2,{layers},2]", f"model.moe.blocks={moe_blocks(layers)}")
    return sum(math.prod(shape) for shape in shapes.values())


def measure_large(directory: Path) -> None:
    """Prints the row of the large checkpoint."""
    run_measured(sys.executable, __file__, "write-large", "--directory", str(directory))
    files = files_of(directory / "source")
    layers = json.loads(run_output("inspect", directory / "source", "--json"))["config"]["model"]["depths"][2]
    parameters = size_of(files) / 16
    forget(files)
    took = tool("reshard", directory / "source", directory / "out", "--world", 16, "--file-size", "2G")
    read, written = size_of(files), size_of(files_of(directory / "out"))
    shutil.rmtree(directory / "out")
    forget(files)
    plain = copy(files, directory / "copy")
    os.sync()
    print_row(
        {
            "what": "SwinV2-MoE, masters and moments, cold" + (" (scaled to the disk)" if layers < LAYERS else ""),
            "parameters": f"{parameters / 1e9:.2f} B",
            "read": f"{read / GB:.1f} GB",
            "written": f"{written / GB:.1f} GB",
            "peak resident": f"{took.peak / MIB:.0f} MiB",
            "idle": f"{idle_peak() / MIB:.0f} MiB",
            "seconds": f"{took.seconds:.0f}",
            "cp of it, cold": f"{plain.seconds:.0f} s",
        }
    )


def measure_save(directory: Path) -> None:
    """Prints the row of saves in training."""
    import torch

    from swin_moe.checkpoint import CheckpointManager, Piece

    torch.set_num_threads(1)
    shapes, _ = shapes_of(OFFICIAL, "model.num_classes=1000", "model.moe.num_experts=2")
    kinds = ("", "optim.exp_avg/", "optim.exp_avg_sq/", "ema/")
    tensors = {kind + name: torch.randn(shape) for name, shape in shapes.items() for kind in kinds}
    pieces = [Piece.of(name, tensor) for name, tensor in tensors.items()]
    size = sum(tensor.nbytes for tensor in tensors.values())

    def step() -> None:
        for tensor in tensors.values():
            tensor.add_(1e-3)

    def timed(manager: CheckpointManager, number: int) -> float:
        begin = time.perf_counter()
        manager.save(number, pieces, state={"step": number}, config={})
        return time.perf_counter() - begin

    plain = CheckpointManager(directory / "plain", keep=1)
    synchronous: list[float] = []
    first: list[float] = []
    later: list[float] = []
    held: list[int] = []
    for number in range(1, TURNS + 2):
        step()
        os.sync()
        synchronous.append(timed(plain, number))
        # A new one allocates its copy; its second save does not.
        background = CheckpointManager(directory / f"background{number}", keep=1, asynchronous=True)
        before = resident()
        for blocked in (first, later):
            os.sync()
            blocked.append(timed(background, len(blocked) + 1))
            step()
            held.append(resident() - before)
            background.wait()
    usual = statistics.median(synchronous)
    print_row(
        {
            "what": "save in the background of training",
            "bytes": f"{size / GB:.2f} GB",
            "synchronous": f"{usual:.2f} s ({min(synchronous):.2f} to {max(synchronous):.2f})",
            "blocked, first save": f"{statistics.median(first):.2f} s, {100 * statistics.median(first) / usual:.0f} %",
            "blocked, later ones": f"{statistics.median(later):.2f} s, {100 * statistics.median(later) / usual:.0f} %",
            "host memory": f"{max(held) / size:.2f} copies of the state",
        }
    )


def resident() -> int:
    """Returns the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def working_directory(parent: str) -> Iterator[Path]:
    """Yields a new directory that is removed at the end."""
    with tempfile.TemporaryDirectory(dir=parent, prefix="checkpoint-benchmark-") as directory:
        yield Path(directory)


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("official", "large", "save", "write-rank-files", "write-large"))
    parser.add_argument("--directory", default=str(ROOT / "benchmarks"))
    arguments = parser.parse_args()
    if arguments.what == "write-rank-files":
        write_rank_files(Path(arguments.directory))
    elif arguments.what == "write-large":
        write_large(Path(arguments.directory))
    else:
        measure = {"official": measure_official, "large": measure_large, "save": measure_save}[arguments.what]
        with working_directory(arguments.directory) as directory:
            measure(directory)


if __name__ == "__main__":
    main()
