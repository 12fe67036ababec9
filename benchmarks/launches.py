"""Kernels that one training step and one inference step start, counted without a GPU.

    python benchmarks/launches.py [--batch 2] [--precision bf16] [--only swin_tiny] [--no-timm] [--top 12]
    python benchmarks/launches.py --accumulate 4 [--copies own|linked|none] [...]
    python benchmarks/launches.py --compile block|model [...]
    python benchmarks/launches.py --kernels cuda [...]

A dispatch mode sees every operator that reaches a device. What only makes a view, allocates or asks for a size starts
no kernel; every other operator starts at least one, which is what is counted. So the figures are lower bounds for an
operator of several kernels (a sort, a matrix product cut in parts) and for one written in Python, whose inside is not
seen; one kernel of csrc/ counts once. Counted on the CPU, whose operators are those of a device but for the products of
experts (swin_moe::grouped_linear counts once on both) and those of swin_moe/ops/mixed. --kernels cuda takes the
operators that CUDA has and the CPU has not (residual and norm, bias and GELU and dropout, rows of experts, grouped
products); they run in their Python form.

Our networks hold copies of weights in bfloat16, as the trainer has them on one rank (engine/weight_copies.py); to make
them anew, once per step, counts with the forward, and to bring gradients to the masters with the backward. Operators on
a list of tensors count once; CUDA starts one kernel per 64 tensors or so. With --copies linked they are as on several
ranks, with none autocast casts. A step of several micro-batches (--accumulate) is counted whole.

timm's networks run with and without its fused attention; the smaller count is printed.

With --compile a step is compiled as parallel.compile does, and counts are what stays outside of graphs, as above, and
every call of the programs that inductor writes for a CUDA device (generated_kernels.py), in every run of a graph.
Graphs are traced on the CPU, so they hold the operators that the CPU takes. Inference is not compiled.
"""

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import PAIRS, Pair, timm_settings

from swin_moe.engine.precision import autocast
from swin_moe.engine.weight_copies import Copies, LinkedCopies, WeightCopies
from swin_moe.moe import experts
from swin_moe.ops import extension, grouped_linear
from swin_moe.ops import layer_norm as layer_norms
from swin_moe.ops.attention.choice import Measuring
from swin_moe.ops.mixed import linear as mixed_linear
from swin_moe.ops.mixed import residual as mixed_residual
from swin_moe.parallel.compile import compile_network
from swin_moe.randomness import RandomContext

if TYPE_CHECKING:
    from generated_kernels import CompiledCounter

_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
_NO_KERNEL = ("detach", "alias", "_unsafe_view", "lift_fresh", "_has_compatible_shallow_copy_type", "is_same_size")


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Networks on the CPU take every operator that they take on a CUDA device with the compiled library."""

    def use_grouped(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
        return dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)

    narrow = F.layer_norm

    def layer_norm(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return narrow(x.float(), *arguments)  # as autocast does on CUDA alone

    with (
        mock.patch.object(F, "layer_norm", layer_norm),
        mock.patch.object(layer_norms, "serves", lambda *tensors: False),
        mock.patch.object(mixed_linear, "serves", lambda *tensors: False),
        mock.patch.object(mixed_residual, "serves", lambda *tensors: False),
        mock.patch.object(extension, "kernels_take", lambda x, compiled: True),
        mock.patch.object(experts, "use_grouped", use_grouped),
        mock.patch.object(grouped_linear, "use_grouped", use_grouped),
    ):
        yield


class LaunchCounter(TorchDispatchMode):
    """Counts operators that start a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Returns True: compiled graphs run as without the mode, which sees what is outside of them."""
        return True

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


def count_steps(
    model: nn.Module,
    size: int,
    *,
    batch: int,
    precision: str,
    ours: bool = True,
    compiled: str = "none",
    micro_batches: int = 1,
    copies: str = "own",
) -> dict[str, Counter[str]]:
    """Returns the launches of forward and backward of a training step and of an inference, by operator.

    Args:
        ours: The model takes what it draws from, as the trainer gives it.
        compiled: "block" or "model", as parallel.compile; the model is changed.
        micro_batches: Of `batch` images each.
        copies: Of weights, where the trainer makes some: "own" as on one rank (the model is changed), "linked" as on
            several, or "none".
    """
    from generated_kernels import CompiledCounter  # loads inductor, for seconds

    device, graphs = torch.device("cpu"), CompiledCounter(starts_kernel)
    images, target = torch.randn(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64)
    inputs = (images, RandomContext(0, 1, torch.arange(batch))) if ours else (images,)
    model.train()
    kind = copies if ours and compiled == "none" and precision == "bf16" else "none"
    held = {"own": WeightCopies, "linked": LinkedCopies}[kind](model, torch.bfloat16) if kind != "none" else Copies()
    if compiled != "none":
        with mock.patch("torch.compile", functools.partial(torch.compile, backend=graphs)):
            compile_network(model, compiled)
    # Before: choices are measured, tables are cached and graphs are made in the first steps.
    for _ in range(1 if compiled == "none" else 2):
        with held.used():
            _forward(model, inputs, target, precision, device)()
    counts: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
    model.zero_grad(set_to_none=True)
    for _ in range(micro_batches):
        with held.used():
            found, backward = _counted(graphs, lambda: _forward(model, inputs, target, precision, device))
            counts["forward"] += found
            counts["backward"] += _counted(graphs, backward)[0]
        counts["backward"] += _counted(graphs, held.collect)[0]
    counts["forward"] += _counted(graphs, held.refresh)[0]
    model.eval()
    with torch.no_grad(), autocast(precision, device), held.used():
        model(images)
        counts["inference"], _ = _counted(graphs, lambda: model(images))
    return counts


def _counted(graphs: "CompiledCounter", run: Callable[[], Any]) -> tuple[Counter[str], Any]:
    """Returns (launches of what `run` does, its result)."""
    graphs.counts.clear()
    with LaunchCounter() as eager:
        result = run()
    return eager.counts + graphs.counts, result


def _forward(
    model: nn.Module, inputs: tuple[Any, ...], target: torch.Tensor, precision: str, device: torch.device
) -> Callable[[], None]:
    """Runs a forward and returns its backward."""
    with autocast(precision, device):
        output = model(*inputs)
        logits, aux = output if isinstance(output, tuple) else (output, 0.0)
        loss = F.cross_entropy(logits.float(), target) + aux
    return loss.backward


def of_timm(pair: Pair, options: argparse.Namespace) -> dict[str, Counter[str]]:
    """Returns the launches of timm's network, by the setting that starts fewer in training."""
    settings = {"batch": options.batch, "precision": options.precision, "micro_batches": options.accumulate}
    settings["ours"] = False
    counts = [count_steps(model, pair.size, **settings) for model in timm_settings(pair)]
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
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--copies", default="own", choices=["own", "linked", "none"], help="of weights, see above")
    parser.add_argument("--compile", default="none", choices=["none", "block", "model"], help="as parallel.compile")
    parser.add_argument("--kernels", default="cpu", choices=["cpu", "cuda"], help="the operators of which device")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Measuring.enabled = False  # what is faster on a busy machine is not what is counted
    chosen: list[Pair] = [p for p in PAIRS if not options.only or p.name in options.only.split(",")]
    how = f"operators of {options.kernels}, compile={options.compile}, torch {torch.__version__}"
    print(f"launches, batch {options.batch}, {options.precision}, {how}\n")
    print("| network | forward | backward | training step | inference |\n|---|---|---|---|---|")
    for pair in chosen:
        settings = {"batch": options.batch, "precision": options.precision, "micro_batches": options.accumulate}
        with as_on_cuda() if options.kernels == "cuda" else nullcontext():
            ours = count_steps(pair.ours(), pair.size, **settings, compiled=options.compile, copies=options.copies)
        show(pair.name, ours, options.top)
        if not options.no_timm and options.compile == "none":
            show(f"timm's for {pair.name}", of_timm(pair, options), options.top)


if __name__ == "__main__":
    main()
