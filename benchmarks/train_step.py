"""One training step and one inference step against timm, in one process, interleaved.

    python benchmarks/train_step.py [--batch 8] [--rounds 7] [--threads 1] [--precision fp32] [--only swin_tiny]

Swin-T, SwinV2-T and SwinV2-B against timm's networks of the same name: ratio of speeds. Swin-MoE-S, which timm lacks,
against a timm SwinTransformerV2 of the same width, depths, size and window: ratio of active multiply-accumulates per
second. timm takes part with and without its fused attention, and the faster of the two counts.

A training step is forward, cross entropy, backward and AdamW (fused) on the same batch; a ratio above 1 means that ours
is faster. Ratios are medians of per-round ratios, and one CPU thread is timed by its CPU time, so that a busy machine
disturbs both sides alike. "Of peak" is the achieved share of the fastest product that was measured (run/metrics.py):
two operations for each active multiply-accumulate of a forward, three times as many for a step. On a CUDA device a
round is ten steps between two events. --apart gives each side a process of its own (CPU), as a user runs it: ours keeps
freed memory, as its engine does (ops/host_memory.py), timm's has glibc as it is. --memory prints instead how far one
training step raises the peak memory of a process of its own above that of network, gradients and optimizer state (CPU).
"""

import argparse
import functools
import gc
import multiprocessing
import platform
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
import torch.nn.functional as F
from device_clock import seconds_per_call
from torch import nn

import swin_moe
from swin_moe.data.torchvision_compat import import_torchvision
from swin_moe.engine.precision import autocast
from swin_moe.ops.host_memory import keep_freed_memory
from swin_moe.run.metrics import peak_flops

MOE = "swin_moe_small_patch4_window12_192_8expert_32gpu_22k"
DENSE_TWIN = "swin_moe_small_patch4_window12_192_densebaseline_22k"


@dataclass(frozen=True)
class Pair:
    """Two networks to compare; macs are the active multiply-accumulates of one image of (ours, theirs)."""

    name: str
    size: int
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]  # with fused attention or without, as timm is set
    macs: Callable[[], tuple[float, float]] = lambda: (1.0, 1.0)


def timm_model(name: str) -> nn.Module:
    """Returns a timm network with random weights."""
    import_torchvision()
    import timm

    return timm.create_model(name, pretrained=False)


def timm_settings(pair: Pair) -> list[nn.Module]:
    """Returns timm's network without fused attention, and with it where it has one."""
    import_torchvision()
    from timm.layers import set_fused_attn

    models = []
    for fused in (False, True):
        set_fused_attn(fused, experimental=fused)
        model = pair.theirs()
        if not fused or any(getattr(module, "fused_attn", False) for module in model.modules()):
            models.append(model)
    return models


def timm_twin() -> nn.Module:
    """Returns timm's SwinV2 with Swin-MoE-S's dimensions."""
    import_torchvision()
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return SwinTransformerV2(
        img_size=192, window_size=12, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2
    )


PAIRS = (
    Pair(
        "swin_tiny",
        224,
        lambda: swin_moe.create_model("swin_tiny_patch4_window7_224"),
        lambda: timm_model("swin_tiny_patch4_window7_224"),
    ),
    Pair(
        "swinv2_tiny",
        256,
        lambda: swin_moe.create_model("swinv2_tiny_patch4_window8_256"),
        lambda: timm_model("swinv2_tiny_window8_256"),
    ),
    Pair(
        "swinv2_base_window16",
        256,
        lambda: swin_moe.create_model("swinv2_base_patch4_window16_256"),
        lambda: timm_model("swinv2_base_window16_256"),
    ),
    Pair(
        "swin_moe_small",
        192,
        lambda: swin_moe.create_model(MOE, num_classes=1000),
        timm_twin,
        lambda: (
            active_macs(lambda: swin_moe.create_model(MOE, num_classes=1000)),
            active_macs(lambda: swin_moe.create_model(DENSE_TWIN, num_classes=1000)),
        ),
    ),
)


def active_macs(make: Callable[[], nn.Module]) -> float:
    """Returns the multiply-accumulates that one image really costs a network of ours; counted on meta."""
    with torch.device("meta"):
        return cast(Any, make()).active_flops()


class Side:
    """One network with its optimizer and batch."""

    def __init__(self, model: nn.Module, images: torch.Tensor, precision: str):
        self.model, self.images, self.precision = model.to(images.device), images, precision
        self.target = torch.arange(len(images), device=images.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def train(self) -> None:
        """Takes one training step."""
        self.differentiate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def differentiate(self) -> torch.Tensor:
        """Returns the loss, having left gradients."""
        self.model.train()
        with autocast(self.precision, self.images.device):
            output = self.model(self.images)
        logits, aux = output if isinstance(output, tuple) else (output, 0.0)
        loss = F.cross_entropy(logits.float(), self.target) + aux
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def infer(self) -> None:
        """Takes one inference step."""
        self.model.eval()
        with autocast(self.precision, self.images.device):
            self.model(self.images)


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Returns the seconds of one call; on a device of one of ten, so that it never waits for the host after a step."""
    return seconds_per_call(call, device, 10 if device.type == "cuda" else 1)


def peak_of_step(number: int, which: int, options: argparse.Namespace) -> float:
    """Returns the MiB by which a training step of one side of a pair raises this process's peak memory."""
    torch.set_num_threads(options.threads)
    pair = PAIRS[number]
    model = pair.ours() if which == 0 else timm_settings(pair)[which - 1]
    side = Side(model, torch.randn(options.batch, 3, pair.size, pair.size), options.precision)
    for parameter in side.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    side.train()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def compare_memory(pair: Pair, options: argparse.Namespace) -> None:
    """Prints the peak memory of a training step of both sides, each in a fresh process."""
    peaks = []
    for which in range(1 + len(timm_settings(pair))):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(peak_of_step, (PAIRS.index(pair), which, options)))
    ours, theirs = peaks[0], min(peaks[1:])
    print(f"| {pair.name} | {options.precision} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.2f} |", flush=True)


def serve(connection: Connection, number: int, which: int, options: argparse.Namespace) -> None:
    """Takes the steps of one side that are asked for, "infer" or "train", and answers with seconds, until None."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pair = PAIRS[number]
    if which == 0:
        keep_freed_memory()
    model = pair.ours() if which == 0 else timm_settings(pair)[which - 1]
    side = Side(model, torch.randn(options.batch, 3, pair.size, pair.size), options.precision)
    while (mode := connection.recv()) is not None:
        connection.send(timed(getattr(side, mode), side.images.device))


def compare_apart(pair: Pair, options: argparse.Namespace) -> None:
    """Prints the table rows of one pair, whose sides are processes that take turns."""
    context, asked = multiprocessing.get_context("spawn"), []
    for which in range(1 + len(timm_settings(pair))):
        mine, its = context.Pipe()
        context.Process(target=serve, args=(its, PAIRS.index(pair), which, options), daemon=True).start()
        asked.append(mine)

    def seconds(connection: Connection, mode: str) -> float:
        connection.send(mode)
        return connection.recv()

    for mode in ("infer", "train"):
        rounds = range(-2, options.rounds)  # two to warm up
        taken = [[seconds(side, mode) for side in asked] for _ in rounds][2:]
        print_row(pair, mode, [list(times) for times in zip(*taken)], options, torch.device("cpu"))
    for side in asked:
        side.send(None)


peak_of = functools.cache(peak_flops)  # measured once, not for every row


def print_row(
    pair: Pair, mode: str, times: list[list[float]], options: argparse.Namespace, device: torch.device
) -> None:
    """Prints a table row of seconds by round, of our side and timm's."""
    ours, *theirs = [statistics.median(t) for t in times]
    fastest, scale = times[1 + theirs.index(min(theirs))], pair.macs()[0] / pair.macs()[1]
    ratio = statistics.median(scale * b / a for a, b in zip(times[0], fastest))
    unit = "" if scale == 1 else f" per active MAC (MACs x{scale:.3f})"
    operations = (3 if mode == "train" else 1) * 2 * options.batch * active_macs(pair.ours)
    share = operations / ours / peak_of(device, options.precision)
    print(
        f"| {pair.name} | {mode} | {options.precision} | {1e3 * ours:.1f} | {1e3 * min(theirs):.1f} "
        f"| {ratio:.3f}{unit} | {share:.0%} |",
        flush=True,
    )


def compare(pair: Pair, options: argparse.Namespace, device: torch.device) -> None:
    """Prints the table rows of one pair."""
    images = torch.randn(options.batch, 3, pair.size, pair.size, device=device)
    models = [pair.ours(), *timm_settings(pair)]
    for model, chosen in zip(models, [("both",)] + [("both", "timm")] * len(models)):
        if options.compile in chosen:
            model.compile()
    sides = [Side(model, images, options.precision) for model in models]
    for mode in ("infer", "train"):
        for side in sides:  # warm-up: allocator, caches, oneDNN primitives
            for _ in range(3 if device.type == "cuda" else 1):
                getattr(side, mode)()
        times: list[list[float]] = [[] for _ in sides]
        for round_index in range(options.rounds):
            order = range(len(sides)) if round_index % 2 else reversed(range(len(sides)))
            for which in order:
                times[which].append(timed(getattr(sides[which], mode), device))
        print_row(pair, mode, times, options, device)
    del sides
    gc.collect()


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--only", default="", help="names of pairs, comma-separated; all without")
    parser.add_argument("--compile", default="none", choices=["none", "timm", "both"], help="through torch.compile")
    parser.add_argument("--apart", action="store_true", help="each side in a process of its own, as users run them")
    parser.add_argument("--memory", action="store_true", help="peak memory of a training step instead of times")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cuda = torch.cuda.is_available() and options.device != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {options.threads} thread(s)"
    chosen = [pair for pair in PAIRS if not options.only or pair.name in options.only.split(",")]
    if options.memory:
        print(f"batch {options.batch}, {machine}, torch {torch.__version__}\n")
        print("| network | precision | ours MiB | timm MiB | timm / ours |\n|---|---|---|---|---|")
        for pair in chosen:
            compare_memory(pair, options)
        return
    print(f"batch {options.batch}, {options.rounds} interleaved rounds, {machine}, torch {torch.__version__}\n")
    print("| network | step | precision | ours ms | timm ms | ours / timm speed | of peak |")
    print("|---|---|---|---|---|---|---|")
    for pair in chosen:
        compare_apart(pair, options) if options.apart else compare(pair, options, device)


if __name__ == "__main__":
    main()
