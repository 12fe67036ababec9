"""Which experts a token goes to and which slot it gets there: logits, choices, capacity, slots.

Facts matched to microsoft/Tutel at ac0e51b, tutel/impls/fast_dispatch.py:extract_critical and tutel/gates; differences
are named where they are: ties are broken by rule, capacity is never rounded up, capacity by need never drops anything.

Shape legend: T tokens, D model channels, E experts, k choices per token, P cosine projection, G routing groups,
S tokens per routing group (T = G * S), N = T * k pairs of a token and a choice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to this many choices, k passes of max are cheaper than one sort of E scores (CPU, E = 8 to 128).
_MAX_PASSES = 8
_MAX_LOG_SCALE = math.log(100.0)  # cosine router: the logit scale never exceeds 100


@dataclass(frozen=True)
class Routing:
    """Where every (token, choice) pair goes. Only `gate` carries a gradient.

    Within one (group, expert) the slots 0 ... demand - 1 are all taken, each once.
    """

    expert: Tensor  # (T, k) int64
    slot: Tensor  # (T, k) int64, counts dropped pairs too
    gate: Tensor  # (T, k), weight of the expert's output
    keep: Tensor  # (T, k) bool: slot < capacity
    capacity: int  # slots of one expert in one group (the largest group's, if groups differ)
    demand: Tensor  # (G, E) int64, pairs that chose the expert
    kept: Tensor  # (G, E) int64, those of them that got a slot
    group_size: int  # S; the last group may hold fewer tokens

    @property
    def top_k(self) -> int:
        """Choices per token, k."""
        return self.expert.shape[1]


def expert_capacity(num_tokens: int, num_experts: int, *, top_k: int, factor: float) -> int | None:
    """Returns how many pairs one expert accepts from one routing group, C; None: as many as there are.

    factor > 0: C = k * int(factor * ceil(T / E)). factor = 0: by need. factor < 0: by need, but at most the same
    formula with -factor; a cap above the need drops nothing, so the cap is all that routing has to know. Tutel then
    rounds C up to a multiple of shards x overlap; we do not, or the layout of a run would change what is dropped. 0 is
    legal.
    """
    if factor == 0:
        return None
    return top_k * int(abs(factor) * math.ceil(num_tokens / num_experts))


def route(
    logits: Tensor,
    *,
    top_k: int,
    capacity: int | None,
    group_size: int | None = None,
    batch_prioritized: bool = False,
    normalize_gate: bool = False,
    scores: Tensor | None = None,
) -> Routing:
    """Returns the routing of T tokens by their (T, E) logits (noise already added).

    Slots are choice-major: second choices start after the group's first choices, dropped ones included. Within a
    choice they follow token order, or descending confidence (largest score) with ties in token order. Costs O(T (E + k
    log T)).

    Args:
        capacity: Slots per expert and group; None = by need, nothing is dropped.
        group_size: Tokens per routing group, consecutive; None = all tokens are one group.
        batch_prioritized: Confident tokens take slots first (arXiv:2106.05974).
        normalize_gate: The k gates of a token sum to 1 (before any drop); no effect for k = 1.
        scores: softmax(logits) if the caller has it already.

    Raises:
        ValueError: top_k > E, or tokens that do not fill their groups.
    """
    num_tokens, num_experts = logits.shape
    size = num_tokens if group_size is None else group_size
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"model.moe.top_k must be in [1, {num_experts}], got {top_k}")
    if num_tokens % max(size, 1):
        raise ValueError(f"{num_tokens} tokens do not fill routing groups of {size}")
    scores = torch.softmax(logits, dim=1) if scores is None else scores
    with torch.no_grad():
        expert = choose_experts(scores, top_k)
        confidence = scores.gather(1, expert[:, :1]).squeeze(1) if batch_prioritized else None
        slot, demand = assign_slots(expert, num_experts, max(size, 1), confidence)
        if capacity is None:
            capacity = int(demand.max()) if num_tokens else 0
            keep, kept = torch.ones_like(slot, dtype=torch.bool), demand
        else:
            keep, kept = slot < capacity, demand.clamp(max=capacity)
    gate = scores.gather(1, expert)
    if normalize_gate and top_k > 1:
        gate = gate / gate.sum(dim=1, keepdim=True).clamp(min=torch.finfo(gate.dtype).eps)
    return Routing(expert, slot, gate, keep, capacity, demand, kept, max(size, 1))


def join(routings: Sequence[Routing]) -> Routing:
    """Returns one routing over the tokens of several, in order; all groups but the last one have the first's size."""
    if len(routings) == 1:
        return routings[0]
    names = ("expert", "slot", "gate", "keep", "demand", "kept")
    columns = {name: torch.cat([getattr(r, name) for r in routings]) for name in names}
    return Routing(capacity=max(r.capacity for r in routings), group_size=routings[0].group_size, **columns)


def choose_experts(scores: Tensor, top_k: int) -> Tensor:
    """Returns (T, k) int64, the experts with the largest scores, best first; equal scores go to the lower expert.

    torch.topk leaves the order of ties open. max returns the first maximum and a stable sort keeps order; both are
    documented.
    """
    if top_k > _MAX_PASSES:
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    rest, chosen = scores, []
    for choice in range(top_k):
        chosen.append(rest.max(dim=1, keepdim=True).indices)
        if choice + 1 < top_k:
            rest = rest.scatter(1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=1)


def assign_slots(expert: Tensor, num_experts: int, group_size: int, confidence: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (slot (T, k), demand (G, E)): the rank of each pair among those of its group that chose the same expert.

    One stable sort by (group, expert) of pairs listed in the order in which they take slots; never a one-hot.
    """
    num_tokens, top_k = expert.shape
    num_groups = num_tokens // group_size
    if num_tokens == 0:
        return expert, expert.new_zeros((0, num_experts))
    expert_GkS = expert.view(num_groups, group_size, top_k).transpose(1, 2)
    if confidence is not None:
        order_GS = confidence.view(num_groups, group_size).sort(dim=1, descending=True, stable=True).indices
        order_GkS = order_GS[:, None, :].expand(-1, top_k, -1)
        expert_GkS = expert_GkS.gather(2, order_GkS)
    num_buckets = num_groups * num_experts
    group = torch.arange(num_groups, device=expert.device).view(-1, 1, 1)
    bucket_N = (group * num_experts + expert_GkS).flatten()
    if num_buckets <= torch.iinfo(torch.int16).max:  # half the passes of the radix sort
        bucket_N = bucket_N.to(torch.int16)
    sorted_N, pair_N = bucket_N.sort(stable=True)
    edges = torch.searchsorted(sorted_N, torch.arange(num_buckets + 1, device=expert.device, dtype=sorted_N.dtype))
    slot_N = torch.empty_like(pair_N)
    slot_N[pair_N] = torch.arange(pair_N.numel(), device=expert.device) - edges[sorted_N.long()]
    slot_GkS = slot_N.view(num_groups, top_k, group_size)
    if confidence is not None:
        slot_GkS = torch.empty_like(slot_GkS).scatter_(2, order_GkS, slot_GkS)
    slot = slot_GkS.transpose(1, 2).reshape(num_tokens, top_k)
    return slot, edges.diff().view(num_groups, num_experts)


def gate_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype logits are computed in: float32 whatever the precision of the rest, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class LinearRouter(nn.Module):
    """logits = x W^T, no bias."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (T, E) logits of x (T, D). To be called outside autocast."""
        return F.linear(x.to(gate_dtype(x)), self.weight.to(gate_dtype(x)))

    def init_weights(self, generator: torch.Generator, std: float) -> None:
        """Fills the weights: truncated normal, as every linear layer of the official model."""
        _fill(self.weight, lambda value: nn.init.trunc_normal_(value, std=std, a=-2.0, b=2.0, generator=generator))


class CosineRouter(nn.Module):
    """logits = cosine(W x + b, s_e) * exp(temperature): an expert is a direction s_e (Tutel, cosine_top)."""

    def __init__(self, dim: int, num_experts: int, *, projection_dim: int, init_t: float) -> None:
        super().__init__()
        self.init_t = init_t
        self.temperature = nn.Parameter(torch.empty(1))
        self.projector = nn.Linear(dim, projection_dim)
        self.sim_matrix = nn.Parameter(torch.empty(projection_dim, num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (T, E) logits of x (T, D). To be called outside autocast."""
        dtype = gate_dtype(x)
        point_TP = F.linear(x.to(dtype), self.projector.weight.to(dtype), self.projector.bias.to(dtype))
        cosine_TE = F.normalize(point_TP, dim=1) @ F.normalize(self.sim_matrix.to(dtype), dim=0)
        return cosine_TE * self.temperature.to(dtype).clamp(max=_MAX_LOG_SCALE).exp()

    def init_weights(self, generator: torch.Generator, std: float) -> None:
        """Fills the weights: projector truncated normal, directions normal(0, 0.01), scale 1 / init_t."""
        weight = self.projector.weight
        _fill(weight, lambda value: nn.init.trunc_normal_(value, std=std, a=-2.0, b=2.0, generator=generator))
        _fill(self.sim_matrix, lambda value: value.normal_(0.0, 0.01, generator=generator))
        with torch.no_grad():
            self.projector.bias.zero_()
            self.temperature.fill_(-math.log(self.init_t))


def _fill(parameter: Tensor, rule: Callable[[Tensor], object]) -> None:
    """Fills a parameter with float32 numbers drawn on the CPU, the same on every device."""
    with torch.no_grad():
        value = torch.empty(parameter.shape, dtype=torch.float32)
        rule(value)
        parameter.copy_(value)
