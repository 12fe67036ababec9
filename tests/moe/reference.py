"""The MoE layer the slow, obvious way: Python loops over tokens, in the tests' own words."""

import math

import torch
import torch.nn.functional as F


def choose(scores_row, k, expert_groups=1, group_limit=1):
    """Returns the k experts with the largest scores, lower number first among equals.

    Only of the best groups, where a group's strength is the sum of its k / limit best.
    """
    size = len(scores_row) // expert_groups
    count = max(k // group_limit, 1)

    def strength(group):
        return sum(sorted(scores_row[group * size : (group + 1) * size], reverse=True)[:count])

    allowed = sorted(range(expert_groups), key=lambda g: (-strength(g), g))[:group_limit]
    experts = [e for e in range(len(scores_row)) if e // size in allowed]
    return sorted(experts, key=lambda e: (-scores_row[e], e))[:k]


def route_slowly(
    logits,
    *,
    top_k,
    capacity,
    group_size=None,
    batch_prioritized=False,
    scores=None,
    bias=None,
    expert_groups=1,
    group_limit=1,
):
    """Returns (expert, slot, keep) as nested lists; capacity None = by need."""
    scores = (torch.softmax(logits, dim=1) if scores is None else scores).tolist()
    num_tokens, num_experts = logits.shape
    size = group_size or max(num_tokens, 1)
    offset = [0.0] * num_experts if bias is None else bias.tolist()
    expert = [choose([s + b for s, b in zip(row, offset)], top_k, expert_groups, group_limit) for row in scores]
    slot = [[None] * top_k for _ in range(num_tokens)]
    for start in range(0, num_tokens, size):
        tokens = list(range(start, start + size))
        if batch_prioritized:
            tokens.sort(key=lambda t: (-scores[t][expert[t][0]], t))
        taken = [0] * num_experts
        for choice in range(top_k):
            for t in tokens:
                e = expert[t][choice]
                slot[t][choice] = taken[e]
                taken[e] += 1
    keep = [[capacity is None or s < capacity for s in row] for row in slot]
    return expert, slot, keep


def experts_choose_slowly(scores, *, capacity, group_size):
    """Returns, per token, the experts that took it as {expert: slot}."""
    found = [{} for _ in scores]
    rows = scores.tolist()
    for start in range(0, len(rows), group_size):
        tokens = range(start, start + group_size)
        for e in range(scores.shape[1]):
            best = sorted(tokens, key=lambda t: (-rows[t][e], t))[:capacity]
            for slot, t in enumerate(sorted(best)):
                found[t][e] = slot
    return found


def soft_slowly(x, logits, slots, weights):
    """Returns (L, D), Soft MoE of one image x (L, D) by logits (L, E * slots); weights: the four expert tensors."""
    rows = torch.zeros_like(x)
    for number in range(logits.shape[1]):
        dispatch = torch.exp(logits[:, number]) / torch.exp(logits[:, number]).sum()
        result = experts_slowly((dispatch[:, None] * x).sum(0), number // slots, *weights)
        combine = torch.exp(logits[:, number]) / torch.exp(logits).sum(1)
        rows = rows + combine[:, None] * result
    return rows


def experts_slowly(x_row, expert, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """Returns what one expert makes of one token (D,)."""
    hidden = F.gelu(fc1_weight[expert] @ x_row + fc1_bias[expert])
    return hidden @ fc2_weight[expert] + fc2_bias[expert]


def layer_slowly(x, logits, weights, *, normalize_gate=False, **routing):
    """Returns (y (T, D), number of dropped pairs) for x (T, D); weights: the four expert tensors."""
    scores = torch.softmax(logits, dim=1)
    expert, _, keep = route_slowly(logits.detach(), **routing)
    rows, dropped = [], 0
    for t in range(len(x)):
        gates = scores[t, expert[t]]
        if normalize_gate and len(gates) > 1:
            gates = gates / gates.sum()
        row = torch.zeros_like(x[t])
        for choice, e in enumerate(expert[t]):
            if keep[t][choice]:
                row = row + gates[choice] * experts_slowly(x[t], e, *weights)
            else:
                dropped += 1
        rows.append(row)
    return (torch.stack(rows) if rows else x), dropped


def gshard_slowly(scores, first):
    """Returns E * sum_e (mean score of e) * (fraction of first choices of e)."""
    num_tokens, num_experts = scores.shape
    total = 0.0
    for e in range(num_experts):
        total = total + scores[:, e].mean() * (sum(1 for f in first if f == e) / num_tokens)
    return total * num_experts


def load_importance_slowly(probabilities, threshold, noise_std):
    """Returns half the sum of the squared coefficients of variation of importance and load."""

    def squared_variation(values):
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / (len(values) - 1) / (mean**2 + 1e-10)

    def phi(value):
        return 0.5 * (1.0 + math.erf(value / math.sqrt(2.0)))

    rows = probabilities.tolist()
    num_experts = probabilities.shape[1]
    importance = [sum(row[e] for row in rows) for e in range(num_experts)]
    load = [sum(phi((row[e] - t) / noise_std) for row, t in zip(rows, threshold.tolist())) for e in range(num_experts)]
    return 0.5 * (squared_variation(importance) + squared_variation(load))
