"""The attention half of a block (projection, window attention, output projection): ours against the others.

    OMP_NUM_THREADS=1 python benchmarks/kernels/window_attention.py [--no-compile] [--only TEXT] [--rounds N]

Ours is what model.attention=auto runs, or the path that --path names. The others compute the same in the official
order (window_attention_peers.py): eager, scaled_dot_product_attention with a mask per image or shared, both compiled,
and FlexAttention, which has no backward on a CPU. All take turns in one process with one thread; a ratio is the median
over rounds of (their processor time / ours), so above 1 ours is faster. bf16 runs under autocast with float32 weights,
as engine.precision=bf16 does. Saved bytes are the activations that the half keeps for backward, its input included.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from window_attention_peers import Half, Row, peers, rows  # noqa: E402

from swin_moe.ops import extension  # noqa: E402
from swin_moe.ops.attention.choice import choose_path  # noqa: E402
from swin_moe.ops.attention.half import PATHS, HalfTensors, attention_half  # noqa: E402

TARGET_SECONDS = 0.025  # of a call of eager, which the number of images is chosen by
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("fwd", "fwd+bwd")
KEPT_UP = 0.95  # of the fastest of the others


def random_tensors(row: Row) -> HalfTensors:
    """Returns weights of the row's shape, float32."""
    generator = torch.Generator().manual_seed(0)
    dim, heads, positions = row.dim, row.heads, (2 * row.window - 1) ** 2
    sizes = ((3 * dim, dim), (3 * dim,), (dim, dim), (dim,), (positions, heads))
    qkv, qkv_bias, proj, proj_bias, table = (
        torch.randn(size, generator=generator).mul_(0.02).requires_grad_() for size in sizes
    )
    scale = torch.full((heads, 1, 1), 10.0).log().requires_grad_() if row.cosine else None
    return HalfTensors(qkv, qkv_bias, proj, proj_bias, table, scale)


def step(half: Half, x: Tensor, tensors: HalfTensors, dtype: torch.dtype, kind: str) -> Tensor:
    """Runs one forward, and backward, and returns the output."""
    mixed = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else nullcontext()
    with torch.set_grad_enabled(kind != "fwd"), mixed:
        out = half(x)
    if kind != "fwd":
        torch.autograd.grad(out, [x, *(t for t in tensors if t is not None)], torch.ones_like(out))
    return out.detach()


def seconds(half: Half, x: Tensor, tensors: HalfTensors, dtype: torch.dtype, kind: str) -> float:
    """Returns the processor time of one step."""
    start = time.process_time()
    step(half, x, tensors, dtype, kind)
    return time.process_time() - start


def saved_bytes(half: Half, row: Row, images: int, dtype: torch.dtype) -> int:
    """Returns the size of what one forward keeps for backward, without weights and their copies in half precision.

    Parts of one tensor count once. Weights are told by their shape, so the map gets another number of tokens.
    """
    weights, storages = {(3 * row.dim, row.dim), (row.dim, 3 * row.dim), (row.dim, row.dim)}, {}
    images += images * row.side**2 in (row.dim, 3 * row.dim)
    x = torch.randn(images, row.side, row.side, row.dim, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mixed = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        half(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def contenders(row: Row, tensors: HalfTensors, path: str, options: argparse.Namespace) -> dict[str, Half]:
    """Returns all that take turns, ours first."""
    ours = {"ours": lambda x: attention_half(x, tensors, row.shape, path)}
    return ours | peers(row, tensors, compiled=not options.no_compile)


def run_row(row: Row, name: str, kind: str, options: argparse.Namespace) -> tuple[dict[str, float], str]:
    """Returns (ratio per contender that ran, a note), and checks that all compute the same."""
    torch.compiler.reset()
    dtype, tensors = DTYPES[name], random_tensors(row)
    generator = torch.Generator().manual_seed(1)

    def images(number: int) -> Tensor:
        x = torch.randn(number, row.side, row.side, row.dim, generator=generator)
        return x.requires_grad_(kind != "fwd")

    eager = peers(row, tensors, compiled=False)["eager"]
    once = min(seconds(eager, images(1), tensors, dtype, kind) for _ in range(3))
    x = images(max(1, round(TARGET_SECONDS / once)))
    mixed = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else nullcontext()
    with torch.set_grad_enabled(kind != "fwd"), mixed:
        path = choose_path(options.path, x, tensors, row.shape)
    running, skipped = contenders(row, tensors, path, options), []
    expected = step(running["ours"], x, tensors, dtype, kind).float()
    for peer in list(running)[1:]:
        try:
            found = step(running[peer], x, tensors, dtype, kind).float()
        except Exception as error:  # a peer that cannot do a row is named, and the others go on
            skipped.append(f"{peer}: {(str(error).splitlines() or [type(error).__name__])[0][:80]}")
            del running[peer]
            continue
        torch.testing.assert_close(found, expected, rtol=0.05, atol=3e-2 * float(expected.abs().max()))
    times = defaultdict(list)
    for _ in range(options.rounds):
        for peer, half in running.items():
            times[peer].append(seconds(half, x, tensors, dtype, kind))
    ratios = {
        peer: statistics.median(t / o for t, o in zip(times[peer], times["ours"])) for peer in running if peer != "ours"
    }
    took = 1e3 * statistics.median(times["ours"])
    note = f"{path}, {len(x)} images, {took:.1f} ms"
    if kind != "fwd":
        kept = {peer: saved_bytes(running[peer], row, len(x), dtype) for peer in ("ours", "eager")}
        ratios["saved"] = kept["eager"] / kept["ours"]
        note += f", saved {kept['ours'] / 2**20:.1f} of {kept['eager'] / 2**20:.1f} MiB"
    return ratios, "; ".join([note, *skipped])


def report(results: dict[tuple[str, str], list[tuple[Row, dict[str, float]]]]) -> None:
    """Prints the medians over rows, and the rows where another was faster."""
    print("\nmedian over rows (others' time / ours)")
    both = {("all", kind): sum((f for (_, k), f in results.items() if k == kind), []) for kind in PASSES}
    for (name, kind), found in (results | {key: found for key, found in both.items() if found}).items():
        speeds = [{peer: r for peer, r in ratios.items() if peer != "saved"} for _, ratios in found]
        behind = [str(row) for (row, _), speed in zip(found, speeds) if min(speed.values()) < KEPT_UP]
        names = dict.fromkeys(peer for speed in speeds for peer in speed)
        median = {peer: statistics.median(s[peer] for s in speeds if peer in s) for peer in names}
        best = statistics.median(min(speed.values()) for speed in speeds)
        text = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in median.items())
        print(f"{name} {kind:<8} best of the others {best:.2f}; {text}")
        saved = [ratios["saved"] for _, ratios in found if "saved" in ratios]
        if saved:
            middle = statistics.median(saved)
            print(f"{'':<13} eager keeps {min(saved):.2f} to {max(saved):.2f} times the bytes, median {middle:.2f}")
        print(f"{'':<13} below {KEPT_UP} of the best: {', '.join(behind) or 'none'}")


def main() -> None:
    """Runs the rows and prints one line each as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="rows whose name contains this, e.g. 'w16 stage 1', 'bf16', 'fwd+bwd'"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile and FlexAttention")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every contender (15)")
    parser.add_argument("--path", default="auto", choices=("auto", *PATHS), help="what ours runs (auto)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    built = extension.cpu_capability() or extension.why_not("cpu")
    print(f"torch {torch.__version__}, compiled kernels: {built}")
    results: dict[tuple[str, str], list] = defaultdict(list)
    for row in rows():
        for name in DTYPES:
            for kind in PASSES:
                label = f"{row} {name} {kind}"
                if options.only not in label:
                    continue
                ratios, note = run_row(row, name, kind, options)
                results[name, kind].append((row, ratios))
                best = min(ratio for peer, ratio in ratios.items() if peer != "saved")
                text = "  ".join(f"{peer} {ratio:.2f}" for peer, ratio in ratios.items())
                print(f"{label:<36} {'ok' if best >= KEPT_UP else 'BEHIND':<7} {text}  ({note})", flush=True)
    if not results:
        parser.error(f"--only {options.only!r} is in no row; rows are named like '{rows()[0]} fp32 fwd'")
    report(results)


if __name__ == "__main__":
    main()
