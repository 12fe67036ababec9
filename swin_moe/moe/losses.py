"""Balance losses of one routing group, averaged over groups. Pure functions; 0 with a gradient for no tokens.

Facts matched to microsoft/Tutel at ac0e51b, tutel/impls/losses.py.

Shape legend: T tokens, E experts, G routing groups, S tokens per group.
"""

import math

import torch
from torch import Tensor


def gshard_of_sums(score_GE: Tensor, first_GE: Tensor, group_size: int) -> Tensor:
    """Returns the mean over groups of E * sum_e P_e f_e from sums over a group's tokens: scores and first choices."""
    return (score_GE * first_GE).sum(dim=1).mean() * (score_GE.shape[1] / max(group_size, 1) ** 2)


def gshard(scores: Tensor, first_choice: Tensor, *, group_size: int) -> Tensor:
    """Returns E * sum_e P_e f_e: 1 for a perfect balance, E if one expert gets everything (GShard, arXiv:2006.16668).

    Args:
        scores: (T, E) softmax of the logits routed by (noise included); P_e is their mean.
        first_choice: (T,) int64; f_e is the fraction of tokens whose first choice is e, dropped ones included.
    """
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return scores.sum()
    mean_GE = scores.view(-1, group_size, num_experts).mean(dim=1)
    chosen_GS = first_choice.view(-1, group_size)
    count_GE = torch.zeros_like(mean_GE, dtype=torch.int64).scatter_add_(1, chosen_GS, torch.ones_like(chosen_GS))
    return (mean_GE * count_GE).sum() * (num_experts / num_tokens)


def chosen_softly(probabilities: Tensor, threshold: Tensor, *, noise_std: float) -> Tensor:
    """Returns (T, E), Phi((p_te - threshold_t) / noise_std); its sum over tokens is the load. See load_importance."""
    difference = probabilities - threshold[:, None]
    if noise_std > 0:
        # Phi(x) = erfc(-x / sqrt 2) / 2.
        return torch.erfc(difference * (-1.0 / (noise_std * math.sqrt(2.0)))) * 0.5
    return (difference > 0).to(probabilities.dtype)


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
    num_tokens, num_experts = probabilities.shape
    if num_tokens == 0:
        return probabilities.sum() + threshold.sum()
    chosen = chosen_softly(probabilities, threshold, noise_std=noise_std)
    importance_GE, load_GE = (amount.view(-1, group_size, num_experts).sum(dim=1) for amount in (probabilities, chosen))
    return load_importance_of_sums(importance_GE, load_GE)


def _squared_variation(amount_GE: Tensor) -> Tensor:
    """Returns (G,) unbiased variance / mean^2 over experts; 0 for one expert, where the variance has no estimate."""
    mean = amount_GE.mean(dim=1, keepdim=True)
    variance = (amount_GE - mean).square().sum(dim=1) / max(amount_GE.shape[1] - 1, 1)
    return variance / (mean.squeeze(1).square() + 1e-10)
