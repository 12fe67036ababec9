"""What one operator asks of a machine, as numbers: bytes, multiply-accumulates and the shape of its product.

The same function looks at operators of a traced micro-step (trace.py) and of a real one (calibrate/timed.py), so what
was timed there is found again here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Columns of a row of work: bytes read and written, multiply-accumulates, and the product (rows x inner x columns).
BYTES, MACS, ROWS, INNER, COLUMNS = range(5)
PRECISION_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

# Operators that start nothing on a device: they allocate, or give another view or a size of what is there.
_NO_KERNEL = frozenset(
    "empty empty_like empty_like_reused new_empty empty_strided new_empty_strided empty_permuted detach alias "
    "_unsafe_view lift_fresh "
    "is_same_size _has_compatible_shallow_copy_type device".split()
)

_LAYER_ROWS = 11  # among what moe_layer keeps for its backward

Shape = tuple[float, float, float]
Product = tuple[Shape, float]  # and its multiply-accumulates
Arguments = Sequence[Any]


def _mm(args: Arguments, first: int = 0) -> Shape:
    a, b = args[first].shape, args[first + 1].shape
    return math.prod(a[:-1]), a[-1], b[-1]


def _linear(args: Arguments) -> Shape:
    x, weight = args[0].shape, args[1].shape
    return math.prod(x[:-1]), x[-1], weight[0]


def _weight_gradient(args: Arguments) -> Shape:
    grad, x = args[0].shape, args[1].shape
    return math.prod(x[:-1]), x[-1], grad[-1]


def _grouped(args: Arguments, x: int = 0) -> Shape:
    return args[x].shape[0], args[x + 1].shape[1], args[x + 1].shape[2]


def _linear_backward(args: Arguments) -> Product:
    """Returns that of the forward, as often as a product is asked for: gradients of x and of the weight."""
    grad, weight, needs = args[0].shape, args[2].shape, args[-1]
    rows = math.prod(grad[:-1])
    return (rows, weight[1], weight[0]), math.prod((rows, *weight)) * sum(needs[:2])


def _grouped_backward(args: Arguments) -> Shape:
    return _grouped(args, 1)


def _convolution(args: Arguments) -> Shape:
    x, weight, stride = args[0].shape, args[1].shape, args[3]
    positions = math.prod(size // step for size, step in zip(x[2:], stride))
    return x[0] * positions, math.prod(weight[1:]), weight[0]


def _convolution_backward(args: Arguments) -> Shape:
    grad, weight = args[0].shape, args[2].shape
    return grad.numel() / grad[1], math.prod(weight[1:]), weight[0]


def _window(args: Arguments, qkv: int = 0) -> Shape:
    """Returns (positions, positions of a window, channels of q and v)."""
    sizes = [value for value in args if isinstance(value, int) and not isinstance(value, bool)]
    height, width = sizes[1], sizes[2]  # after num_heads
    return math.prod(args[qkv].shape[:-1]), height * width, 2 * args[qkv].shape[-1] / 3


def _window_backward(args: Arguments) -> Shape:
    return _window(args, 1)


def _scaled_dot(args: Arguments, query: int = 0) -> Shape:
    q, k = args[query].shape, args[query + 1].shape
    return math.prod(q[:-1]), k[-2], 2 * q[-1]


def _experts(rows: int, fc1: torch.Size, passes: int) -> Product:
    """Returns that of both layers of experts, by the mean of their rows. fc1: (experts, hidden, width)."""
    experts, hidden, width = fc1
    return (rows / max(experts, 1), width, hidden), 2.0 * passes * rows * hidden * width


# Operators that multiply matrices -> the shape of their product, alone where its multiply-accumulates are rows x inner
# x columns. Some backwards of two factors count once: their rate knows.
PRODUCTS: dict[str, Callable[[Arguments], Shape | Product]] = {
    "mm": _mm,
    "bmm": _mm,
    "addmm": lambda args: _mm(args, 1),
    "baddbmm": lambda args: _mm(args, 1),
    "linear": _linear,
    "row_linear": _linear,
    "row_linear_backward": _linear_backward,
    "mixed_linear": _linear,
    "mixed_linear_backward": _linear_backward,
    "packed_product": _linear,
    "packed_weight_gradient": _weight_gradient,
    "grouped_linear": _grouped,
    "grouped_linear_backward": _grouped_backward,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "patch_projection_backward": _convolution_backward,
    "window_attention": _window,
    "window_attention_backward": _window_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _scaled_dot,
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda args: _scaled_dot(args, 1),
    "expert_rows": lambda args: _experts(args[0].shape[0], args[1].shape, 1),
    "expert_rows_backward": lambda args: _experts(args[1].shape[0], args[4].shape, 2),
    "expert_layer": lambda args: _experts(args[8].shape[0], args[2].shape, 1),
    "expert_layer_backward": lambda args: _experts(args[2].shape[0], args[6].shape, 2),
    "moe_layer": lambda args: _experts(args[0].shape[0] * args[9], args[3].shape, 1),
    "moe_layer_backward": lambda args: _experts(args[7][_LAYER_ROWS].shape[0], args[4].shape, 2),
}
# Products of many small matrices, whose rate is no plain product's.
ATTENTION = frozenset(name for name in PRODUCTS if "attention" in name)


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Yields tensors with a storage: not those that oneDNN packs for one product."""
    if isinstance(values, Tensor):
        if values.layout is torch.strided:
            yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_of(value)


def starts_kernel(function: Any, name: str) -> bool:
    """Returns whether an operator computes anything: no view, no allocation, no question about the machine."""
    schema = function._schema
    if name in _NO_KERNEL or not any("Tensor" in str(v.type) for v in (*schema.arguments, *schema.returns)):
        return False
    aliases = [r.alias_info for r in schema.returns]
    return not aliases or not all(a is not None and not a.is_write for a in aliases)


def work_of(name: str, args: Arguments, outputs: Sequence[Tensor]) -> tuple[str, list[float]]:
    """Returns (precision of what it reads, row of work) of an operator. outputs: Those with a storage."""
    inputs = list(tensors_of(args))
    moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
    precision = next((PRECISION_OF[t.dtype] for t in (*inputs, *outputs) if t.dtype in PRECISION_OF), "fp32")
    if name not in PRODUCTS:
        return precision, [float(moved), 0.0, 0.0, 0.0, 0.0]
    product: Any = PRODUCTS[name](args)
    shape, macs = product if len(product) == 2 else (product, math.prod(product))
    return precision, [float(moved), float(macs), *map(float, shape)]
