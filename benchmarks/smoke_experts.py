"""What gpu_smoke.py runs of the operators of an MoE layer and of bias, GELU and dropout: a row per kernel.

Shape legend: T tokens, D or C channels, k choices per token, E experts, N rows for experts.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from smoke_problem import Case, Function, Problem, draw
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe import losses
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import Routing, route
from swin_moe.ops.bias_gelu import add_expert_bias_, bias_gelu, expert_bias_gradient
from swin_moe.ops.grouped_linear import grouped_linear
from swin_moe.ops.moe import moe_balance
from swin_moe.ops.moe.moe_permute import gate_gradient, permute, unpermute
from swin_moe.ops.moe.moe_route import Routed, route_tokens
from swin_moe.ops.random_draws import UnitDraw
from swin_moe.randomness import RandomContext, keep_mask


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


def balance_losses(kind: str, device: torch.device, size: str) -> Problem:
    """Returns the balance loss and the z-loss of three routing groups, the last one smaller, and losses.py's."""
    group = {"small": 20, "medium": 1000, "large": 30_000}[size]

    def ours(logits: Tensor, scores: Tensor) -> Tensor:
        threshold, expert = scores[:, 0] * 0.7, scores.argsort(1, descending=True)
        return moe_balance.auxiliary_loss(
            scores,
            threshold,
            expert,
            kind=kind,
            noise_std=0.2,
            group_size=group,
            weight=0.5,
            logits=logits,
            z_weight=0.1,
        )[0]

    def plain(logits: Tensor, scores: Tensor) -> Tensor:
        total = losses.z_loss(logits) * 0.1
        for part in scores.split(group) if kind != "none" else ():
            first, share = part.argmax(1), 0.5 * len(part) / len(scores)
            if kind == "load_importance":
                loss = losses.load_importance(part, part[:, 0] * 0.7, noise_std=0.2, group_size=len(part))
            else:
                loss = losses.gshard(part, first, group_size=len(part), shares=kind == "gshard of shares")
            total = total + loss * share
        return total

    # The CPU has it only where the library is built; there the case compares the reference with itself.
    tensors = {
        "logits": draw(device, torch.float32, 2 * group + group // 2, 8),
        "scores": draw(device, torch.float32, 2 * group + group // 2, 8, seed=1).sigmoid(),
    }
    return Problem(tensors, ours if moe_balance.available(tensors["scores"]) else plain, plain, tolerance=1e-5)


def cases(name: str, dtype: torch.dtype) -> list[Case]:
    """Returns the rows of one dtype."""
    rows = [
        Case(f"{verb}, {name}, top-{top_k}, {c} channels", partial(row_movement, verb, dtype, top_k, c))
        for verb in ("moe_permute", "moe_unpermute", "moe_gate_gradient")
        for top_k, c in ((1, 96), (2, 33))
    ]
    rows.append(Case(f"grouped_linear, {name}, nan around", partial(one_layer_per_expert, dtype)))
    rows += [
        Case(f"bias_gelu{', dropout' if drops else ''}, {name}, {c} channels", partial(bias_and_gelu, dtype, c, drops))
        for c in (96, 33)
        for drops in (False, True)
    ]
    return rows + [Case(f"expert bias, {name}, {c} channels", partial(bias_alone, dtype, c)) for c in (96, 33)]


def float_cases() -> list[Case]:
    """Returns the rows of routing, losses and a whole layer."""
    rows = [Case(f"moe_route, {n}", partial(routing_of_tokens, n == "sigmoid")) for n in ("softmax", "sigmoid")]
    rows += [Case(f"moe_balance, {kind}", partial(balance_losses, kind)) for kind in moe_balance.KINDS]
    return [*rows, Case("moe layer, bf16, capacity 1.25, nan around", layer_that_drops)]
