"""One MoE layer, forward and backward, for every size: ours over Tutel, a plain loop and a grouped_mm layer.

    OMP_NUM_THREADS=1 python benchmarks/kernels/moe_grid.py [--tutel FOLDER] [--tokens 512,2048,4096]
        [--dims 48,96,192,384,768] [--experts 8,32,128] [--choices 1,2] [--precisions fp32,bf16] [--capacity 1.25]
        [--rounds 9] [--seconds 4]

FOLDER is what Tutel is imported from where it is not installed; without it the column stays empty. All have our
weights, gates of a router in float32, biases in both layers and GShard loss (moe_peers.py), and are dropless unless
there is a capacity, which the loop and grouped_mm lack. Output and input gradient are compared with ours before
anything is timed: to 1e-4 of their norm in float32, to 2e-2 in bfloat16, where the loop's router is bfloat16 and stays
uncompared.

They take turns in one process; CPU times are medians over rounds, ratios medians of a round's ratios, above 1: ours is
faster. "Fastest" is the peer of the smallest ratio. --seconds ends a row's rounds early, after three at least.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time

import torch
from moe_layer import call, clear_choices, inputs
from moe_peers import CPU, Contender, Shape, Skipped, grouped, loop, ours, tutel
from torch import Tensor

from swin_moe.parallel.groups import init_distributed

PEERS = {"tutel": tutel, "loop": loop, "grouped_mm": grouped}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
FEWEST_ROUNDS = 3
SMALL = "T <= 2048, D <= 96"


def shapes(options: argparse.Namespace) -> list[Shape]:
    """Returns the rows that are asked for."""
    sizes = itertools.product(options.precisions, options.tokens, options.dims, options.experts, options.choices)
    return [Shape(t, d, e, k, options.capacity, 1.0, dtype=DTYPES[kind]) for kind, t, d, e, k in sizes]


def contenders(shape: Shape) -> tuple[dict[str, Contender], Tensor, Tensor]:
    """Returns the layers of a row, ours first, all of which gave our results; tokens; and the gradient of the output.

    Raises:
        RuntimeError: A peer computes something else.
    """
    layer, mine = ours(shape)
    x = inputs(shape, layer)
    grad = torch.randn(shape.tokens, shape.dim, generator=torch.Generator().manual_seed(1)) / shape.tokens
    grad = grad.to(shape.dtype)
    found, expected = {"ours": mine}, call(mine, x, grad)[2:]
    clear = clear_choices(shape, layer, x.float() if shape.dtype == torch.float32 else x)
    for name, build in PEERS.items():
        try:
            peer = build(shape, layer)
        except Skipped:
            continue
        results = call(peer, x, grad)[2:]
        if shape.dtype == torch.float32 or build is not loop:
            for what, a, b in zip(("output", "input gradient"), expected, results):
                differs = float((a.float() - b.float())[clear].norm() / a.float()[clear].norm())
                if not differs < ALLOWED[shape.dtype]:
                    raise RuntimeError(f"{shape}, {name}: {what} differs by {differs:.1e} of its norm")
        found[name] = peer
    return found, x, grad


def measure(shape: Shape, rounds: int, seconds: float) -> tuple[float, dict[str, float]]:
    """Returns our CPU time in ms and, by peer, the ratio."""
    layers, x, grad = contenders(shape)
    times: dict[str, list[float]] = {name: [] for name in layers}
    start = time.perf_counter()
    for number in range(rounds):
        for name, layer in layers.items():
            times[name].append(call(layer, x, grad)[0])
        if number + 1 >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
    mine = times.pop("ours")
    ratios = {name: statistics.median(b / a for a, b in zip(mine, theirs)) for name, theirs in times.items()}
    return 1e3 * statistics.median(mine), ratios


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tutel")
    for name, default in (("tokens", "512,2048,4096"), ("dims", "48,96,192,384,768"), ("experts", "8,32,128")):
        parser.add_argument(f"--{name}", type=numbers, default=numbers(default))
    parser.add_argument("--choices", type=numbers, default=[1, 2])
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=list(DTYPES))
    parser.add_argument("--capacity", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Prints a row per size, and medians and smallest of the fastest peer's ratio."""
    options = parse(argv)
    if options.tutel:
        sys.path.insert(0, options.tutel)
    torch.set_num_threads(1)
    init_distributed(CPU)
    print(f"torch {torch.__version__}, one thread\n\n| T | D | E | k | precision | ours, ms | fastest / ours", end="")
    print("".join(f" | {name} / ours" for name in PEERS), "|\n" + "|---" * (7 + len(PEERS)) + "|", flush=True)
    fastest: dict[str, list[float]] = {}
    for shape in shapes(options):
        mine, ratios = measure(shape, options.rounds, options.seconds)
        least, kind = min(ratios.values()), next(name for name, dtype in DTYPES.items() if dtype == shape.dtype)
        cells = [f"{ratios[name]:.2f}" if name in ratios else "" for name in PEERS]
        size = (shape.tokens, shape.dim, shape.experts, shape.top_k, kind, f"{mine:.1f}", f"{least:.2f}")
        print("|", " | ".join(map(str, (*size, *cells))), "|", flush=True)
        small = shape.tokens <= 2048 and shape.dim <= 96
        for group in (kind, f"{kind}, {SMALL}") if small else (kind,):
            fastest.setdefault(group, []).append(least)
        gc.collect()
    print("\n| rows | fastest / ours: median | smallest |\n|---|---|---|")
    for group, found in fastest.items():
        print(f"| {len(found)} x {group} | {statistics.median(found):.2f} | {min(found):.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
