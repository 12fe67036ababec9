"""What a MoE layer does with its router's logits: noise, scores, routing groups, capacity, balance loss, statistics.

Shape legend: B images, L tokens per image, T = B * L, D channels, E experts (with soft MoE: slots of an image), k
choices per token, G routing groups, R rows to dispatch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe import losses
from swin_moe.moe.expert_choice import route_by_expert
from swin_moe.moe.group_exchange import GroupDemand, GroupExchange, route_across
from swin_moe.moe.router import Router, Routing, expert_capacity, join, route, row_chunks
from swin_moe.moe.soft import SoftMix, route_slots
from swin_moe.randomness import RandomContext, normal


@dataclass(frozen=True)
class RoutingStats:
    """What the last forward did with this rank's tokens. Detached; nothing waits for the device."""

    demand: Tensor  # (E,) int64, pairs that chose each expert
    kept: Tensor  # (E,) int64, those that got a slot
    dropped: Tensor  # scalar int64, pairs without a slot
    entropy: Tensor  # scalar, mean over tokens of the router's entropy in nats, without noise; 0 for no tokens
    aux: Tensor  # scalar, unweighted balance loss


@dataclass(frozen=True)
class Scored:
    """The logits of T tokens and what was made of them, each (T, E): all that routing may hold of that size."""

    clean: Tensor
    noisy: Tensor  # clean in evaluation
    scores: Tensor  # of the noisy logits: who is chosen, and the gates
    shares: Tensor  # the same, summing to 1 over experts
    probabilities: Tensor  # of the clean logits, summing to 1 over experts


@dataclass(frozen=True)
class Routed:
    """What a layer has to do with a batch."""

    rows: Tensor  # (R, D) to dispatch: the tokens, or the slots of soft MoE
    routing: Routing  # of the rows
    aux: Tensor  # scalar, auxiliary losses times their weights
    stats: RoutingStats
    mix: SoftMix | None = None

    def restore(self, y: Tensor) -> Tensor:
        """Returns (T, D), the layer's output, of what was combined for the rows."""
        return y if self.mix is None else self.mix.tokens(y)


class RoutingRule:
    """The rule by which a layer's logits become a routing and a loss. Has no parameters: those are the router's.

    Args:
        layer: Number of the block in the network; the noise depends on it.
    """

    def __init__(self, config: MoEConfig, layer: int) -> None:
        self.config, self.layer = config, layer
        self.exchange: GroupExchange | None = None  # set where a routing group of training spans ranks
        self.balance_exchange: GroupExchange | None = None  # set where the balance loss of training does

    def route(
        self,
        x: Tensor,
        router: Router,
        *,
        tokens_per_image: int,
        training: bool,
        random: RandomContext | None,
        token: Tensor | None,
    ) -> Routed:
        """Returns what to do with the tokens x (T, D) of whole images. To be called outside autocast.

        Args:
            random, token: What noise is drawn from, and the (T,) global index of every token; None = no noise.
        """
        config = self.config
        scored = self._score(router(x), random, token)
        mix = demand = None
        parts = [(slice(None), len(x))]
        rows = x
        if config.choice == "soft":
            mix = SoftMix.of(scored.noisy.view(-1, tokens_per_image, scored.noisy.shape[1]))
            rows = mix.slots(x)
            routing = route_slots(len(mix.combine), config.num_experts, config.slots, like=mix.combine)
        elif self.exchange is not None and training:
            # The ranks of the group decide together, each for its own tokens.
            routing, demand = route_across(
                scored.noisy, self.exchange, capacity=self._capacity, **self._options(scored.scores, router)
            )
        else:
            parts = group_slices(len(x), self._group_size(len(x), tokens_per_image, training))
            routing = join([self._route_part(scored, router, part, size, training) for part, size in parts])
        balance = self._balance(scored, routing, parts, demand, training)
        aux = balance * config.aux_loss_weight
        if config.z_loss_weight:
            aux = aux + losses.z_loss(scored.clean) * config.z_loss_weight
        return Routed(rows, routing, aux, _statistics(routing, scored.probabilities, balance), mix)

    def pairs(self, routing: Routing, random: RandomContext, token: Tensor) -> Tensor:
        """Returns (R, k) int64, a number for every pair that no layout of the run changes."""
        config, device = self.config, token.device
        if config.choice == "soft":
            slots = config.num_experts * config.slots
            return (random.sample[:, None] * slots + torch.arange(slots, device=device)).view(-1, 1)
        if config.choice == "expert":
            return token[:, None] * config.num_experts + routing.expert
        return token[:, None] * config.top_k + torch.arange(config.top_k, device=device)

    def _score(self, clean: Tensor, random: RandomContext | None, token: Tensor | None) -> Scored:
        config, noisy = self.config, clean
        if random is not None and config.gate_noise > 0:
            key, std = random.key("gate_noise", self.layer), config.gate_noise / config.num_experts
            noisy = torch.empty_like(clean, requires_grad=False)
            for rows in row_chunks(clean):
                noisy[rows] = std * normal(key, token[rows], clean.shape[1]).to(clean.dtype)
            noisy = noisy.add_(clean)  # into the memory of the noise
        if config.scores == "softmax":
            scores = torch.softmax(noisy, dim=1)
            return Scored(clean, noisy, scores, scores, scores if noisy is clean else torch.softmax(clean, dim=1))
        scores = torch.sigmoid(noisy)
        shares = _shares(scores) if config.balance_loss == "gshard" or noisy is clean else scores
        with torch.no_grad():
            probabilities = shares if noisy is clean else _shares(torch.sigmoid(clean))
        return Scored(clean, noisy, scores, shares, probabilities)

    def _group_size(self, num_tokens: int, tokens_per_image: int, training: bool) -> int:
        """Returns the tokens of a full routing group.

        Where experts choose, an image is evaluated by itself: its result must not depend on what else is in the batch.
        """
        if self.config.choice == "expert" and not training:
            return tokens_per_image
        return num_tokens if self.config.capacity_scope == "rank" else self.config.group_images * tokens_per_image

    def _capacity(self, group_size: int, *, training: bool = True) -> int | None:
        config = self.config
        factor = config.capacity_factor if training else config.eval_factor
        if config.choice == "expert" and factor == 0:
            factor = config.capacity_factor  # experts that choose have no need to go by: on as in training
        return expert_capacity(group_size, config.num_experts, top_k=config.top_k, factor=factor)

    def _options(self, scores: Tensor, router: Router) -> dict[str, Any]:
        config = self.config
        return {
            "top_k": config.top_k,
            "batch_prioritized": config.batch_prioritized,
            "normalize_gate": config.normalize_gate,
            "scores": scores,
            "bias": None if router.balance is None else router.balance(),
            "expert_groups": config.expert_groups,
            "group_limit": config.group_limit or config.expert_groups,
        }

    def _route_part(self, scored: Scored, router: Router, part: slice, group_size: int, training: bool) -> Routing:
        capacity = self._capacity(group_size, training=training)
        scores = scored.scores[part]
        if self.config.choice == "expert":
            return route_by_expert(scores, capacity=capacity, group_size=group_size)
        options = self._options(scores, router)
        return route(scored.noisy[part], capacity=capacity, group_size=group_size, **options)

    def _balance(
        self,
        scored: Scored,
        routing: Routing,
        parts: list[tuple[slice, int]],
        demand: GroupDemand | None,
        training: bool,
    ) -> Tensor:
        """Returns the balance loss without its weight: a mean over tokens of the groups' losses.

        Over ranks it has the same value on all of them, and weights that sum to one weigh it later (the task weighs a
        rank by its images), so it counts once.
        """
        config, num_tokens = self.config, len(scored.clean)
        if config.balance_loss == "none":
            return scored.clean.new_zeros(())
        exchange = self.balance_exchange if config.balance_scope == "global" else self.exchange
        if exchange is not None and training:
            return self._balance_across(exchange, scored, routing, demand)
        if config.balance_scope == "global":
            parts = [(slice(None), max(num_tokens, 1))]
        total = []
        for part, size in parts:
            if config.balance_loss == "gshard":
                loss = losses.gshard(scored.shares[part], routing.expert[part, 0], group_size=size)
            else:
                threshold, std = _threshold(scored, routing)[part], config.gate_noise / config.num_experts
                loss = losses.load_importance(scored.probabilities[part], threshold, noise_std=std, group_size=size)
            total.append(loss * (len(scored.clean[part]) / max(num_tokens, 1)))
        return sum(total[1:], total[0])

    def _balance_across(
        self, exchange: GroupExchange, scored: Scored, routing: Routing, demand: GroupDemand | None
    ) -> Tensor:
        """Returns the balance loss of all tokens of the ranks of the exchange as one group."""
        config, num_tokens = self.config, len(scored.clean)
        if config.balance_loss == "gshard":
            if config.balance_scope == "group":
                first_GE = demand.count_RkE[:, :1].sum(dim=0)
            else:
                own = losses.count_first(routing.expert[:, 0], config.num_experts, max(num_tokens, 1))
                first_GE = exchange.gather(own.sum(dim=0)).sum(dim=0, keepdim=True)
            return losses.gshard_of_sums(exchange.sum(scored.shares.sum(dim=0, keepdim=True)), first_GE)
        std = config.gate_noise / config.num_experts
        load = losses.load_of(
            scored.probabilities, _threshold(scored, routing), noise_std=std, group_size=max(num_tokens, 1)
        )
        sums = exchange.sum(torch.stack([scored.probabilities.sum(dim=0), load[0]]))
        return losses.load_importance_of_sums(sums[:1], sums[1:])


def _shares(scores: Tensor) -> Tensor:
    """Returns (T, E) scores divided by their sum over experts (DeepSeek-V3, arXiv:2412.19437, equation 19)."""
    return scores / scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def _threshold(scored: Scored, routing: Routing) -> Tensor:
    """Returns (T,), the noisy logit of every token's last choice."""
    return scored.noisy.gather(1, routing.expert[:, -1:]).squeeze(1)


def group_slices(num_tokens: int, group_size: int) -> list[tuple[slice, int]]:
    """Returns (tokens, group size) of the full routing groups and, where tokens are left over, of the smaller last one.

    A smaller group occurs in the last, uneven batch of an epoch or an evaluation; it competes for its own share of
    slots.
    """
    group_size = max(min(group_size, num_tokens), 1)
    full = num_tokens // group_size * group_size
    if full == num_tokens:
        return [(slice(None), group_size)]
    return [(slice(0, full), group_size), (slice(full, None), num_tokens - full)]


@torch.no_grad()
def _statistics(routing: Routing, probabilities: Tensor, aux: Tensor) -> RoutingStats:
    demand, kept = routing.demand.sum(dim=0), routing.kept.sum(dim=0)
    return RoutingStats(demand, kept, (demand - kept).sum(), losses.mean_entropy(probabilities), aux.detach())
