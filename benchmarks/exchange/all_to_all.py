"""What rows between ranks cost: transports, payloads and overlap, forward and backward of dispatch, experts, combine.

    OMP_NUM_THREADS=1 python -m launcher -n 2 -- benchmarks/exchange/all_to_all.py [--rounds N]
    OMP_NUM_THREADS=1 python -m launcher -n 4 -- benchmarks/exchange/all_to_all.py

Random rows, spread evenly over the experts. The candidates take turns in one process, so that ratios hold on a busy
machine; per candidate the median over rounds of CPU and wall time (the slowest rank's), the time rows were waited for
with nothing computed meanwhile, and the bytes that leave a rank and a node. Nodes are pretended: all ranks are on this
machine, so what crosses "nodes" is no slower than what does not, and the hierarchical transport can only lose time
here. So can overlap on gloo with one core a rank, whose own threads need the core that would compute meanwhile.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from swin_moe.config import MoEConfig, ParallelConfig  # noqa: E402
from swin_moe.moe import MoELayer  # noqa: E402
from swin_moe.moe.phases import PhaseClock  # noqa: E402
from swin_moe.parallel.apply import parallelize  # noqa: E402
from swin_moe.parallel.exchange.all_to_all import AllToAllDispatcher  # noqa: E402
from swin_moe.parallel.exchange.link import EXPOSED, Link, Traffic  # noqa: E402
from swin_moe.parallel.exchange.transport import build_transport  # noqa: E402
from swin_moe.parallel.exchange.tune import even_routing, layer_pass, random_experts  # noqa: E402
from swin_moe.parallel.groups import Groups, build_groups, init_distributed  # noqa: E402

CPU = torch.device("cpu")
# tokens a rank, channels, hidden channels, experts, choices
SHAPES = ((4096, 192, 768, 8, 1), (4096, 192, 768, 32, 2), (2048, 384, 1536, 8, 1))
NODES: dict[int, dict[str, tuple[int, ...]]] = {2: {"1 + 1": (0, 1)}, 4: {"2 + 2": (0, 0, 1, 1), "3 + 1": (0, 0, 0, 1)}}


def candidates(ranks: int) -> list[tuple[str, str, int, str]]:
    """Returns (transport, payload, overlap, nodes), what it is compared with first."""
    nodes = list(NODES[ranks])
    found = [("linear", payload, 1, nodes[0]) for payload in ("none", "bf16", "fp8")]
    found += [("linear", "none", overlap, nodes[0]) for overlap in (2, 4)]
    if ranks > 2:
        found += [("hierarchical", "none", 1, name) for name in nodes]
        found += [("hierarchical", "bf16", 1, nodes[0]), ("hierarchical", "none", 2, nodes[0])]
    return found


def slowest(values: list[float]) -> list[float]:
    """Returns the largest of each value over the ranks."""
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def total(values: list[int]) -> list[float]:
    """Returns the sum of each value over the ranks."""
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found)
    return found.tolist()


def run_shape(shape: tuple[int, ...], rounds: int, groups_of: dict[str, Groups]) -> None:
    """Prints the rows of one shape."""
    tokens, dim, hidden, num_experts, top_k = shape
    ranks, rank = dist.get_world_size(), dist.get_rank()
    some = next(iter(groups_of.values()))
    with torch.device("meta"):
        layer = MoELayer(
            dim, hidden, MoEConfig(num_experts=num_experts, top_k=top_k), fc2_bias=True, layer=0, init_std=0.02
        )
    parallelize(torch.nn.Sequential(layer), ParallelConfig(), some)
    experts = random_experts(layer.experts, CPU)
    routing = even_routing(tokens, num_experts, top_k=top_k, device=CPU)
    x = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(rank))
    options = candidates(ranks)
    dispatchers = []
    for transport, payload, overlap, nodes in options:
        groups = groups_of[nodes]
        link = Link(build_transport(transport, groups)[0], payload, overlap)
        dispatchers.append(AllToAllDispatcher(groups, num_experts, link))
    times: list[list[tuple[float, float, float]]] = [[] for _ in options]
    traffic = [Traffic()] * len(options)
    for number in range(rounds + 1):
        for index, dispatcher in enumerate(dispatchers):
            link = dispatcher.link
            link.take()
            # The clock also sums up the payload's error, an encoding of its own: in a pass that is not timed.
            link.clock = PhaseClock(CPU) if number == 0 or link.payload == "none" else None
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            layer_pass(dispatcher, experts, x, routing)
            seconds = time.process_time() - cpu, time.perf_counter() - wall
            exposed = link.clock.seconds()[EXPOSED] if link.clock is not None else float("nan")
            traffic[index] = link.take()[0]
            if number:
                times[index].append((*seconds, exposed))
    name = f"{tokens} x {dim}, E {num_experts}, top-{top_k}"
    base = None
    for option, found, sent in zip(options, times, traffic):
        cpu, wall, exposed = slowest([statistics.median(column) for column in zip(*found)])
        base = base or (cpu, wall)
        leaves, crosses = (value / ranks / 2**20 for value in total([sent.sent_bytes, sent.crossing_bytes]))
        waited = f"{1e3 * exposed:.0f}" if exposed == exposed else ""
        transport, payload, overlap, nodes = option
        if rank == 0:
            print(
                f"| {name} | {transport} | {payload} | {overlap} | {nodes} | {1e3 * cpu:.0f} | {1e3 * wall:.0f} "
                f"| {cpu / base[0]:.2f} | {wall / base[1]:.2f} | {waited} | {leaves:.1f} | {crosses:.1f} |",
                flush=True,
            )


def main(argv: list[str]) -> None:
    """Prints the table of this world."""
    rounds = int(argv[argv.index("--rounds") + 1]) if "--rounds" in argv else 15
    torch.set_num_threads(1)
    _, ranks = init_distributed(CPU)
    if ranks not in NODES:
        raise SystemExit(f"start on {' or '.join(map(str, NODES))} ranks: python -m launcher -n 2 -- {Path(__file__)}")
    groups_of = {
        name: build_groups(ParallelConfig(expert=ranks), ranks, CPU, two_hops=True, hosts=hosts)
        for name, hosts in NODES[ranks].items()
    }
    if dist.get_rank() == 0:
        print(f"{ranks} ranks, gloo, 1 thread each, torch {torch.__version__}, median of {rounds} rounds\n")
        print(
            "| tokens a rank x channels | transport | payload | overlap | nodes | CPU ms | wall ms | CPU ratio "
            "| wall ratio | waited ms | MiB sent a rank | MiB to other nodes |\n" + "|---" * 12 + "|"
        )
    for shape in SHAPES:
        run_shape(shape, rounds, groups_of)


if __name__ == "__main__":
    from launcher import mpi

    mpi.bootstrap()
    mpi.call(lambda: main(sys.argv[1:]))
