"""Which experts a token goes to and which slot it gets there: pure functions of scores, and Routing, what they return.

Nothing here allocates as much as the scores: what needs all experts of a token goes through blocks of tokens.

Facts matched to microsoft/Tutel at ac0e51b, tutel/impls/fast_dispatch.py:extract_critical and tutel/gates; differences
are named where they are: ties are broken by rule, capacity is never rounded up, capacity by need never drops anything.

Shape legend: T tokens, E experts, k choices per token, G routing groups,
S tokens per routing group (T = G * S), N = T * k pairs of a token and a choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_moe.ops.transforms import apply

# Up to this many choices, k passes of max are cheaper than one sort of E scores (CPU, E = 8 to 128).
_MAX_PASSES = 8
# Elements of a block of rows: what a CPU core's cache holds; on a device as many as hide the launch of a kernel.
_BLOCK_CPU, _BLOCK_DEVICE = 2**16, 2**22
FILLER_SLOT = 2**31 - 1  # of cells that stand for no pair, where tokens have unequally many


@dataclass(frozen=True)
class Routing:
    """Where every (token, choice) pair goes. Only `gate` carries a gradient.

    Within one (group, expert) the slots 0 ... demand - 1 are all taken, each once. Where tokens have unequally many
    experts (expert choice), k is the most that one has; the other cells are not kept and have FILLER_SLOT.
    """

    expert: Tensor  # (T, k) int64
    slot: Tensor  # (T, k) int64, counts dropped pairs too
    gate: Tensor  # (T, k), weight of the expert's output
    keep: Tensor  # (T, k) bool: slot < capacity
    capacity: int | None  # slots of one expert in one group (the largest group's, if groups differ); None = by need
    demand: Tensor  # (G, E) int64, pairs that chose the expert
    kept: Tensor  # (G, E) int64, those of them that got a slot
    group_size: int  # S; the last group may hold fewer tokens

    @property
    def top_k(self) -> int:
        """Choices per token, k."""
        return self.expert.shape[1]

    @property
    def is_pair(self) -> Tensor:
        """(T, k) bool, False for cells that stand for no pair."""
        return self.slot != FILLER_SLOT


def row_blocks(value: Tensor) -> list[slice]:
    """Returns slices of the rows of (rows, columns), each of a bounded number of elements; [] for no rows.

    One slice in a traced graph: the compiler fuses what would be temporaries here, and would unroll every block.
    """
    num_rows, num_columns = value.shape
    if torch.compiler.is_compiling():
        return [slice(0, num_rows)] if num_rows else []
    size = max((_BLOCK_CPU if value.device.type == "cpu" else _BLOCK_DEVICE) // num_columns, 1)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def expert_capacity(num_tokens: int, num_experts: int, *, top_k: int, factor: float) -> int | None:
    """Returns how many pairs one expert accepts from one routing group, C; None: as many as there are.

    factor > 0: C = k * int(factor * ceil(T / E)). factor = 0: by need. factor < 0: by need, but at most the same
    formula with -factor; a cap above the need drops nothing, so the cap is all that routing has to know. Tutel then
    rounds C up to a multiple of shards x overlap; we do not, or the layout of a run would change what is dropped. 0 is
    legal.
    """
    if factor == 0:
        return None
    # sym_int: the capacity of a batch that is a symbol, as in an exported program; else it is int. Rounded up without
    # negative numbers, which ONNX divides towards zero.
    return top_k * torch.sym_int(abs(factor) * ((num_tokens + num_experts - 1) // num_experts))


def route(
    logits: Tensor,
    *,
    top_k: int,
    capacity: int | None,
    group_size: int | None = None,
    batch_prioritized: bool = False,
    normalize_gate: bool = False,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
    expert_groups: int = 1,
    group_limit: int = 1,
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
        scores: softmax(logits) if the caller has it already, or other scores than those. Gates are scores.
        bias, expert_groups, group_limit: See choose_experts; they change who is chosen, not the gates.

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
        expert = choose_experts(scores, top_k, bias=bias, expert_groups=expert_groups, group_limit=group_limit)
        confidence = scores.gather(1, expert[:, :1]).squeeze(1) if batch_prioritized else None
        slot, demand = assign_slots(expert, num_experts, max(size, 1), confidence)
        if capacity is None:
            keep, kept = torch.ones_like(slot, dtype=torch.bool), demand
        else:
            keep, kept = slot < capacity, demand.clamp(max=capacity)
    gate = pick(scores, expert)
    if normalize_gate and top_k > 1:
        gate = gate / gate.sum(dim=1, keepdim=True).clamp(min=torch.finfo(gate.dtype).eps)
    return Routing(expert, slot, gate, keep, capacity, demand, kept, max(size, 1))


class _Pick(torch.autograd.Function):
    """torch.gather along dim 1 keeps its whole input for the backward, which needs no more than the shape."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_columns = values.shape[1]
        return values.gather(1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (index,) = ctx.saved_tensors
        return grad.new_zeros((len(grad), ctx.num_columns)).scatter_add_(1, index, grad), None


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Returns (T, k), the values (T, E) at the given columns (T, k)."""
    return apply(_Pick, values, index)


def join(routings: Sequence[Routing]) -> Routing:
    """Returns one routing over the tokens of several, in order.

    Its groups are theirs where all but a smaller last one have one size; else all tokens are one group, in which the
    pairs that were kept come first, group by group.
    """
    if len(routings) == 1:
        return routings[0]
    if not are_even([(len(r.expert), r.group_size) for r in routings]):
        routings = _as_one_group(routings)
    width = max(r.top_k for r in routings)
    fillers = {"expert": 0, "slot": FILLER_SLOT, "gate": 0.0, "keep": False}
    columns = {
        name: torch.cat([F.pad(getattr(r, name), (0, width - r.top_k), value=value) for r in routings])
        for name, value in fillers.items()
    }
    columns |= {name: torch.cat([getattr(r, name) for r in routings]) for name in ("demand", "kept")}
    capacities = [r.capacity for r in routings if r.capacity is not None]
    capacity = max(capacities) if len(capacities) == len(routings) else None
    return Routing(capacity=capacity, group_size=routings[0].group_size, **columns)


def _as_one_group(routings: Sequence[Routing]) -> list[Routing]:
    """Returns the routings of single groups with slots, demand and capacity of one group of all their tokens."""
    demands, kepts = (torch.cat([getattr(r, name) for r in routings]) for name in ("demand", "kept"))
    demand_E, kept_E = demands.sum(dim=0), kepts.sum(dim=0)
    before_GE = kepts.cumsum(dim=0) - kepts
    dropped_GE = (demands - kepts).cumsum(dim=0) - demands  # minus those before and the own kept ones
    known = [r.capacity for r in routings if r.capacity is not None]
    capacity = sum(known) if len(known) == len(routings) else None
    size = sum(len(r.expert) for r in routings)
    found = []
    for number, r in enumerate(routings):
        moved = torch.where(r.keep, before_GE[number][r.expert], (kept_E + dropped_GE[number])[r.expert])
        slot = torch.where(r.is_pair, r.slot + moved, r.slot)
        none = r.demand.new_zeros((0, r.demand.shape[1]))
        counted = (none, none) if number else (demand_E[None], kept_E[None])
        found.append(replace(r, slot=slot, capacity=capacity, demand=counted[0], kept=counted[1], group_size=size))
    return found


@torch.no_grad()
def choose_experts(
    scores: Tensor, top_k: int, *, bias: Tensor | None = None, expert_groups: int = 1, group_limit: int = 1
) -> Tensor:
    """Returns (T, k) int64, the experts with the largest score + bias, best first; equal ones by lower number.

    torch.topk leaves the order of ties open. max returns the first maximum and a stable sort keeps order; both are
    documented.

    Args:
        bias: (E,) of each expert (arXiv:2408.15664, equation 3); None = 0.
        expert_groups, group_limit: Experts are in groups of consecutive numbers, equal in size, and a token uses those
            of its best `group_limit` groups only (DeepSeek-V3, arXiv:2412.19437, section 2.1.2, "node-limited").
    """
    if top_k == 1 and bias is None and group_limit == expert_groups:
        return scores.max(dim=1, keepdim=True).indices  # nothing to mask, so nothing to copy
    chosen = scores.new_empty((scores.shape[0], top_k), dtype=torch.int64)
    for rows in row_blocks(scores):
        rest = scores[rows].clone() if bias is None else scores[rows] + bias.to(scores.dtype)
        if group_limit < expert_groups:
            _leave_groups(rest, top_k, expert_groups, group_limit)
        _choose_in_place(rest, chosen[rows])
    return chosen


def _choose_in_place(rest: Tensor, chosen: Tensor) -> None:
    """Fills chosen (n, k); overwrites rest (n, E)."""
    top_k = chosen.shape[1]
    if top_k > _MAX_PASSES:
        chosen.copy_(rest.sort(dim=1, descending=True, stable=True).indices[:, :top_k])
        return
    for choice in range(top_k):
        best = rest.max(dim=1, keepdim=True).indices
        chosen[:, choice : choice + 1] = best
        if choice + 1 < top_k:
            rest.scatter_(1, best, -torch.inf)


def _leave_groups(rest: Tensor, top_k: int, expert_groups: int, group_limit: int) -> None:
    """Sets scores outside a token's best groups to -inf. A group counts with its k / limit largest scores, summed."""
    grouped = rest.view(rest.shape[0], expert_groups, -1)  # no len: it has to be a number, also of a symbol
    count = min(max(top_k // group_limit, 1), grouped.shape[2])
    strength = grouped.topk(count, dim=2).values.sum(dim=2)
    allowed = strength.sort(dim=1, descending=True, stable=True).indices[:, :group_limit]
    closed = torch.ones_like(strength, dtype=torch.bool).scatter_(1, allowed, False)
    grouped.masked_fill_(closed[:, :, None], -torch.inf)


def assign_slots(expert: Tensor, num_experts: int, group_size: int, confidence: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (slot (T, k), demand (G, E)): the rank of each pair among those of its group that chose the same expert.

    One stable sort by (group, expert) of pairs listed in the order in which they take slots; never a one-hot, but in
    an exported program: there a running count per expert takes the place of the sort, as ONNX has no stable one.
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
    if torch.compiler.is_compiling() and torch.compiler.is_exporting():
        slot_GkS, demand = _count_slots(expert_GkS, num_experts)
    else:
        slot_GkS, demand = _sort_slots(expert_GkS, num_experts)
    if confidence is not None:
        slot_GkS = torch.empty_like(slot_GkS).scatter_(2, order_GkS, slot_GkS)
    return slot_GkS.transpose(1, 2).reshape(num_tokens, top_k), demand


def _count_slots(expert_GkS: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Returns what _sort_slots does, by plain operators that every program format has; 8 bytes per pair and expert."""
    expert_GN = expert_GkS.flatten(1)
    numbers = torch.arange(num_experts, device=expert_GkS.device)
    count_GNE = (expert_GN[:, :, None] == numbers).to(torch.int64).cumsum(dim=1)
    slot_GN = count_GNE.gather(2, expert_GN[:, :, None]).squeeze(2) - 1
    return slot_GN.view_as(expert_GkS), count_GNE[:, -1]


def _sort_slots(expert_GkS: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Returns (slot, of the shape of expert_GkS; demand (G, E)), pairs of a group taking slots in their order."""
    num_groups = expert_GkS.shape[0]
    num_buckets = num_groups * num_experts
    group = torch.arange(num_groups, device=expert_GkS.device).view(-1, 1, 1)
    bucket_N = (group * num_experts + expert_GkS).flatten()
    if num_buckets <= torch.iinfo(torch.int16).max:  # half the passes of the radix sort
        bucket_N = bucket_N.to(torch.int16)
    sorted_N, pair_N = bucket_N.sort(stable=True)
    edges = torch.searchsorted(sorted_N, torch.arange(num_buckets + 1, device=pair_N.device, dtype=sorted_N.dtype))
    slot_N = torch.empty_like(pair_N)
    slot_N[pair_N] = torch.arange(pair_N.numel(), device=pair_N.device) - edges[sorted_N.long()]
    return slot_N.view_as(expert_GkS), edges.diff().view(num_groups, num_experts)


def uneven_parts(counts: Sequence[int], images: int) -> list[tuple[int, int]]:
    """Returns (tokens, group size) of routing groups of so many consecutive images of unequally many tokens."""
    sizes = [sum(counts[start : start + images]) for start in range(0, len(counts), images)]
    return [(size, size) for size in sizes if size] or [(0, 1)]


def image_shares(counts: Sequence[int], images: int) -> list[float]:
    """Returns the share of each of uneven_parts in all images."""
    cuts = [counts[start : start + images] for start in range(0, len(counts), images)]
    return [len(cut) / len(counts) for cut in cuts if sum(cut)] or [1.0]


def are_even(parts: Sequence[tuple[int, int]]) -> bool:
    """Returns whether a token's group follows from its place: all groups but a smaller last one have one size."""
    first = parts[0][1]
    return all(size == first for _, size in parts[:-1]) and parts[-1][1] <= first


def group_parts(num_tokens: int, group_size: int) -> list[tuple[int, int]]:
    """Returns (tokens, group size) of the full routing groups and, where tokens are left over, of the smaller last one.

    A smaller group occurs in the last, uneven batch of an epoch or an evaluation; it competes for its own share of
    slots.
    """
    group_size = max(group_size if group_size <= num_tokens else num_tokens, 1)  # no min: of symbols it is never simple
    rest = num_tokens % group_size
    return [(num_tokens - rest, group_size), (rest, rest)] if rest else [(num_tokens, group_size)]
