"""Window attention against what the device allows and against PyTorch's means, at every stage of published networks.

    python benchmarks/kernels/roofline.py [--seconds 600] [--model "SwinV2-B w16"] [--stage 1] [--peers sdpa,flex]
    python benchmarks/kernels/roofline.py --given h200          only the floors, without a device

The floor of a pass is the longest of its bytes (qkv and gradients read and written once), its matrix products (2
forward, 5 backward) and its exponentials (one per score), each at the rate of the device, plus one launch. On a device
the copy and matrix rates and the launch are measured; the rate of exponentials is that of its special function units,
16 per clock and multiprocessor. Times are medians of replayed CUDA graphs, so that the host costs nothing on either
side, over inputs that rotate through more memory than the caches hold. Peers are measured in the order of the table
while the seconds last; torch.compile takes most of them. bfloat16.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from attention_peers import HEAD_DIM, PEERS, STAGES, Stage, StageTensors, fused
from torch import Tensor

from swin_moe.ops.attention.geometry import MASKED

DTYPE, ELEMENT_BYTES = torch.bfloat16, 2
ROUNDS = 7
ROTATED_BYTES = 256 << 20  # several times the second-level cache


@dataclass(frozen=True)
class Rates:
    """What a device does, per second."""

    copied_bytes: float  # read plus written
    flops: float  # dense bfloat16 products
    exponentials: float
    launch: float  # seconds of an empty kernel


# Copy and matrix rates as seen on such a device, exponentials from multiprocessors and clock, a usual launch.
GIVEN = {
    "h200": Rates(4.3e12, 790e12, 16 * 132 * 1.755e9, 2e-6),
}


@dataclass(frozen=True)
class Work:
    """What one pass must do at least."""

    moved_bytes: float
    flops: float
    exponentials: float

    def seconds(self, rates: Rates) -> float:
        """Returns the floor of the pass."""
        parts = self.moved_bytes / rates.copied_bytes, self.flops / rates.flops, self.exponentials / rates.exponentials
        return max(parts) + rates.launch

    def bound(self, rates: Rates) -> str:
        """Returns what the floor is made of."""
        parts = {
            "bytes": self.moved_bytes / rates.copied_bytes,
            "products": self.flops / rates.flops,
            "exponentials": self.exponentials / rates.exponentials,
        }
        return max(parts, key=lambda name: parts[name])


def work(stage: Stage, *, backward: bool) -> Work:
    """Returns the work of a pass.

    Forward reads qkv and writes the result; backward reads qkv and the result's gradient and writes qkv's.
    """
    tokens, channels = stage.batch * stage.side**2, stage.heads * HEAD_DIM
    scores = tokens * stage.window**2 * stage.heads
    widths, products = (7, 5) if backward else (4, 2)
    return Work(widths * tokens * channels * ELEMENT_BYTES, products * 2 * scores * HEAD_DIM, scores)


def timed(calls: list[Callable[[], object]]) -> float:
    """Returns the median seconds of one of the calls, which are captured together and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def measured_rates() -> Rates:
    """Returns the rates of the current device."""
    properties = torch.cuda.get_device_properties(0)
    source = torch.zeros(1 << 29, dtype=torch.uint8, device="cuda")
    target, small = torch.empty_like(source), torch.zeros(1, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    copy = timed([lambda: target.copy_(source)] * 4)
    product = timed([lambda: torch.mm(a, b)] * 4)
    clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
    return Rates(
        2 * source.numel() / copy,
        2 * 8192**3 / product,
        16 * properties.multi_processor_count * clock,
        timed([lambda: small.zero_()] * 50),
    )


class Inputs:
    """Copies of a stage's tensors that together do not fit the caches."""

    def __init__(self, stage: Stage) -> None:
        first = stage.tensors(torch.device("cuda"), DTYPE)
        count = max(2, min(8, ROTATED_BYTES // (first[0].numel() * ELEMENT_BYTES)))
        self.sets = [first, *(stage.tensors(torch.device("cuda"), DTYPE, seed) for seed in range(1, count))]
        self.grads = [torch.randn_like(qkv[..., : qkv.shape[3] // 3]) for qkv, *_ in self.sets]

    def forward(self, attend: Callable[..., Tensor]) -> float:
        """Returns the seconds of a forward pass without gradients."""
        with torch.no_grad():
            return timed([partial(attend, *given) for given in self.sets])

    def train(self, attend: Callable[..., Tensor]) -> float:
        """Returns the seconds of a forward and a backward pass."""

        def step(given: StageTensors, grad: Tensor) -> tuple[Tensor, ...]:
            leaves = [t for t in given if t is not None]
            for leaf in leaves:
                leaf.requires_grad_()
            return torch.autograd.grad(attend(*given), leaves, grad)

        return timed([partial(step, given, grad) for given, grad in zip(self.sets, self.grads)])

    def backward(self, stage: Stage) -> float:
        """Returns the seconds of the operator's backward pass alone."""
        numbers = (stage.heads, *(stage.window,) * 2, *(stage.shift,) * 2, stage.scale, MASKED)
        operator = torch.ops.swin_moe.window_attention_backward
        with torch.no_grad():
            forward = torch.ops.swin_moe.window_attention_and_sums
            saved = [forward(s[0], s[1], s[2], None, *numbers) for s in self.sets]
            passes = zip(self.sets, self.grads, saved)
            return timed([partial(operator, g, s[0], s[1], s[2], None, *numbers, *k) for s, g, k in passes])


def print_floors(rates: Rates, chosen: list[Stage]) -> None:
    """Prints what each pass must take."""
    print(
        f"copy {rates.copied_bytes / 1e12:.2f} TB/s, products {rates.flops / 1e12:.0f} TFLOP/s, exponentials "
        f"{rates.exponentials / 1e12:.2f} T/s, launch {rates.launch * 1e6:.1f} us\n"
    )
    print("| network | stage | forward floor us | bound by | backward floor us | bound by |\n|---|---|---|---|---|---|")
    for stage in chosen:
        passes = [work(stage, backward=backward) for backward in (False, True)]
        cells = [f"{w.seconds(rates) * 1e6:.1f} | {w.bound(rates)}" for w in passes]
        print(f"| {stage.model} | {stage.number} | {' | '.join(cells)} |")


def print_ours(rates: Rates, chosen: list[Stage]) -> dict[Stage, tuple[float, float]]:
    """Prints the operator against its floors; returns its seconds of (forward, forward + backward)."""
    print("\n| network | stage | forward us | of floor | backward us | of floor |\n|---|---|---|---|---|---|")
    found = {}
    for stage in chosen:
        inputs = Inputs(stage)
        forward, backward = inputs.forward(fused(stage)), inputs.backward(stage)
        found[stage] = forward, inputs.train(fused(stage))
        cells = [
            f"{seconds * 1e6:.1f} | {seconds / work(stage, backward=which).seconds(rates):.2f}"
            for which, seconds in ((False, forward), (True, backward))
        ]
        print(f"| {stage.model} | {stage.number} | {' | '.join(cells)} |", flush=True)
    return found


def print_peers(ours: dict[Stage, tuple[float, float]], names: list[str], until: float) -> None:
    """Prints the time of each peer over ours, forward and forward + backward, as long as there is time."""
    print("\nSpeed-up over each peer (peer's time / ours), forward and forward + backward:\n")
    print("| peer | network | stage | forward | forward + backward |\n|---|---|---|---|---|")
    order = sorted(ours, key=lambda stage: (stage.number not in (1, 3), stage.number))
    for name in names:
        for stage in order:
            if time.monotonic() > until:
                print(f"\nThe time is over at {name}, {stage.model}, stage {stage.number}.")
                return
            cells = []
            for which, seconds in zip(("forward", "train"), ours[stage]):
                try:
                    cells.append(f"{getattr(Inputs(stage), which)(PEERS[name](stage)) / seconds:.2f}")
                except Exception as error:  # what a peer does not support is a result too
                    cells.append(f"fails ({type(error).__name__})")
                    torch.cuda.synchronize()
                torch.cuda.empty_cache()
            print(f"| {name} | {stage.model} | {stage.number} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--given", choices=GIVEN, help="print the floors of such a device and end")
    parser.add_argument("--seconds", type=float, default=600, help="after which no further peer is measured")
    parser.add_argument("--model", default="", help="of the table")
    parser.add_argument("--stage", type=int, default=0, help="1 to 4; 0 = all")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated")
    options = parser.parse_args()
    chosen = [s for s in STAGES if options.model in ("", s.model) and options.stage in (0, s.number)]
    if unknown := set(options.peers.split(",")) - set(PEERS):
        parser.error(f"--peers must be among {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    if not chosen:
        parser.error(f"--model must be one of {', '.join(dict.fromkeys(s.model for s in STAGES))}")
    if options.given:
        print(f"{options.given} (given), batch {STAGES[0].batch}, bfloat16: ", end="")
        return print_floors(GIVEN[options.given], chosen)
    if not torch.cuda.is_available():
        parser.error("no CUDA device; --given prints floors without one")
    until = time.monotonic() + options.seconds
    rates = measured_rates()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {STAGES[0].batch}, bfloat16: ", end="")
    print_floors(rates, chosen)
    print_peers(print_ours(rates, chosen), options.peers.split(","), until)


if __name__ == "__main__":
    main()
