"""The balance loss and the z-loss of one rank's tokens as one operator each way.

Compiled kernels are in csrc/cpu/moe/moe_balance.cpp and csrc/cuda/moe/moe_balance.cu; swin_moe/moe/losses.py is the
reference, and what runs where there are none. On the CPU losses and gradients are the reference's to the bit, on CUDA
to rounding.

Shape legend: T tokens, E experts, k choices per token, G routing groups.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops import extension
from swin_moe.ops.moe.moe_route import MAX_EXPERTS_CUDA
from swin_moe.ops.transforms import apply

COMPILED = extension.compiled_for("moe_balance", "moe_balance_backward")
KINDS = {"none": 0, "gshard": 1, "gshard of shares": 2, "load_importance": 3}  # BalanceKind in csrc/moe/moe_balance.h


def available(scores: Tensor) -> bool:
    """Returns whether the operator takes scores of this device and number of experts."""
    fits = scores.device.type == "cpu" or scores.shape[1] <= MAX_EXPERTS_CUDA
    return scores.device.type in COMPILED and fits


def auxiliary_loss(
    scores: Tensor,
    threshold: Tensor | None,
    expert: Tensor,
    *,
    kind: str,
    noise_std: float,
    group_size: int,
    weight: float,
    logits: Tensor | None,
    z_weight: float,
) -> tuple[Tensor, Tensor]:
    """Returns (weight * balance loss + z_weight * z-loss, balance loss); the second is detached.

    The balance loss is a mean over tokens of the groups' losses. There are no second derivatives.

    Args:
        scores: (T, E) that are balanced; probabilities of the logits without noise for load_importance.
        threshold: (T,), see losses.load_importance; None for the others.
        expert: (T, k) int64.
        kind: A key of KINDS.
        noise_std: Of the logit noise; load_importance only.
        group_size: Tokens of a routing group; the last may be smaller.
        logits: (T, E) of the z-loss; None = without it.
    """
    if kind != "load_importance":
        threshold = None
    return apply(
        _AuxiliaryLoss, scores, threshold, expert, logits, KINDS[kind], noise_std, group_size, weight, z_weight
    )


class _AuxiliaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, threshold: Tensor | None, expert: Tensor, logits: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        aux, balance, *sums = torch.ops.swin_moe.moe_balance(scores, threshold, expert, logits, *options)
        ctx.options, ctx.with_threshold, ctx.with_logits = options, threshold is not None, logits is not None
        large = [scores] if options[0] == KINDS["load_importance"] or options[0] == KINDS["gshard of shares"] else []
        ctx.save_for_backward(*sums, *(v for v in (threshold, logits) if v is not None), *large)
        ctx.shape = scores.shape
        ctx.mark_non_differentiable(balance)
        return aux, balance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        saved = list(ctx.saved_tensors)
        sums, load, log_sum = saved[:3]
        rest = saved[3:]
        threshold = rest.pop(0) if ctx.with_threshold else None
        logits = rest.pop(0) if ctx.with_logits else None
        # The gradient of sums of scores asks for their shape only: nothing as large as they are is kept for it.
        scores = rest.pop(0) if rest else grad.new_zeros(()).expand(ctx.shape)
        results = torch.ops.swin_moe.moe_balance_backward(
            grad, scores, threshold, logits, sums, load, log_sum, *ctx.options
        )
        of_scores, of_threshold, of_logits = results
        return (
            of_scores if ctx.options[0] else None,
            of_threshold if threshold is not None else None,
            None,
            of_logits if logits is not None else None,
            *[None] * 5,
        )


def _fake_balance(
    scores: Tensor,
    threshold: Tensor | None,
    expert: Tensor,
    logits: Tensor | None,
    kind: int,
    noise_std: float,
    group_size: int,
    weight: float,
    z_weight: float,
) -> tuple[Tensor, ...]:
    tokens, experts = scores.shape
    size = torch.sym_max(torch.sym_min(group_size, tokens), 1)
    cells = ((tokens + size - 1) // size, experts) if kind and tokens else (0,)
    return (
        scores.new_empty(()),
        scores.new_empty(()),
        scores.new_empty(cells),
        scores.new_empty(cells),
        scores.new_empty((tokens if logits is not None else 0,)),
    )


def _fake_backward(
    grad: Tensor,
    scores: Tensor,
    threshold: Tensor | None,
    logits: Tensor | None,
    sums: Tensor,
    load: Tensor,
    log_sum: Tensor,
    kind: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        scores.new_empty(scores.shape if kind else (0,)),
        scores.new_empty((len(scores) if kind == KINDS["load_importance"] else 0,)),
        scores.new_empty(scores.shape if logits is not None else (0,)),
    )


extension.add_fake("moe_balance", _fake_balance)
extension.add_fake("moe_balance_backward", _fake_backward)
