"""One MoE layer, forward and backward: ours against Tutel, DeepSpeed, FairScale and a plain loop over experts.

    OMP_NUM_THREADS=1 python benchmarks/kernels/moe_layer.py [--all] [--only TEXT] [--small] [--routing] [--rounds N]
        [--tutel FOLDER]
    python -m launcher -n 2 -- benchmarks/kernels/moe_layer.py [--all]

Ours and the peers take turns in one process, so that a ratio holds on a busy machine; median over rounds of CPU time
and of wall time, the slowest rank's. A peer that is not installed or cannot do a shape is named with the reason. Where
a peer has our weights and semantics, its results are compared with ours before it is timed. FOLDER is what
Tutel is imported from where it is not installed. moe_grid.py has a row for every size.

Balanced rows use a fresh router with capacity factor 1.25. Skewed rows are dropless: tokens lean toward one expert so
far that it gets 5 times the mean load, or nearly all tokens where 5 times is more than there are. --routing times
routing alone at 128 experts with batch-prioritized slots. --small takes layers of few tokens and channels and three of
4,096 tokens, dropless, in float32 and bfloat16 (weights too; its results are not compared).
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from moe_peers import CPU, PEERS, Contender, Shape, Skipped, ours, world_size  # noqa: E402

from swin_moe.moe.layer import MoELayer  # noqa: E402
from swin_moe.moe.routing import Routing, expert_capacity, route  # noqa: E402
from swin_moe.parallel.groups import init_distributed  # noqa: E402

HOTTEST = 5.0  # load of the hottest expert over the mean, where k choices among E experts allow it: at most E / k
SECONDS_A_ROW = 6.0


def shapes(everything: bool, ranks: int) -> list[Shape]:
    """Returns the rows: all the issue's shapes, or those that take seconds.

    The largest skewed ones are left out: padding makes a peer take minutes for one call.
    """
    experts = (8, 32, 128)
    dims = (192, 384, 768) if everything else (192, 384)
    tokens = (4096, 18432) if everything and ranks == 1 else (4096,)
    balanced = [Shape(t, d, e, k, 1.25, 1.0) for t in tokens for d in dims for e in experts for k in (1, 2)]
    largest = 768 if everything and ranks == 1 else 384
    skewed = [
        Shape(4096, d, e, k, 0.0, min(HOTTEST, 0.95 * e / k))
        for d in dims
        if d <= largest
        for e in experts
        for k in (1, 2)
    ]
    return [s for s in balanced + skewed if everything or (s.dim == 192 or s.top_k == 1)]


def small_shapes() -> list[Shape]:
    """Returns the rows of --small."""
    sizes = [(t, d, e, k) for t in (512, 2048) for d in (48, 96) for e in (8, 32) for k in (1, 2)]
    sizes += [(4096, 96, 128, 2), (4096, 192, 32, 1), (4096, 192, 128, 1)]
    return [Shape(*size, 0.0, 1.0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16) for size in sizes]


def inputs(shape: Shape, layer: MoELayer) -> Tensor:
    """Returns (T, D) tokens; leaning toward one expert until its load is `shape.skew` times the mean of this rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    x = torch.randn(shape.tokens, shape.dim, generator=torch.Generator().manual_seed(rank))
    if shape.skew == 1:
        return x.to(shape.dtype)
    with torch.no_grad():
        direction = layer.router.get_parameter("weight")[0]
        direction = direction / direction.norm()
        low, high = 0.0, 64.0
        for _ in range(40):
            lean = (low + high) / 2
            chosen = layer.router(x + lean * direction).topk(shape.top_k, dim=1).indices
            load = (chosen == 0).sum() * shape.experts / chosen.numel()
            low, high = (lean, high) if load < shape.skew else (low, lean)
    return x + low * direction


def call(contender: Contender, x: Tensor, grad: Tensor) -> tuple[float, float, Tensor, Tensor]:
    """Returns (CPU seconds, wall seconds, y, gradient of x) of one forward and backward."""
    x = x.detach().requires_grad_()
    if world_size() > 1:
        dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    y, aux = contender.forward(x)
    torch.autograd.backward([y, aux], [grad, torch.tensor(0.01)])
    taken = time.process_time() - cpu, time.perf_counter() - wall
    for parameter in contender.parameters:
        parameter.grad = None  # at once: at 128 experts of 768 channels there is no room for everybody's
    assert x.grad is not None, "backward has just been"
    return *taken, y.detach(), x.grad


def slowest(values: list[float]) -> list[float]:
    """Returns the largest of each value over the ranks."""
    found = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def clear_choices(shape: Shape, layer: MoELayer, x: Tensor) -> Tensor:
    """Returns (T,) bool, whether rounding cannot change a token's experts: its k-th score and the next one differ."""
    with torch.no_grad():
        scores = layer.router(x).softmax(dim=1).topk(min(shape.top_k + 1, shape.experts), dim=1).values
    return (scores[:, :-1] - scores[:, 1:]).amin(dim=1) > 1e-6


def check_equal(name: str, mine: tuple, theirs: tuple, clear: Tensor) -> None:
    """Raises AssertionError where a peer with our weights computes something else for tokens whose choice is clear."""
    assert clear.any(), f"{name}: every token's choice hangs on rounding, nothing can be compared"
    for what, a, b in zip(("output", "input gradient"), mine[2:], theirs[2:]):
        difference = float((a - b)[clear].norm() / a[clear].norm())
        assert difference < 1e-4, f"{name}: {what} differs by {difference:.1e} of its norm"


def run_shape(shape: Shape, rounds: int) -> list[tuple[str, float, float]]:
    """Prints the rows of a shape; returns (peer, CPU ratio, wall ratio)."""
    layer, mine = ours(shape)
    x = inputs(shape, layer)
    grad = torch.randn(shape.tokens, shape.dim, generator=torch.Generator().manual_seed(1)) / shape.tokens
    grad = grad.to(shape.dtype)
    contenders, first, clear = {"ours": mine}, call(mine, x, grad), clear_choices(shape, layer, x)
    skipped = {}
    for name, build in PEERS.items():
        try:
            peer = build(shape, layer)
        except Skipped as error:
            skipped[name] = str(error)
            continue
        result = call(peer, x, grad)
        if peer.comparable and shape.dtype == torch.float32:
            check_equal(f"{shape}, {name}", first, result, clear)
        contenders[name] = peer
        del result
    start = time.perf_counter()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            times[name].append(call(contender, x, grad)[:2])
        (elapsed,) = slowest([time.perf_counter() - start])
        if number >= 1 and elapsed > SECONDS_A_ROW:
            break
    medians = {name: slowest([statistics.median(t) for t in zip(*pairs)]) for name, pairs in times.items()}
    found = []
    cpu, wall = medians.pop("ours")
    for name, (peer_cpu, peer_wall) in medians.items():
        found.append((name, peer_cpu / cpu, peer_wall / wall))
        say(
            f"| {shape} | {name} | {1e3 * cpu:.1f} / {1e3 * wall:.1f} | {1e3 * peer_cpu:.1f} / {1e3 * peer_wall:.1f} "
            f"| {peer_cpu / cpu:.2f} | {peer_wall / wall:.2f} |"
        )
    for name, reason in skipped.items():
        if "GiB" in reason:
            say(f"| {shape} | {name} | | skipped: {reason} | | |")
    gc.collect()
    return found


def say(text: str) -> None:
    """Prints on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def compare_routing(rounds: int) -> None:
    """Prints routing alone, 128 experts, batch-prioritized: ours against Tutel's."""
    from tutel.impls.fast_dispatch import extract_critical

    print("| T | k | ours ms | tutel ms | CPU ratio |\n|---|---|---|---|---|")
    for tokens in (4096, 18432):
        for top_k in (1, 2):
            logits = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(0))
            scores = torch.softmax(logits, dim=1)
            capacity = expert_capacity(tokens, 128, top_k=top_k, factor=1.25)

            def mine(logits=logits, top_k=top_k, capacity=capacity, scores=scores) -> Routing:
                return route(logits, top_k=top_k, capacity=capacity, batch_prioritized=True, scores=scores)

            def theirs(scores=scores, top_k=top_k):
                return extract_critical(
                    scores,
                    top_k=top_k,
                    loss_fn=None,
                    capacity_factor=1.25,
                    batch_prioritized_routing=True,
                    normalize_gate=False,
                )

            crit = theirs()[0]
            assert mine().capacity == crit[4] and torch.equal(mine().expert.t(), torch.stack(crit[1]).long())
            times: dict[Callable[[], object], list[float]] = {mine: [], theirs: []}
            for _ in range(rounds):
                for run in times:
                    start = time.process_time()
                    run()
                    times[run].append(time.process_time() - start)
            a, b = (1e3 * statistics.median(t) for t in times.values())
            print(f"| {tokens} | {top_k} | {a:.2f} | {b:.2f} | {b / a:.2f} |", flush=True)


def main(argv: list[str]) -> None:
    """Prints the table and, per peer, the median and the smallest ratio."""
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        return
    rounds = int(argv[argv.index("--rounds") + 1]) if "--rounds" in argv else 15
    if "--tutel" in argv:
        sys.path.insert(0, argv[argv.index("--tutel") + 1])
    torch.set_num_threads(1)
    if "--routing" in argv:
        compare_routing(rounds)
        return
    init_distributed(CPU)
    say(f"{world_size()} ranks, 1 thread each, torch {torch.__version__}; ratios above 1: ours is faster\n")
    say("| shape, tokens a rank | peer | ours ms CPU / wall | peer ms CPU / wall | CPU ratio | wall ratio |")
    say("|---|---|---|---|---|---|")
    only = argv[argv.index("--only") + 1] if "--only" in argv else ""  # rows whose first column holds the text
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    rows = small_shapes() if "--small" in argv else shapes("--all" in argv, world_size())
    for shape in (s for s in rows if only in str(s)):
        for name, cpu, wall in run_shape(shape, rounds):
            kind = "capacity 1.25" if shape.factor else "dropless, skewed" if shape.skew > 1 else f"{shape.dtype}"
            ratios.setdefault((name, kind), []).append((cpu, wall))
    say("\n| peer | rows | CPU ratio median, smallest | wall ratio median, smallest |\n|---|---|---|---|")
    for (name, kind), found in ratios.items():
        of_cpu, of_wall = zip(*found)
        say(
            f"| {name} | {len(found)} x {kind} | {statistics.median(of_cpu):.2f}, {min(of_cpu):.2f} "
            f"| {statistics.median(of_wall):.2f}, {min(of_wall):.2f} |"
        )


if __name__ == "__main__":
    from launcher import mpi

    mpi.bootstrap()
    mpi.call(lambda: main(sys.argv[1:]))
