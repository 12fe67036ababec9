"""Kernels that one training step and one inference step start, counted without a GPU.

    python benchmarks/launches.py [--batch 2] [--precision bf16] [--only swin_tiny] [--no-timm] [--top 12]

A dispatch mode sees every operator that reaches a device. What only makes a view, allocates or asks for a size starts
no kernel; every other operator starts at least one, which is what is counted. So the figures are lower bounds for an
operator of several kernels (a sort, a matrix product cut in parts) and for one written in Python, whose inside is not
seen; one kernel of csrc/ counts once. Counted on the CPU, whose operators are those of a device but for the products of
experts (swin_moe::grouped_linear counts once on both).

timm's networks run with and without its fused attention; the smaller count is printed.
"""

import argparse
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import PAIRS, Pair, timm_settings

from swin_moe.engine.precision import autocast

_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
_NO_KERNEL = ("detach", "alias", "_unsafe_view", "lift_fresh", "_has_compatible_shallow_copy_type", "is_same_size")


class LaunchCounter(TorchDispatchMode):
    """Counts operators that start a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operator and counts it."""
        if starts_kernel(func):
            self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Operators counted."""
        return sum(self.counts.values())


def starts_kernel(func: torch._ops.OpOverload) -> bool:
    """Returns whether an operator computes anything: no view, no allocation."""
    name = func.overloadpacket.__name__
    if name in _ALLOCATIONS or name in _NO_KERNEL:
        return False
    aliases = [r.alias_info for r in func._schema.returns]
    is_view = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
    return not is_view


def count_steps(model: nn.Module, size: int, *, batch: int, precision: str) -> dict[str, Counter[str]]:
    """Returns the launches of forward and backward of a training step and of an inference, by operator."""
    device = torch.device("cpu")
    images, target = torch.randn(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64)
    model.train()
    # Once before: choices are measured and tables are cached in the first step.
    _train(model, images, target, precision, device, LaunchCounter(), LaunchCounter())
    forward, backward, inference = LaunchCounter(), LaunchCounter(), LaunchCounter()
    _train(model, images, target, precision, device, forward, backward)
    model.eval()
    with torch.no_grad(), autocast(precision, device):
        model(images)
        with inference:
            model(images)
    return {"forward": forward.counts, "backward": backward.counts, "inference": inference.counts}


def _train(
    model: nn.Module,
    images: torch.Tensor,
    target: torch.Tensor,
    precision: str,
    device: torch.device,
    forward: LaunchCounter,
    backward: LaunchCounter,
) -> None:
    model.zero_grad(set_to_none=True)
    with autocast(precision, device), forward:
        output = model(images)
        logits, aux = output if isinstance(output, tuple) else (output, 0.0)
        loss = F.cross_entropy(logits.float(), target) + aux
    with backward:
        loss.backward()


def of_timm(pair: Pair, options: argparse.Namespace) -> dict[str, Counter[str]]:
    """Returns the launches of timm's network, by the setting that starts fewer in training."""
    counts = [count_steps(m, pair.size, batch=options.batch, precision=options.precision) for m in timm_settings(pair)]
    return min(counts, key=lambda c: sum(c["forward"].values()) + sum(c["backward"].values()))


def show(name: str, counts: dict[str, Counter[str]], top: int) -> None:
    """Prints one row, and the most frequent operators of a training step."""
    forward, backward, inference = (sum(counts[k].values()) for k in ("forward", "backward", "inference"))
    print(f"| {name} | {forward} | {backward} | {forward + backward} | {inference} |", flush=True)
    for operator, count in (counts["forward"] + counts["backward"]).most_common(top):
        print(f"    {count:6d} {operator}")


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--only", default="", help="names of networks, comma-separated; all without")
    parser.add_argument("--no-timm", action="store_true", help="without timm's networks")
    parser.add_argument("--top", type=int, default=0, help="also print the most frequent operators")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen: list[Pair] = [p for p in PAIRS if not options.only or p.name in options.only.split(",")]
    print(f"launches, batch {options.batch}, {options.precision}, torch {torch.__version__}\n")
    print("| network | forward | backward | training step | inference |\n|---|---|---|---|---|")
    for pair in chosen:
        ours = count_steps(pair.ours(), pair.size, batch=options.batch, precision=options.precision)
        show(pair.name, ours, options.top)
        if not options.no_timm:
            show(f"timm's for {pair.name}", of_timm(pair, options), options.top)


if __name__ == "__main__":
    main()
