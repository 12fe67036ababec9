"""What a MoE layer does with its router's logits: noise, scores, routing groups, capacity, balance loss, statistics.

Shape legend: B images, L tokens per image, T = B * L, E experts, k choices per token, G routing groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe import losses
from swin_moe.moe.group_exchange import GroupExchange, route_across
from swin_moe.moe.router import Routing, expert_capacity, join, route
from swin_moe.randomness import RandomContext, normal


@dataclass(frozen=True)
class RoutingStats:
    """What the last forward did with this rank's tokens. Detached; nothing waits for the device."""

    demand: Tensor  # (E,) int64, pairs that chose each expert
    kept: Tensor  # (E,) int64, those that got a slot
    dropped: Tensor  # scalar int64, pairs without a slot
    entropy: Tensor  # scalar, mean over tokens of the router's entropy in nats, without noise; 0 for no tokens
    aux: Tensor  # scalar, unweighted balance loss


class RoutingRule:
    """The rule by which a layer's logits become a routing and a loss. Has no parameters: those are the router's.

    Args:
        layer: Number of the block in the network; the noise depends on it.
    """

    def __init__(self, config: MoEConfig, layer: int) -> None:
        self.config, self.layer = config, layer
        self.exchange: GroupExchange | None = None  # set where a routing group of training spans ranks

    def route(
        self,
        clean: Tensor,
        *,
        tokens_per_image: int,
        training: bool,
        random: RandomContext | None,
        token: Tensor | None,
    ) -> tuple[Routing, Tensor, RoutingStats]:
        """Returns the routing of T tokens by their (T, E) logits, the balance loss and the statistics.

        Args:
            random, token: What noise is drawn from, and the (T,) global index of every token; None = no noise.
        """
        config, noise_std = self.config, self.config.gate_noise / self.config.num_experts
        noisy = clean
        if random is not None and config.gate_noise > 0:
            noise = normal(random.key("gate_noise", self.layer), token, config.num_experts)
            noisy = clean + noise_std * noise.to(clean.dtype)
        scores = torch.softmax(noisy, dim=1)
        probabilities = scores if noisy is clean else torch.softmax(clean, dim=1)
        if self.exchange is not None and training:
            routing, aux = self._route_across(self.exchange, noisy, scores, probabilities, noise_std)
            return routing, aux, _statistics(routing, probabilities, aux)
        group = len(clean) if config.capacity_scope == "rank" else config.group_images * tokens_per_image
        routings, parts = [], []
        for part, size in group_slices(len(clean), group):
            routing = self._route_groups(noisy[part], scores[part], size, training=training)
            if config.balance_loss == "gshard":
                aux = losses.gshard(scores[part], routing.expert[:, 0], group_size=size)
            else:
                threshold = noisy[part].gather(1, routing.expert[:, -1:]).squeeze(1)
                aux = losses.load_importance(probabilities[part], threshold, noise_std=noise_std, group_size=size)
            routings.append(routing)
            parts.append(aux * (len(noisy[part]) / max(len(noisy), 1)))  # a mean over tokens
        routing, aux = join(routings), sum(parts[1:], parts[0])
        return routing, aux, _statistics(routing, probabilities, aux)

    def _capacity(self, group_size: int, *, training: bool = True) -> int | None:
        config, factor = self.config, self.config.capacity_factor
        if not training and config.eval_capacity_factor is not None:
            factor = config.eval_capacity_factor
        return expert_capacity(group_size, config.num_experts, top_k=config.top_k, factor=factor)

    def _route_across(
        self, exchange: GroupExchange, noisy: Tensor, scores: Tensor, probabilities: Tensor, noise_std: float
    ) -> tuple[Routing, Tensor]:
        """Returns the routing of this rank's tokens and the balance loss of the group that they are a part of.

        The loss has the group's value on all its ranks, and weights that sum to the group's own weigh it later (the
        task weighs a rank by its images), so it counts once.
        """
        config = self.config
        routing, demand = route_across(
            noisy,
            exchange,
            top_k=config.top_k,
            capacity=self._capacity,
            batch_prioritized=config.batch_prioritized,
            normalize_gate=config.normalize_gate,
            scores=scores,
        )
        if config.balance_loss == "gshard":
            score_GE = exchange.sum(scores.sum(dim=0, keepdim=True))
            first_GE = demand.count_RkE[:, :1].sum(dim=0)
            return routing, losses.gshard_of_sums(score_GE, first_GE, demand.num_tokens)
        threshold = noisy.gather(1, routing.expert[:, -1:]).squeeze(1)
        chosen = losses.chosen_softly(probabilities, threshold, noise_std=noise_std)
        sums = exchange.sum(torch.stack([probabilities.sum(dim=0), chosen.sum(dim=0)]))
        return routing, losses.load_importance_of_sums(sums[:1], sums[1:])

    def _route_groups(self, noisy: Tensor, scores: Tensor, group_size: int, *, training: bool) -> Routing:
        config = self.config
        return route(
            noisy,
            top_k=config.top_k,
            capacity=self._capacity(group_size, training=training),
            group_size=group_size,
            batch_prioritized=config.batch_prioritized,
            normalize_gate=config.normalize_gate,
            scores=scores,
        )


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
    tiny = torch.finfo(probabilities.dtype).tiny
    entropy = -(probabilities * probabilities.clamp(min=tiny).log()).sum() / max(len(probabilities), 1)
    return RoutingStats(demand, kept, (demand - kept).sum(), entropy, aux.detach())
