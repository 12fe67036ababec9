"""How the cost of checkpoints and of their tools grows with experts: with the chunks, never with their square.

    python benchmarks/checkpoints/checkpoint_growth.py [--least 8] [--most 2048] [--directory DIR]

A network of two MoE layers and its moments, of which an expert takes 3 KB: what is measured is the work per chunk, not
per byte. CPU seconds of each verb in this process, without the start of the interpreter; the last column is the growth
from the second largest to the largest number of experts, where 4 times as many experts should take 4 times as long.

Prints a markdown table.
"""

import argparse
import contextlib
import dataclasses
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from checkpoint_tools.__main__ import main as tool  # noqa: E402
from swin_moe.checkpoint import CheckpointManager, Index, Piece  # noqa: E402
from swin_moe.checkpoint.directory import retire_old  # noqa: E402
from swin_moe.checkpoint.load import read_arrays  # noqa: E402

COUNTS = (8, 32, 128, 512, 2048)
KINDS = ("", "optim.exp_avg/", "optim.exp_avg_sq/")
MOST_RANKS = 512  # files of ranks: each holds the dense network too


def network(experts: int) -> tuple[list[Piece], dict]:
    """Returns the pieces of a small network with moments, and its config."""
    import torch

    from swin_moe.config.io import load_config
    from swin_moe.models import build_model

    config = load_config(
        "synthetic_swin_moe",
        (
            "model.img_size=32 model.patch_size=4 model.window_size=4 model.embed_dim=8 model.depths=[2,2] "
            f"model.num_heads=[1,2] model.mlp_ratio=2.0 model.moe.num_experts={experts} model.moe.blocks=[[1],[1]] "
            "model.num_classes=4 data.name=synthetic"
        ).split(),
    )
    with torch.device("meta"):
        model = build_model(config.model)
    random = np.random.default_rng(0)
    arrays = {
        kind + name: random.standard_normal(tuple(p.shape)).astype("f4")
        for name, p in model.named_parameters()
        for kind in KINDS
    }
    return [Piece.of(name, array) for name, array in arrays.items()], dataclasses.asdict(config)


def seconds(work: Callable[[], object]) -> float:
    """Returns the CPU seconds of a piece of work, which must succeed and may print."""
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = work()
    if result not in (0, None):
        raise SystemExit(f"failed: {result}")
    return time.process_time() - begin


def measure(directory: Path, experts: int) -> dict[str, float]:
    """Returns the CPU seconds of each verb for a number of experts."""
    pieces, config = network(experts)
    taken: dict[str, float] = {}
    manager = CheckpointManager(directory / "run", keep=4)

    def save(step: int) -> None:
        manager.save(step, pieces, state={}, config=config)

    taken["save"] = seconds(lambda: save(1))
    for step in (2, 3):
        save(step)
    taken["save beside three older ones"] = seconds(lambda: save(4))
    newest = directory / "run" / "0000000004"
    taken["retire"] = seconds(lambda: retire_old(directory / "run", 1, newest))
    taken["load, one process"] = seconds(lambda: read_arrays(Index.read(newest), pieces))
    single = [
        Piece.of(
            p.name,
            p.tensor[e : e + 1],
            shape=p.shape,
            chunk=dataclasses.replace(p.chunk, offset=(e, *p.chunk.offset[1:]), size=(1, *p.chunk.size[1:])),
        )
        for p in pieces
        if ".experts." in p.name
        for e in range(experts)
    ]
    taken["load, a piece per expert"] = seconds(lambda: read_arrays(Index.read(newest), single))

    def run(name: str, *arguments: object) -> None:
        taken[name] = seconds(lambda: tool([str(a) for a in arguments]))

    out = {n: directory / n for n in ("copy", "dcp", "back", "more", "mean", "files", "joined", "whole", "fs", "fewer")}
    run("inspect", "inspect", newest)
    run("verify", "verify", newest)
    run("plan", "plan", newest, out["copy"])
    run("reshard", "reshard", newest, out["copy"], "--world", experts)
    run("diff", "diff", newest, out["copy"])
    run("convert to dcp", "convert", newest, out["dcp"], "--to", "dcp")
    run("convert from dcp", "convert", out["dcp"], out["back"], "--to", "native")
    run("convert to one official file", "convert", newest, out["whole"], "--to", "official")
    run("convert to fairscale", "convert", newest, out["fs"], "--to", "fairscale")
    run("experts --duplicate", "experts", newest, out["more"], "--duplicate", 2 * experts, "--no-check")
    run("experts --merge", "experts", newest, out["fewer"], "--merge", experts // 2, "--no-check")
    run("average", "average", newest, out["copy"], out["mean"])
    run("export to safetensors", "export", newest, directory / "weights.safetensors", "--to", "safetensors")
    if experts <= MOST_RANKS:
        run("convert to rank files", "convert", newest, out["files"], "--to", "official-moe", "--world", experts)
        run("convert from rank files", "convert", out["files"], out["joined"], "--to", "native")
    return taken


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--least", type=int, default=COUNTS[0], help="experts")
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="experts")
    parser.add_argument("--directory", default=None)
    arguments = parser.parse_args()
    counts = [count for count in COUNTS if arguments.least <= count <= arguments.most]
    columns = []
    for count in counts:
        directory = Path(tempfile.mkdtemp(dir=arguments.directory, prefix="growth-"))
        try:
            columns.append(measure(directory, count))
            print(f"{count} experts: done", file=sys.stderr)
        finally:
            shutil.rmtree(directory)
    print(f"| CPU seconds | {' | '.join(map(str, counts))} | growth |\n|---|{'---|' * (len(counts) + 1)}")
    for name in columns[0]:
        found = [column[name] for column in columns if name in column]
        cells = [f"{value:.2f}" for value in found] + ["-"] * (len(counts) - len(found))
        growth = f"{found[-1] / max(found[-2], 1e-9):.1f}" if len(found) > 1 else "-"
        print(f"| {name} | {' | '.join(cells)} | {growth} |")


if __name__ == "__main__":
    main()
