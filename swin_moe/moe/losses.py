"""Balance losses of one routing group, averaged over groups, and the z-loss. Pure functions; 0 with a gradient for no
tokens.

Facts matched to microsoft/Tutel at ac0e51b, tutel/impls/losses.py.

Shape legend: T tokens, E experts, G routing groups, S tokens per group.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.moe.routing import row_blocks
from swin_moe.ops.transforms import apply


def gshard_of_sums(score_GE: Tensor, first_GE: Tensor) -> Tensor:
    """Returns the mean over groups of E * sum_e P_e f_e from sums over a group's tokens: scores and first choices."""
    num_tokens_G = first_GE.sum(dim=1).clamp(min=1).to(score_GE.dtype)
    return ((score_GE * first_GE).sum(dim=1) / num_tokens_G.square()).mean() * score_GE.shape[1]


def count_first(first_choice: Tensor, num_experts: int, group_size: int) -> Tensor:
    """Returns (G, E) int64, how many tokens of each group have each expert as their first choice, first_choice (T,)."""
    chosen_GS = first_choice.view(-1, group_size)
    count_GE = chosen_GS.new_zeros((chosen_GS.shape[0], num_experts))
    return count_GE.scatter_add_(1, chosen_GS, torch.ones_like(chosen_GS))


def gshard(scores: Tensor, first_choice: Tensor, *, group_size: int, shares: bool = False) -> Tensor:
    """Returns E * sum_e P_e f_e: 1 for a perfect balance, E if one expert gets everything (GShard, arXiv:2006.16668).

    Args:
        scores: (T, E) softmax of the logits routed by (noise included); P_e is their mean.
        first_choice: (T,) int64; f_e is the fraction of tokens whose first choice is e, dropped ones included.
        shares: Scores do not sum to 1 over experts; P_e is the mean of a score divided by that sum (DeepSeek-V3,
            arXiv:2412.19437, equations 19 and 20).
    """
    if not scores.shape[0]:
        return scores.sum()
    score_GE = score_sums(scores, group_size, shares=shares)
    return gshard_of_sums(score_GE, count_first(first_choice, scores.shape[1], group_size))


def _group_blocks(value: Tensor, group_size: int) -> Iterator[tuple[slice, slice]]:
    """Yields (groups, rows) of blocks of (T, E): some whole groups, or a part of one where it is large."""
    limit = max(row_blocks(value)[0].stop, 1)
    if group_size <= limit:
        for first in range(0, value.shape[0] // group_size, limit // group_size):
            groups = slice(first, min(first + limit // group_size, value.shape[0] // group_size))
            yield groups, slice(groups.start * group_size, groups.stop * group_size)
        return
    for group in range(value.shape[0] // group_size):
        for start in range(0, group_size, limit):
            begin = group * group_size
            yield slice(group, group + 1), slice(begin + start, begin + min(start + limit, group_size))


class _Load(torch.autograd.Function):
    """Sums over each group of Phi((p - threshold) / std). Blocks of tokens: autograd would save four (T, E) tensors."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, threshold: Tensor, noise_std: float, group_size: int) -> Tensor:
        ctx.save_for_backward(probabilities, threshold)
        ctx.noise_std, ctx.group_size = noise_std, group_size
        load_GE = probabilities.new_zeros((probabilities.shape[0] // group_size, probabilities.shape[1]))
        for groups, rows in _group_blocks(probabilities, group_size):
            chosen = probabilities[rows] - threshold[rows, None]
            if noise_std > 0:  # Phi(x) = erfc(-x / sqrt 2) / 2
                chosen = chosen.mul_(-1.0 / (noise_std * math.sqrt(2.0))).erfc_().mul_(0.5)
            else:
                chosen = (chosen > 0).to(probabilities.dtype)
            load_GE[groups] += chosen.view(groups.stop - groups.start, -1, chosen.shape[1]).sum(dim=1)
        return load_GE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GE: Tensor) -> tuple:
        probabilities, threshold = ctx.saved_tensors
        if ctx.noise_std == 0:  # a step function
            return torch.zeros_like(probabilities), torch.zeros_like(threshold), None, None
        grad, grad_threshold = torch.empty_like(probabilities), torch.empty_like(threshold)
        for groups, rows in _group_blocks(probabilities, ctx.group_size):
            # The normal density: exp(-x^2 / 2) / (std sqrt(2 pi)).
            density = probabilities[rows] - threshold[rows, None]
            density.mul_(1.0 / (ctx.noise_std * math.sqrt(2.0))).square_().neg_().exp_()
            density.mul_(1.0 / (ctx.noise_std * math.sqrt(2.0 * math.pi)))
            grouped = density.view(groups.stop - groups.start, -1, density.shape[1])
            grouped.mul_(grad_GE[groups, None])
            grad[rows] = density
            grad_threshold[rows] = density.sum(dim=1).neg_()
        return grad, grad_threshold, None, None


class _ShareSums(torch.autograd.Function):
    """Sums over each group of s_te / sum_e s_te, keeping the scores only."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, group_size: int) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.group_size = group_size
        sum_GE = scores.new_zeros((scores.shape[0] // group_size, scores.shape[1]))
        for groups, rows in _group_blocks(scores, group_size):
            share = scores[rows] / _row_sums(scores[rows])
            sum_GE[groups] += share.view(groups.stop - groups.start, -1, share.shape[1]).sum(dim=1)
        return sum_GE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GE: Tensor) -> tuple:
        (scores,) = ctx.saved_tensors
        grad = torch.empty_like(scores)
        for groups, rows in _group_blocks(scores, ctx.group_size):
            total = _row_sums(scores[rows])
            part = torch.empty_like(scores[rows])
            part.view(groups.stop - groups.start, -1, part.shape[1]).copy_(grad_GE[groups, None])
            part -= (part * scores[rows]).sum(dim=1, keepdim=True) / total
            grad[rows] = part.div_(total)
        return grad, None


def _row_sums(scores: Tensor) -> Tensor:
    return scores.sum(dim=1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).tiny)


def score_sums(scores: Tensor, group_size: int, *, shares: bool) -> Tensor:
    """Returns (G, E), the sums over each group of (T, E) scores, or of their shares; zeros for no tokens."""
    if not scores.shape[0]:
        return scores.sum(dim=0, keepdim=True)
    if shares:
        return apply(_ShareSums, scores, group_size)
    return scores.view(-1, group_size, scores.shape[1]).sum(dim=1)


def load_of(probabilities: Tensor, threshold: Tensor, *, noise_std: float, group_size: int) -> Tensor:
    """Returns (G, E), the load of every group; zeros for no tokens. Arguments as load_importance."""
    if not probabilities.shape[0]:
        return probabilities.sum(dim=0, keepdim=True) + threshold.sum()
    return apply(_Load, probabilities, threshold, noise_std, group_size)


def load_importance_of_sums(importance_GE: Tensor, load_GE: Tensor) -> Tensor:
    """Returns the mean over groups of (CV^2(importance) + CV^2(load)) / 2; 0 with a gradient for sums of nothing."""
    return (_squared_variation(importance_GE) + _squared_variation(load_GE)).mean() * 0.5


def load_importance(probabilities: Tensor, threshold: Tensor, *, noise_std: float, group_size: int) -> Tensor:
    """Returns (CV^2(importance) + CV^2(load)) / 2 (V-MoE, arXiv:2106.05974, as Tutel computes it).

    importance_e = sum_t p_te; load_e = sum_t Phi((p_te - threshold_t) / noise_std). Tutel compares a probability with a
    logit here (Tutel issue 240); Swin-MoE was trained so, and so do we.

    Args:
        probabilities: (T, E) softmax of the logits *without* noise.
        threshold: (T,) the k-th largest noisy *logit* (that of the last choice).
        noise_std: Standard deviation of the logit noise, gate_noise / E; 0 takes the limit, a step function.
    """
    if not probabilities.shape[0]:
        return probabilities.sum() + threshold.sum()
    importance_GE = score_sums(probabilities, group_size, shares=False)
    load_GE = load_of(probabilities, threshold, noise_std=noise_std, group_size=group_size)
    return load_importance_of_sums(importance_GE, load_GE)


def _squared_variation(amount_GE: Tensor) -> Tensor:
    """Returns (G,) unbiased variance / mean^2 over experts; 0 for one expert, where the variance has no estimate."""
    mean = amount_GE.mean(dim=1, keepdim=True)
    variance = (amount_GE - mean).square().sum(dim=1) / max(amount_GE.shape[1] - 1, 1)
    return variance / (mean.squeeze(1).square() + 1e-10)


class _MeanSquareLogSum(torch.autograd.Function):
    """mean over tokens of log(sum_e exp(z_te))^2, keeping one number a token besides the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        log_sum = logits.new_empty(logits.shape[0])
        for rows in row_blocks(logits):
            log_sum[rows] = torch.logsumexp(logits[rows], dim=1)
        ctx.save_for_backward(logits, log_sum)
        return log_sum.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        logits, log_sum = ctx.saved_tensors
        grad_logits, scale = torch.empty_like(logits), log_sum * (grad * (2.0 / logits.shape[0]))
        for rows in row_blocks(logits):
            grad_logits[rows] = (logits[rows] - log_sum[rows, None]).exp_().mul_(scale[rows, None])
        return (grad_logits,)


def z_loss(logits: Tensor) -> Tensor:
    """Returns the mean over tokens of log(sum_e exp(z_te))^2 of logits z (T, E) (ST-MoE, arXiv:2202.08906, equation 5).

    It keeps logits small, so that their rounding in low precision stays small.
    """
    return apply(_MeanSquareLogSum, logits) if logits.shape[0] else logits.sum()


@torch.no_grad()
def mean_entropy(values: Tensor, *, logits: bool = False) -> Tensor:
    """Returns the mean over tokens of -sum_e p log p in nats; 0 for no tokens.

    Args:
        values: (T, E), the probabilities p; or logits, and p are the shares of their sigmoids.
    """
    tiny = torch.finfo(values.dtype).tiny
    total = values.new_zeros(())
    for rows in row_blocks(values):
        part = values[rows]
        if logits:
            part = torch.sigmoid(part)
            part /= _row_sums(part)
        total -= part.clamp(min=tiny).log_().mul_(part).sum()
    return total / max(values.shape[0], 1)
