"""Where the time of a training step goes on a device: host, launches, kernels.

    python benchmarks/gpu_profile.py [--device cuda] [--only swin_tiny] [--batch 64] [--precision bf16] [--top 15]

Per network of train_step.py: milliseconds a step (training, inference) over ten steps between two events; milliseconds
in which the host issues a step, measured from an idle device; kernels and copies a step; the share of the time in which
the device is busy; the kernels that take longest. Host above step: the host is the limit, and fewer launches help;
below it with the device busy, the kernels are. A launch queue of the driver holds about a thousand launches, so the
host's time is the device's where a step has far more and the device is slower. The line "from a CUDA graph" is the
training step again, forward and backward replayed as engine.cuda_graphs=true does.

--device cpu has no launches to count: it prints the times and the operators that take longest.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from device_clock import seconds_per_call
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import PAIRS, Pair, Side

from swin_moe.engine.graphs import DeviceRecorder, Recorder

STEPS = 10
ISSUED = 5  # steps whose issue is timed; the median counts
COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Span:
    """A kernel or a copy on the device, in microseconds."""

    name: str
    start: float
    end: float


def spans_of(events: Iterable) -> list[Span]:
    """Returns what ran on the device, of a profiler's events."""
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def busy_share(spans: list[Span]) -> float:
    """Returns the part of the time from the first to the last in which at least one was running."""
    if not spans:
        return 0.0
    ordered = sorted(spans, key=lambda span: span.start)
    busy, until = 0.0, ordered[0].start
    for span in ordered:
        busy += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return busy / max(until - ordered[0].start, 1e-9)


def longest(spans: list[Span], top: int) -> list[tuple[str, float, int]]:
    """Returns (name, microseconds, number) of the names that take longest together."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        by_name[span.name].append(span.end - span.start)
    rows = [(name, sum(taken), len(taken)) for name, taken in by_name.items()]
    return sorted(rows, key=lambda row: -row[1])[:top]


def issue_milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """Returns the median milliseconds in which the host hands a step to an idle device."""
    taken = []
    for _ in range(ISSUED):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize(device)
    return statistics.median(taken)


def step_from_graph(side: Side, recorder: Recorder) -> Callable[[], None]:
    """Returns a training step whose forward and backward are recorded here and replayed."""
    parameters = list(side.model.parameters())

    def call() -> tuple[torch.Tensor, ...]:
        side.optimizer.zero_grad(set_to_none=True)
        return side.differentiate(), *(p.grad for p in parameters if p.grad is not None)

    recorder.eager(lambda: call()[0])
    replay = recorder.record(call).replay
    gradients = [(p, p.grad) for p in parameters]

    def step() -> None:
        replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        side.optimizer.step()

    return step


def print_graphed(side: Side, recorder: Recorder, device: torch.device, steps: int) -> None:
    """Prints what a training step takes from a graph, or why there is none."""
    try:
        step = step_from_graph(side, recorder)
    except RuntimeError as error:
        print(f"  from a CUDA graph: cannot be recorded ({(str(error).splitlines() or [''])[0]})", flush=True)
        return
    step()
    seconds, rate = seconds_per_call(step, device, steps), len(side.images)
    print(
        f"  from a CUDA graph: train {1e3 * seconds:.2f} ms a step ({rate / seconds:.0f} images/s), host issues it in "
        f"{issue_milliseconds(step, device):.2f} ms",
        flush=True,
    )


def print_device(step: Callable[[], None], device: torch.device, steps: int, top: int) -> None:
    """Prints what a profile of two steps says."""
    print(f"  host issues a step in {issue_milliseconds(step, device):.2f} ms", flush=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    spans = spans_of(profiled.events())
    if not spans:
        print("  the profiler saw nothing on the device (no CUPTI?): launches and kernels are not known")
        return
    copies = [span for span in spans if span.name.startswith(COPIES)]
    total = sum(span.end - span.start for span in spans)
    print(
        f"  {(len(spans) - len(copies)) / steps:.0f} kernels and {len(copies) / steps:.0f} copies a step, "
        f"device busy {busy_share(spans):.0%}, kernels together {total / steps / 1e3:.2f} ms a step"
    )
    for name, taken, number in longest(spans, top):
        print(f"  {taken / steps / 1e3:8.3f} ms {taken / total:6.1%} {number / steps:7.1f}x  {name[:140]}")


def print_host(step: Callable[[], None], steps: int, top: int) -> None:
    """Prints the operators that take longest on the CPU."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            step()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    print(f"  {sum(row.count for row in rows) / steps:.0f} operators a step, views among them; no device: no launches")
    for row in rows[:top]:
        taken = row.self_cpu_time_total
        print(f"  {taken / steps / 1e3:8.3f} ms {taken / total:6.1%} {row.count / steps:7.1f}x  {row.key[:140]}")


def print_network(pair: Pair, options: argparse.Namespace, device: torch.device) -> None:
    """Prints everything about one network."""
    images = torch.randn(options.batch, 3, pair.size, pair.size, device=device)
    side = Side(pair.ours(), images, options.precision)
    for _ in range(1 if device.type == "cpu" else 3):  # allocator, caches, choices that are measured
        side.train()
        side.infer()
    seconds = {mode: seconds_per_call(getattr(side, mode), device, options.steps) for mode in ("train", "infer")}
    rates = ", ".join(
        f"{mode} {1e3 * s:.2f} ms a step ({options.batch / s:.0f} images/s)" for mode, s in seconds.items()
    )
    print(f"{pair.name}, {pair.size} pixels, batch {options.batch}, {options.precision}: {rates}", flush=True)
    if device.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        print_device(side.train, device, 2, options.top)
        print_graphed(side, DeviceRecorder(device), device, options.steps)
        torch.cuda.reset_peak_memory_stats()
    else:
        print_host(side.train, 1, options.top)


def main() -> None:
    """Prints one block per network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="swin_tiny,swinv2_base_window16,swin_moe_small", help="of train_step.py")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=STEPS, help="that are timed together")
    parser.add_argument("--top", type=int, default=15, help="kernels that are named")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device; --device cpu shows that the script works")
    chosen = [pair for pair in PAIRS if pair.name in options.only.split(",")]
    if not chosen:
        parser.error(f"--only must be among {', '.join(pair.name for pair in PAIRS)}, got {options.only}")
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, 1 thread'}, torch {torch.__version__}\n")
    for pair in chosen:
        print_network(pair, options, device)


if __name__ == "__main__":
    main()
