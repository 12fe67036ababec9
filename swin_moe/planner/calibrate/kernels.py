"""Products by kernels of our own and of oneDNN that a CPU's step runs: each by itself, forward and backward, by shape.

Their rates depend on sizes in other ways than those of PyTorch's product, which machine.py measures: small factors are
packed where they lie, the weights of all experts come in one call, gradients are written to memory of their own. As in
a step, what they read is in no cache; how much of it a step finds there is found from steps (networks.py).
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from swin_moe.ops.linear import linear
from swin_moe.ops.moe import moe_layer
from swin_moe.ops.row_products import is_few, takes
from swin_moe.planner.calibrate.machine import clock
from swin_moe.planner.calibrate.timed import Timed
from swin_moe.planner.operators import COLUMNS, INNER, MACS, ROWS
from swin_moe.planner.rates import Point

# Rows x inner x columns of a linear layer; tokens of an expert x width of a layer of experts.
_ROWS, _WIDTHS = (2, 8, 32, 128, 512, 1024, 2048, 8192, 32768), (48, 192, 768, 3072)
LINEAR = tuple((rows, inner, columns) for inner in _WIDTHS for columns in _WIDTHS for rows in _ROWS)
LAYERS = tuple((rows, width) for width in (48, 96, 192, 384, 768) for rows in (1, 4, 16, 64, 256))
_EXPERTS, _HIDDEN = 4, 4  # experts of a layer; hidden channels over its width
_MOST_FLOPS, _MOST_ELEMENTS = 1.3e9, 2**24  # of one forward; of its input or output
_REPEATS = 3
_CACHED = 48 * 2**20  # bytes that are read between, more than caches hold of a core
_KERNELS = ("row_linear", "packed_product", "packed_weight_gradient", "moe_layer")
Step = Callable[[Callable[[], object]], None]  # of forward and backward, and what to do between them
MEASURED = frozenset((*_KERNELS, "row_linear_backward", "moe_layer_backward"))


def measure_kernels(dtype: torch.dtype) -> dict[str, list[Point]]:
    """Returns operator -> (rows, inner, columns, FLOP/s) of those that this processor chooses in this precision."""
    found: dict[str, list[Point]] = {}
    other = torch.ones(_CACHED // 4)
    steps = [*(_linear_steps() if dtype == torch.float32 else ()), *_layer_steps(dtype)]
    for step in steps:
        for name, point in _points(step, other):
            found.setdefault(name, []).append(point)
    return found


def _points(make: Callable[[], Step], other: torch.Tensor) -> Iterator[tuple[str, Point]]:
    """Yields the points of a step, the median of a few. other: What fills the caches before each product."""
    step, rounds = make(), []
    for turn in range(_REPEATS + 1):  # the first makes what is made once
        with Timed(clock(torch.device("cpu"))) as seen:
            other.sum()
            step(other.sum)
        rounds += [seen.seconds] if turn else []
    for (name, _), work, taken in zip(seen.operators, seen.work, np.median(rounds, axis=0)):
        if name in MEASURED:
            yield name, (work[ROWS], work[INNER], work[COLUMNS], 2 * work[MACS] / max(float(taken), 1e-9))


def _linear_steps() -> Iterator[Callable[[], Step]]:
    """Yields what makes a forward and backward of a linear layer. Under autocast PyTorch's product runs."""
    for rows, inner, columns in LINEAR:
        if 2.0 * rows * inner * columns > _MOST_FLOPS or rows * max(inner, columns) > _MOST_ELEMENTS:
            continue

        def make(rows: int = rows, inner: int = inner, columns: int = columns) -> Step:
            x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
            bias, grad = torch.zeros(columns, requires_grad=True), torch.randn(rows, columns)
            leaves = x.requires_grad_(), weight.requires_grad_(), bias

            def step(between: Callable[[], object]) -> None:
                y = linear(x, weight, bias)
                between()
                torch.autograd.grad(y, leaves, grad)

            return step

        yield make


def _layer_steps(dtype: torch.dtype) -> Iterator[Callable[[], Step]]:
    """Yields what makes a forward and backward of a layer of experts with even loads."""
    for rows, width in LAYERS:
        tokens, hidden = rows * _EXPERTS, _HIDDEN * width
        few = is_few(tokens, dtype, _EXPERTS) and takes(torch.empty(1), torch.empty(1), dtype)
        if "cpu" not in moe_layer.COMPILED or not few or 4.0 * tokens * width * hidden > _MOST_FLOPS:
            continue

        def make(tokens: int = tokens, width: int = width, hidden: int = hidden) -> Step:
            x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
            router = torch.randn(_EXPERTS, width, requires_grad=True)
            sizes = (_EXPERTS, hidden, width), (_EXPERTS, hidden), (_EXPERTS, hidden, width), (_EXPERTS, width)
            weights = [torch.randn(size).mul_(0.02).requires_grad_() for size in sizes]
            slots = moe_layer.Slots(1, tokens, None, None, False)
            options = moe_layer.Options(0, 0.0, 0.0, False, False, "gshard", 0.0, tokens, 0.01, 0.0)
            grad = torch.randn(tokens, width, dtype=dtype)

            def step(between: Callable[[], object]) -> None:
                found = moe_layer.moe_layer(
                    x, router, weights, slots, options, bias=None, words=None, token=None, dtype=dtype
                )
                between()
                torch.autograd.grad((found.y, found.aux), (x, router, *weights), (grad, torch.ones(())))

            return step

        yield make
