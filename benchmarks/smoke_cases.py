"""What gpu_smoke.py runs: one row per kernel, each with plain PyTorch operators that compute the same.

A new operator joins by one row of `cases`: a name and a function from (device, size) to a Problem.
Shape legend: B images, H x W tokens, C channels, T tokens, k choices per token, E experts, N rows for experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import smoke_detection
import smoke_experts
import torch
import torch.nn.functional as F
from smoke_problem import DTYPES, Case, Function, Problem, draw
from torch import Tensor

from swin_moe import create_model
from swin_moe.engine.graphs import GraphedForward, Recording, record_on_device
from swin_moe.ops.attention.fused import fused_window_attention
from swin_moe.ops.attention.geometry import MASKED, merge_windows, partition_windows
from swin_moe.ops.attention.reference import AttentionNumbers, attend_map
from swin_moe.ops.residual_norm import norm_residual, residual_norm
from swin_moe.ops.window_shift import window_merge, window_partition
from swin_moe.randomness import derive_key, keep_mask, normal, uniform


@dataclass(frozen=True)
class Window:
    """A shape that a kernel of window attention is for: windows of (height, width), channels a head."""

    name: str
    window: tuple[int, int]
    head_dim: int


WINDOWS = (
    *(Window(f"window {n}", (n, n), 32) for n in (7, 8, 12, 16, 24)),
    # Head dimensions are rounded up to 16, 32, 48 and 64; up to 64 tokens are one piece, more are several.
    Window("any, 16", (4, 3), 9),
    Window("any, 32", (5, 6), 24),
    Window("any, 48", (3, 20), 40),
    Window("any, 64", (8, 8), 64),
    Window("large, 16", (9, 10), 16),
    Window("large, 32", (12, 11), 20),
    Window("large, 48", (5, 40), 33),
    Window("large, 64", (10, 13), 50),
    Window("largest", (32, 32), 32),
)
SIZES = {  # name -> images, windows of a side at most, tokens of a side at most, heads
    "small": (1, 2, 1024, 2),
    "medium": (4, 4, 64, 4),
    "large": (16, 64, 64, 4),  # more blocks than a device holds at a time
}


def attention(
    shape: Window, dtype: torch.dtype, full: bool, device: torch.device, size: str, *, keep_sums: bool = True
) -> Problem:
    """Returns window attention: plain dot products; or, `full`, cosine scores, a shift and padding with values.

    keep_sums: As a run calls it; without, the operator alone, whose backward makes the row sums that it reads again.
    """
    images, side, most, heads = SIZES[size]
    counts = [max(1, min(side, most // n)) for n in shape.window]
    height, width = (n * count - (n // 3 if full else 0) for n, count in zip(shape.window, counts))
    shift = (shape.window[0] // 2, shape.window[1] // 2) if full else (0, 0)
    numbers = AttentionNumbers(heads, *shape.window, *shift, shape.head_dim**-0.5, MASKED)
    dim, positions = heads * shape.head_dim, (2 * shape.window[0] - 1) * (2 * shape.window[1] - 1)
    tensors = {
        "qkv": draw(device, dtype, images, height, width, 3 * dim),
        "bias": draw(device, torch.float32, positions, heads, seed=1),
        "factor": 3 + draw(device, torch.float32, heads, seed=2).abs() if full else None,
        "padding": draw(device, dtype, 3 * dim, seed=3) if full else None,
    }
    options = {"num_heads": heads, "window": shape.window, "shift": shift, "scale": shape.head_dim**-0.5}

    def ours(qkv: Tensor, bias: Tensor, factor: Tensor | None, padding: Tensor | None) -> Tensor:
        if not keep_sums:
            return torch.ops.swin_moe.window_attention(qkv, bias, factor, padding, *numbers)
        return fused_window_attention(qkv, bias, logit_scale=factor, pad_qkv=padding, **options)

    return Problem(tensors, ours, lambda *t: attend_map(*t, numbers=numbers))


def windows_of_a_map(dtype: torch.dtype, channels: int, device: torch.device, size: str) -> Problem:
    """Returns roll and partition, and merge and roll back: copies, so the same bits."""
    images, side, _, _ = SIZES[size]
    window, shift, rows = (4, 6), (1, 3), min(side, 8)
    height, width = rows * window[0], rows * window[1]

    def ours(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        merged = window_merge(y, batch=images, height=height, width=width, window=window, shift=shift)
        return window_partition(x, window=window, shift=shift), merged

    def plain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rolled = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        merged = merge_windows(y, window, images, height, width)
        return partition_windows(rolled, window), torch.roll(merged, shift, (1, 2))

    x = draw(device, dtype, images, height, width, channels)
    y = draw(device, dtype, images * rows * rows, window[0] * window[1], channels, seed=1)
    return Problem({"map": x, "windows": y}, ours, plain, tolerance=0.0)


def residual_and_norm(form: str, dtype: torch.dtype, channels: int, device: torch.device, size: str) -> Problem:
    """Returns a residual sum with drop path and the LayerNorm of the sum (residual_norm) or branch (norm_residual)."""
    images = {"small": 3, "medium": 16, "large": 128}[size]
    factor = torch.arange(images, device=device) % 3 * 0.75
    tensors = {
        "branch": draw(device, dtype, images, 49, channels, seed=1),
        "x": draw(device, torch.float32, images, 49, channels),
        "weight": draw(device, torch.float32, channels, seed=2),
        "bias": draw(device, torch.float32, channels, seed=3),
    }
    operators: dict[str, Function] = {"residual_norm": residual_norm, "norm_residual": norm_residual}
    operator = operators[form]

    def ours(branch: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, ...]:
        return operator(x, branch, factor.to(x.dtype), weight, bias, 1e-5)

    def plain(branch: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, ...]:
        of = factor[:, None, None]
        if form == "norm_residual":
            return x + of.to(x.dtype) * F.layer_norm(branch.to(x.dtype), (channels,), weight, bias)
        total = x + branch * of.to(branch.dtype)
        return total, F.layer_norm(total, (channels,), weight, bias)

    return Problem(tensors, ours, plain)


def random_draws(device: torch.device, size: str) -> Problem:
    """Returns draws on the device and on the CPU: the same bits but for the logarithm and cosine of normal ones."""
    rows = torch.arange({"small": 100, "medium": 5000, "large": 100_000}[size]) + (1 << 33)
    key = derive_key(1, 2, 3)

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        drawn = uniform(key, rows, 16), keep_mask(key, rows, 16, drop=0.3), normal(key, rows, 16)
        return tuple(t.to(device).float() for t in drawn)

    return Problem({"rows": rows.to(device)}, run, lambda given: run(given.cpu()), gradients=False, tolerance=1e-6)


def run_again(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> Recording:
    """Returns the recording of a call where there is no device to record: it is called again."""
    output = call()
    assert isinstance(output, Tensor), "of a network without experts"

    def replay() -> None:
        again = call()
        assert isinstance(again, Tensor)
        output.copy_(again)

    return Recording(replay, output)


def graph_of_a_network(device: torch.device, size: str) -> Problem:
    """Returns a network whose forward is recorded with other images and replayed, and its forward as always."""
    images = {"small": 1, "medium": 4, "large": 32}[size]
    shape = dict(img_size=64, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[1, 2], window_size=8)
    network = create_model("swinv2", num_classes=11, **shape).to(device).eval()
    graphed = GraphedForward(network, record_on_device if device.type == "cuda" else run_again)

    def ours(x: Tensor) -> Tensor:
        with torch.no_grad():
            return [graphed(other) for other in (x + 1, x - 1, x)][-1]

    def plain(x: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x)

    return Problem({"x": draw(device, torch.float32, images, 3, 64, 64)}, ours, plain, gradients=False, tolerance=1e-3)


def cases() -> list[Case]:
    """Returns every row, in the order in which they run."""
    rows = [
        Case(
            f"{shape.name}, {name}, {'cosine shifted padded' if full else 'dot'}",
            partial(attention, shape, dtype, full),
        )
        for shape in WINDOWS
        for name, dtype in DTYPES.items()
        for full, what in ((False, "dot"), (True, "cosine shifted padded"))
    ]
    for name, dtype in DTYPES.items():
        if dtype != torch.float32:  # whose backward reads none
            rows += [
                Case(f"{s.name}, {name}, without row sums", partial(attention, s, dtype, True, keep_sums=False))
                for s in WINDOWS
                if s.window in ((12, 12), (16, 16))
            ]
        rows += [Case(f"window_shift, {name}, {c} channels", partial(windows_of_a_map, dtype, c)) for c in (96, 33)]
        rows += smoke_experts.cases(name, dtype)
        rows += [
            Case(f"{form}, {name}, {c} channels", partial(residual_and_norm, form, dtype, c))
            for form in ("residual_norm", "norm_residual")
            for c in (96, 33)
        ]
    rows += smoke_experts.float_cases()
    rows += smoke_detection.cases()
    rows.append(Case("random draws", random_draws))
    rows.append(Case("cuda graph of a network", graph_of_a_network))
    return rows
