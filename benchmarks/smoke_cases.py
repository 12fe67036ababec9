"""What gpu_smoke.py runs: one row per kernel, each with plain PyTorch operators that compute the same.

A new operator joins by one row of `cases`: a name and a function from (device, size) to a Problem.
Shape legend: B images, H x W tokens, C channels, T tokens, k choices per token, E experts, N rows for experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe import create_model
from swin_moe.config import MoEConfig
from swin_moe.engine.graphs import GraphedForward, Recording, record_on_device
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import Routing, route
from swin_moe.ops.attention.fused import fused_window_attention
from swin_moe.ops.attention.geometry import MASKED, merge_windows, partition_windows
from swin_moe.ops.attention.reference import attend_map
from swin_moe.ops.bias_gelu import add_expert_bias_, bias_gelu, expert_bias_gradient
from swin_moe.ops.grouped_linear import grouped_linear
from swin_moe.ops.moe_permute import gate_gradient, permute, unpermute
from swin_moe.ops.moe_route import Routed, route_tokens
from swin_moe.ops.random_draws import UnitDraw
from swin_moe.ops.residual_norm import norm_residual, residual_norm
from swin_moe.ops.window_shift import window_merge, window_partition
from swin_moe.randomness import RandomContext, derive_key, keep_mask, normal, uniform

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """Tensors, the kernel, and what it is compared with."""

    tensors: Mapping[str, Tensor | None]
    ours: Function
    plain: Function  # PyTorch's operators; in float64 they are the truth, in the tensors' dtype the error allowed
    gradients: bool = True  # also of every floating-point tensor
    tolerance: float | None = None  # set: ours and plain differ relatively by no more, and nothing is run in float64
    fill: bool = False  # memory is full of nan before ours runs and of zeros before plain


@dataclass(frozen=True)
class Case:
    """One line of the report."""

    name: str
    make: Callable[[torch.device, str], Problem]


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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {  # name -> images, windows of a side at most, tokens of a side at most, heads
    "small": (1, 2, 1024, 2),
    "medium": (4, 4, 64, 4),
    "large": (16, 64, 64, 4),  # more blocks than a device holds at a time
}


def draw(device: torch.device, dtype: torch.dtype, *size: int, seed: int = 0) -> Tensor:
    """Returns normal numbers, the same on every device."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def attention(shape: Window, dtype: torch.dtype, full: bool, device: torch.device, size: str) -> Problem:
    """Returns window attention: plain dot products; or, `full`, cosine scores, a shift and padding with values."""
    images, side, most, heads = SIZES[size]
    counts = [max(1, min(side, most // n)) for n in shape.window]
    height, width = (n * count - (n // 3 if full else 0) for n, count in zip(shape.window, counts))
    shift = tuple(n // 2 for n in shape.window) if full else (0, 0)
    numbers = (heads, *shape.window, *shift, shape.head_dim**-0.5, MASKED)
    dim, positions = heads * shape.head_dim, (2 * shape.window[0] - 1) * (2 * shape.window[1] - 1)
    tensors = {
        "qkv": draw(device, dtype, images, height, width, 3 * dim),
        "bias": draw(device, torch.float32, positions, heads, seed=1),
        "factor": 3 + draw(device, torch.float32, heads, seed=2).abs() if full else None,
        "padding": draw(device, dtype, 3 * dim, seed=3) if full else None,
    }
    options = {"num_heads": heads, "window": shape.window, "shift": shift, "scale": shape.head_dim**-0.5}

    def ours(qkv: Tensor, bias: Tensor, factor: Tensor | None, padding: Tensor | None) -> Tensor:
        return fused_window_attention(qkv, bias, logit_scale=factor, pad_qkv=padding, **options)

    return Problem(tensors, ours, lambda *t: attend_map(*t, *numbers))


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


@dataclass(frozen=True)
class Rows:
    """Where tokens go: E experts of `capacity` rows each, some rows vacant, some pairs dropped."""

    position: Tensor  # (T, k), row of each pair; 0 where dropped
    keep: Tensor  # (T, k)
    pair: Tensor  # (N,), token * k + choice; 0 where vacant
    vacant: Tensor  # (N,)


def rows_for_experts(tokens: int, top_k: int, device: torch.device, experts: int = 8) -> Rows:
    """Returns random choices; experts are unequally popular, so that rows are vacant and pairs dropped."""
    generator = torch.Generator().manual_seed(5)
    popular = torch.linspace(1, 3, experts).expand(tokens, experts)
    expert = torch.multinomial(popular, top_k, generator=generator).flatten()
    order = expert.argsort(stable=True)
    first = torch.bincount(expert, minlength=experts).cumsum(0) - torch.bincount(expert, minlength=experts)
    slot = torch.empty_like(expert)
    slot[order] = torch.arange(len(expert)) - first[expert[order]]
    capacity = -(-5 * tokens * top_k // (4 * experts))
    keep = slot < capacity
    position = torch.where(keep, expert * capacity + slot, 0)
    pair, vacant = torch.zeros(experts * capacity, dtype=torch.int64), torch.ones(experts * capacity, dtype=torch.bool)
    pair[position[keep]], vacant[position[keep]] = torch.arange(len(expert))[keep], False
    tensors = position.view(tokens, top_k), keep.view(tokens, top_k), pair, vacant
    return Rows(*(t.to(device) for t in tensors))


def row_movement(verb: str, dtype: torch.dtype, top_k: int, channels: int, device: torch.device, size: str) -> Problem:
    """Returns one of moe_permute, moe_unpermute, moe_gate_gradient, which have no gradients of their own."""
    tokens = {"small": 100, "medium": 2000, "large": 18432}[size]
    rows = rows_for_experts(tokens, top_k, device)
    taken = draw(device, dtype, len(rows.pair), channels, seed=1)
    gate = draw(device, torch.float32, tokens, top_k, seed=2)
    x = draw(device, dtype, tokens, channels, seed=3)

    def permute_plainly(x: Tensor, gate: Tensor) -> Tensor:
        gated = x[rows.pair // top_k] * gate.flatten()[rows.pair][:, None]
        return gated.masked_fill(rows.vacant[:, None], 0).to(x.dtype)

    def unpermute_plainly(taken: Tensor, gate: Tensor) -> Tensor:
        return (taken[rows.position] * (gate * rows.keep)[..., None]).sum(1)

    def gate_gradient_plainly(taken: Tensor, x: Tensor) -> Tensor:
        return (taken[rows.position] * x[:, None]).sum(2) * rows.keep

    ours: Function
    if verb == "moe_permute":
        ours = lambda x, gate: permute(x, rows.pair, top_k, gate=gate, vacant=rows.vacant)  # noqa: E731
        return Problem({"x": x, "gate": gate}, ours, permute_plainly, gradients=False)
    if verb == "moe_unpermute":
        ours = lambda taken, gate: unpermute(taken, rows.position, keep=rows.keep, gate=gate)  # noqa: E731
        return Problem({"rows": taken, "gate": gate}, ours, unpermute_plainly, gradients=False)
    ours = lambda taken, x: gate_gradient(taken, x, rows.position, keep=rows.keep)  # noqa: E731
    return Problem({"rows": taken, "x": x}, ours, gate_gradient_plainly, gradients=False)


def one_layer_per_expert(dtype: torch.dtype, device: torch.device, size: str) -> Problem:
    """Returns grouped_linear with an expert without rows, and rows that belong to none."""
    counts = [n * {"small": 1, "medium": 16, "large": 256}[size] for n in (8, 0, 24, 3)]
    owned = sum(counts)
    x, weight, bias = (
        draw(device, dtype, *shape, seed=seed) for seed, shape in enumerate(((owned, 64), (4, 128, 64), (4, 128)))
    )
    number = torch.tensor(counts, device=device)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = torch.cat([x, x.new_zeros(owned // 4 + 1, x.shape[1])])
        return grouped_linear(padded, weight.transpose(1, 2), bias, number)[:owned]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([part @ w.t() + b for part, w, b in zip(x.split(counts), weight, bias)])

    return Problem({"x": x, "weight": weight, "bias": bias}, ours, plain, fill=True)


def bias_and_gelu(dtype: torch.dtype, channels: int, drops: bool, device: torch.device, size: str) -> Problem:
    """Returns bias_gelu with an expert without rows and rows that belong to none; with `drops` some units are."""
    counts = [n * {"small": 1, "medium": 32, "large": 512}[size] for n in (8, 0, 24, 3)]
    owned, ends = sum(counts), torch.tensor(counts, device=device).cumsum(0).int()
    numbers = torch.arange(owned + 5, device=device) * 3 + (1 << 33)
    random = RandomContext(7, 3, numbers)
    dropped = UnitDraw(random, numbers, "expert_dropout", layer=5, drop=0.5, scale=2.0) if drops else None
    keep = keep_mask(random.key("expert_dropout", 5), numbers[:owned].cpu(), channels, drop=0.5).to(device)

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(torch.cat([x, x[:5]]), bias.float(), ends=ends, draw=dropped)

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        of_rows = bias.repeat_interleave(torch.tensor(counts, device=device), dim=0)
        hidden = F.gelu(x + of_rows) * (keep * 2 if drops else 1)
        return torch.cat([hidden, hidden.new_zeros(5, channels)])

    tensors = {"x": draw(device, dtype, owned, channels), "bias": draw(device, dtype, 4, channels, seed=1)}
    return Problem(tensors, ours, plain, fill=True)


def bias_alone(dtype: torch.dtype, channels: int, device: torch.device, size: str) -> Problem:
    """Returns add_expert_bias_ and expert_bias_gradient, which are parts of a grouped product's kernels on CUDA."""
    counts = [n * {"small": 1, "medium": 32, "large": 512}[size] for n in (8, 0, 24, 3)]
    owned, ends = sum(counts), torch.tensor(counts, device=device).cumsum(0).int()
    expert = torch.arange(4, device=device).repeat_interleave(torch.tensor(counts, device=device))

    def ours(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cat([x, x[:5]])
        add_expert_bias_(y, bias, ends)
        return y[:owned], expert_bias_gradient(x, ends)

    def plain(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return x + bias[expert], torch.stack([x[expert == e].sum(0) for e in range(4)])

    tensors = {"x": draw(device, dtype, owned, channels), "bias": draw(device, dtype, 4, channels, seed=1)}
    return Problem(tensors, ours, plain, gradients=False)


def layer_that_drops(device: torch.device, size: str) -> Problem:
    """Returns a whole MoE layer at capacity 1.25, and itself in other memory: rows that nobody owns must not show."""
    images, dim = {"small": 2, "medium": 16, "large": 128}[size], 64
    config = MoEConfig(num_experts=8, capacity_factor=1.25, dropout=0.1)
    layer = MoELayer(dim, 4 * dim, config, fc2_bias=True, layer=0, init_std=0.5)
    layer.init_weights(0, "layer")
    layer.to(device).train()
    names = [name for name, _ in layer.named_parameters()]
    random = RandomContext(3, 5, torch.arange(images, device=device))

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y, aux = torch.func.functional_call(layer, dict(zip(names, parameters)), (x, random))
        return y.float(), aux.float()

    tensors = {"x": draw(device, torch.float32, images, 144, dim)}
    tensors |= {name: parameter.detach() for name, parameter in layer.named_parameters()}
    return Problem(tensors, run, run, tolerance=1e-3, fill=True)


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


def routing_of_tokens(sigmoid: bool, device: torch.device, size: str) -> Problem:
    """Returns moe_route with groups and a capacity, and the reference: every token's gates times slots, by expert."""
    group = {"small": 20, "medium": 1000, "large": 30_000}[size]
    capacity = group // 4

    def by_expert(routing: Routed | Routing, logits: Tensor) -> Tensor:
        weights = routing.gate * torch.where(routing.keep, routing.slot + 1, 0)
        return torch.zeros_like(logits).scatter(1, routing.expert, weights)

    def ours(logits: Tensor) -> Tensor:
        routed = route_tokens(
            logits,
            None,
            bias=None,
            top_k=2,
            group_size=group,
            capacity=capacity,
            last_capacity=capacity,
            sigmoid=sigmoid,
            normalize=True,
            prioritized=False,
            probabilities=False,
        )
        return by_expert(routed, logits)

    def plain(logits: Tensor) -> Tensor:
        scores = torch.sigmoid(logits) if sigmoid else None
        routing = route(logits, top_k=2, group_size=group, capacity=capacity, normalize_gate=True, scores=scores)
        return by_expert(routing, logits)

    return Problem({"logits": draw(device, torch.float32, 3 * group, 8)}, ours, plain, tolerance=1e-5)


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
        rows += [Case(f"window_shift, {name}, {c} channels", partial(windows_of_a_map, dtype, c)) for c in (96, 33)]
        rows += [
            Case(f"{verb}, {name}, top-{top_k}, {c} channels", partial(row_movement, verb, dtype, top_k, c))
            for verb in ("moe_permute", "moe_unpermute", "moe_gate_gradient")
            for top_k, c in ((1, 96), (2, 33))
        ]
        rows.append(Case(f"grouped_linear, {name}, nan around", partial(one_layer_per_expert, dtype)))
        rows += [
            Case(
                f"bias_gelu{', dropout' if drops else ''}, {name}, {c} channels",
                partial(bias_and_gelu, dtype, c, drops),
            )
            for c in (96, 33)
            for drops in (False, True)
        ]
        rows += [Case(f"expert bias, {name}, {c} channels", partial(bias_alone, dtype, c)) for c in (96, 33)]
        rows += [
            Case(f"{form}, {name}, {c} channels", partial(residual_and_norm, form, dtype, c))
            for form in ("residual_norm", "norm_residual")
            for c in (96, 33)
        ]
    rows += [Case(f"moe_route, {n}", partial(routing_of_tokens, n == "sigmoid")) for n in ("softmax", "sigmoid")]
    rows.append(Case("moe layer, bf16, capacity 1.25, nan around", layer_that_drops))
    rows.append(Case("random draws", random_draws))
    rows.append(Case("cuda graph of a network", graph_of_a_network))
    return rows
