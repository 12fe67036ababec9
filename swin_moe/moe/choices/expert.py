"""Routing in which experts choose tokens ("Mixture-of-Experts with Expert Choice Routing", arXiv:2202.09368).

Every expert takes the C tokens of a routing group that score highest for it, so the load is even by construction. A
token may be taken by any number of experts; one that nobody took gets 0 from the layer.

Shape legend: T tokens, E experts, G routing groups, S tokens per group, C tokens per expert and group, k the most
experts that one token has, M = G * E * C pairs, in the order (expert, group, token).
"""

import torch
from torch import Tensor

from swin_moe.moe.balance import cut
from swin_moe.moe.choices.base import Assigned, Batch, Choice
from swin_moe.moe.routing import FILLER_SLOT, Routing, join, pick, row_blocks
from swin_moe.moe.scored import Scored
from swin_moe.randomness import RandomContext


class ExpertChoice(Choice):
    """Every expert takes the tokens of a routing group that score highest for it, as many as it has slots."""

    def assign(self, batch: Batch, scored: Scored, bias: Tensor | None) -> Assigned:
        """Returns the routing of every routing group. A choice without a bias: loads are even by construction."""
        parts = self.parts(batch)
        routings = [
            route_by_expert(scores, capacity=self.capacity(size, training=batch.training), group_size=size)
            for scores, (_, size) in zip(cut(scored.scores, parts), parts)
        ]
        return Assigned(join(routings), parts)

    def pairs(self, routing: Routing, random: RandomContext, token: Tensor) -> Tensor:
        """Returns (T, k), the number of the token and its expert."""
        return token[:, None] * self.config.num_experts + routing.expert

    def group_size(self, num_tokens: int, tokens_per_image: int, *, training: bool) -> int:
        """Returns the tokens of a routing group: in evaluation an image, whose result must not depend on others."""
        return super().group_size(num_tokens, tokens_per_image, training=training) if training else tokens_per_image

    def group_images(self, *, training: bool) -> int:
        """See Choice; an image in evaluation, as group_size says."""
        return super().group_images(training=training) if training else 1

    def capacity(self, group_size: int, *, training: bool = True) -> int | None:
        """Returns the slots of an expert; in evaluation those of training, where no other factor is given."""
        factor = 0 if training else self.config.eval_factor
        return self.capacity_of(group_size, factor or self.config.capacity_factor)


def route_by_expert(scores: Tensor, *, capacity: int | None, group_size: int) -> Routing:
    """Returns the routing in which every expert takes its best tokens; the gates are the scores.

    Equal scores go to the lower token. Slots are in token order. Every pair is kept; a token with fewer than k experts
    has fillers (see Routing). Waits for the device once, for k; in an exported program k is E, whatever the data.

    Args:
        scores: (T, E), softmax over experts of the logits (equation 1), or sigmoid.
        capacity: C, the paper's k = n * c / e; at most S are taken, and all where it is None.
        group_size: S; consecutive tokens, T a multiple of it.
    """
    num_tokens, num_experts = scores.shape
    num_groups = num_tokens // max(group_size, 1)
    capacity = group_size if capacity is None else min(capacity, group_size)
    if torch.compiler.is_compiling() and torch.compiler.is_exporting():
        return _route_to_all(scores, num_groups, capacity, max(group_size, 1))
    with torch.no_grad():
        token_M = _take_tokens(scores, num_groups, capacity)
        expert, slot = _by_token(token_M, num_tokens, num_experts, num_groups, capacity)
        keep = slot != FILLER_SLOT
        demand = expert.new_full((num_groups, num_experts), capacity)
    gate = pick(scores, expert).masked_fill(~keep, 0)
    return Routing(expert, slot, gate, keep, capacity, demand, demand, max(group_size, 1))


def _route_to_all(scores: Tensor, num_groups: int, capacity: int, group_size: int) -> Routing:
    """Returns the routing of route_by_expert in cells whose number does not depend on the data: choice e of a token is
    expert e, and a filler where that did not take it."""
    num_tokens, num_experts = scores.shape
    with torch.no_grad():
        score_EGS = scores.t().reshape(num_experts, num_groups, group_size)
        chosen_EGS = _choose_tokens(score_EGS, capacity)
        slot_EGS = torch.where(chosen_EGS, chosen_EGS.to(torch.int64).cumsum(dim=2) - 1, FILLER_SLOT)
        keep, slot = chosen_EGS.view(num_experts, num_tokens).t(), slot_EGS.view(num_experts, num_tokens).t()
        expert = torch.arange(num_experts, device=scores.device).expand(num_tokens, num_experts)
        demand = expert.new_full((num_groups, num_experts), capacity)
    gate = scores.masked_fill(~keep, 0)
    return Routing(expert, slot, gate, keep, capacity, demand, demand, group_size)


def _choose_tokens(score_eGS: Tensor, capacity: int) -> Tensor:
    """Returns (e, G, S) bool, the C tokens of every group that score highest for an expert."""
    if capacity == 0:
        return torch.zeros_like(score_eGS, dtype=torch.bool)
    # The C-th largest score decides; among the tokens that have just that, the first ones fill up.
    last = score_eGS.topk(capacity, dim=2, sorted=False).values.amin(dim=2, keepdim=True)
    above, equal = score_eGS > last, score_eGS == last
    missing = capacity - above.sum(dim=2, keepdim=True)
    return above | (equal & (equal.cumsum(dim=2) <= missing))


def _take_tokens(scores: Tensor, num_groups: int, capacity: int) -> Tensor:
    """Returns (M,) int64, the tokens that every expert takes in every group, ascending within both."""
    num_tokens, num_experts = scores.shape
    if num_tokens * capacity == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    size = num_tokens // num_groups
    first_G = torch.arange(num_groups, device=scores.device) * size
    taken = []
    for experts in row_blocks(scores.t()):
        score_eGS = scores.t()[experts].reshape(-1, num_groups, size)
        chosen = _choose_tokens(score_eGS, capacity)
        place = chosen.flatten().nonzero_static(size=chosen.shape[0] * num_groups * capacity).squeeze(1)
        token_eGC = (place % size).view(-1, num_groups, capacity) + first_G[:, None]
        taken.append(token_eGC.flatten())
    return torch.cat(taken)


def _by_token(
    token_M: Tensor, num_tokens: int, num_experts: int, num_groups: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Returns (expert (T, k), slot (T, k)) of pairs (M,); the experts of a token in ascending order, then fillers."""
    sorted_M, pair_M = token_M.sort(stable=True)
    start_T = torch.searchsorted(sorted_M, torch.arange(num_tokens + 1, device=token_M.device))
    width = max(int(start_T.diff().max()), 1) if num_tokens else 1
    choice_M = torch.arange(len(token_M), device=token_M.device) - start_T[sorted_M]
    cell_M = sorted_M * width + choice_M
    expert = token_M.new_zeros(num_tokens * width)
    slot = token_M.new_full((num_tokens * width,), FILLER_SLOT)
    if len(token_M):
        expert[cell_M] = pair_M // (num_groups * capacity)
        slot[cell_M] = pair_M % capacity
    return expert.view(num_tokens, width), slot.view(num_tokens, width)
