"""Token-choice routing of one rank's tokens as one operator: scores, choices, gates, slots, counts, statistics.

Compiled kernels are in csrc/cpu/moe/moe_route.cpp and csrc/cuda/moe/moe_route.cu; swin_moe/moe/routing.py:route is the
reference, and what runs where there are none. Integers are the reference's, and on the CPU so is every bit of the other
numbers and of their gradients.

Shape legend: T tokens, E experts, k choices per token, G routing groups, S tokens of a full group (T <= G * S).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops import extension
from swin_moe.ops.transforms import apply

COMPILED = extension.compiled_for("moe_route", "moe_route_backward")
MAX_EXPERTS_CUDA = 2048  # kMaxRoutedExperts in csrc/cuda/moe/route_launch.h


class Routed(NamedTuple):
    """What came of the logits. scores, probabilities, gate and threshold carry gradients."""

    scores: Tensor  # (T, E), of the noisy logits
    probabilities: Tensor  # (T, E), softmax of the clean logits; (0,) where not asked for
    gate: Tensor  # (T, k)
    threshold: Tensor  # (T,), the noisy logit of every token's last choice
    expert: Tensor  # (T, k) int64
    slot: Tensor  # (T, k) int64, counts dropped pairs too
    keep: Tensor  # (T, k) bool
    demand: Tensor  # (G, E) int64
    kept: Tensor  # (G, E) int64
    totals: Tensor  # (2 E + 1,) int64: demand and kept summed over groups, pairs without a slot
    entropy: Tensor  # scalar, mean over tokens in nats, of the clean logits


def available(logits: Tensor) -> bool:
    """Returns whether the operator takes logits of this device, dtype and number of experts.

    An exported program must run without this library, so it holds the reference's operators.
    """
    if torch.compiler.is_compiling() and torch.compiler.is_exporting():
        return False
    covered = logits.device.type in COMPILED and logits.dtype in (torch.float32, torch.float64)
    return covered and (logits.device.type == "cpu" or logits.shape[1] <= MAX_EXPERTS_CUDA)


def route_tokens(
    clean: Tensor,
    noisy: Tensor | None,
    *,
    bias: Tensor | None,
    top_k: int,
    group_size: int,
    capacity: int | None,
    last_capacity: int | None,
    sigmoid: bool,
    normalize: bool,
    prioritized: bool,
    probabilities: bool,
) -> Routed:
    """Returns the routing of T tokens by their (T, E) logits. Gradients go to both; there are no second derivatives.

    Args:
        clean, noisy: Logits without and with noise; float32 or float64. noisy None = no noise.
        bias: (E,), added to the scores by which experts are chosen, not to gates; None = 0.
        group_size: S, at least 1.
        capacity, last_capacity: Slots per expert in a full group, and in a smaller last one; None = by need.
        sigmoid: Scores are sigmoids of the logits, else their softmax.
        normalize: The k gates of a token sum to 1 (before any drop).
        prioritized: Confident tokens take slots first, ties in token order; else in token order.
        probabilities: Whether to return them; not with sigmoid.

    Raises:
        ValueError: Shapes or numbers that do not fit. TypeError: another dtype.
    """
    limits = [-1 if limit is None else limit for limit in (capacity, last_capacity)]
    return Routed(
        *apply(_Route, clean, noisy, bias, top_k, group_size, *limits, sigmoid, normalize, prioritized, probabilities)
    )


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clean: Tensor, noisy: Tensor | None, bias: Tensor | None, top_k: int, *options: Any) -> tuple:
        results = Routed(*torch.ops.swin_moe.moe_route(clean, noisy, bias, top_k, *options))
        ctx.with_noise = noisy is not None
        *_, ctx.sigmoid, ctx.normalize, _, ctx.with_probabilities = options
        # Saved only if needed: each is as large as the logits.
        probabilities = [results.probabilities] if ctx.with_probabilities else []
        ctx.save_for_backward(results.scores, results.expert, *probabilities)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[4:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scores: Tensor | None, probabilities: Tensor | None, *rest: Tensor | None) -> tuple:
        saved_scores, expert, *saved_probabilities = ctx.saved_tensors
        clean, noisy = torch.ops.swin_moe.moe_route_backward(
            scores,
            probabilities if ctx.with_probabilities else None,
            rest[0],
            rest[1],
            saved_scores,
            saved_probabilities[0] if saved_probabilities else None,
            expert,
            ctx.sigmoid,
            ctx.normalize,
        )
        if not ctx.with_noise:
            return noisy if clean.dim() == 1 else clean + noisy, *[None] * 10
        return None if clean.dim() == 1 else clean, noisy, *[None] * 9


def _fake_route(
    clean: Tensor,
    noisy: Tensor | None,
    bias: Tensor | None,
    top_k: int,
    group_size: int,
    capacity: int,
    last_capacity: int,
    sigmoid: bool,
    normalize: bool,
    prioritized: bool,
    probabilities: bool,
) -> tuple[Tensor, ...]:
    tokens, experts = clean.shape
    pairs, groups = (tokens, top_k), (tokens + group_size - 1) // group_size
    return (
        clean.new_empty(clean.shape),
        clean.new_empty(clean.shape if probabilities and not sigmoid else (0,)),
        clean.new_empty(pairs),
        clean.new_empty((tokens,)),
        clean.new_empty(pairs, dtype=torch.int64),
        clean.new_empty(pairs, dtype=torch.int64),
        clean.new_empty(pairs, dtype=torch.bool),
        clean.new_empty((groups, experts), dtype=torch.int64),
        clean.new_empty((groups, experts), dtype=torch.int64),
        clean.new_empty((2 * experts + 1,), dtype=torch.int64),
        clean.new_empty(()),
    )


def _fake_backward(
    grad_scores: Tensor | None,
    grad_probabilities: Tensor | None,
    grad_gate: Tensor | None,
    grad_threshold: Tensor | None,
    scores: Tensor,
    probabilities: Tensor | None,
    expert: Tensor,
    sigmoid: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    has_clean = grad_probabilities is not None and probabilities is not None
    return scores.new_empty(scores.shape if has_clean else (0,)), scores.new_empty(scores.shape)


extension.add_fake("moe_route", _fake_route)
extension.add_fake("moe_route_backward", _fake_backward)
