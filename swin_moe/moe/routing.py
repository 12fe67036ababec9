"""What a MoE layer does with its router's logits: noise, scores, routing groups, capacity, balance loss, statistics.

Shape legend: B images, L tokens per image, T = B * L, D channels, E experts (with soft MoE: slots of an image), k
choices per token, G routing groups, R rows to dispatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe import losses
from swin_moe.moe.expert_choice import route_by_expert
from swin_moe.moe.group_exchange import GroupDemand, GroupExchange, route_across
from swin_moe.moe.router import Router, Routing, expert_capacity, join, pick, route, row_chunks
from swin_moe.moe.soft import SoftMix, route_slots
from swin_moe.ops import moe_balance, moe_route
from swin_moe.ops.random_draws import gate_noise, with_words
from swin_moe.randomness import RandomContext


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
    probabilities: Tensor | None  # softmax of the clean logits; None with sigmoid scores


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
        clean = router(x)
        noisy = self._add_noise(clean, random, token)
        # Once, however many parts follow: where an engine gathers parameters per module this is a collective.
        bias = None if router.balance is None else router.balance()
        if self._is_fused(clean, training):
            return self._route_fused(x, clean, noisy, bias, tokens_per_image=tokens_per_image, training=training)
        scored = self._score(clean, noisy)
        mix = demand = None
        parts = [(x.shape[0], max(x.shape[0], 1))]
        rows = x
        if config.choice == "soft":
            mix = SoftMix.of(scored.noisy.view(-1, tokens_per_image, scored.noisy.shape[1]))
            rows = mix.slots(x)
            routing = route_slots(mix.combine.shape[0], config.num_experts, config.slots, like=mix.combine)
        elif self.exchange is not None and training:
            # The ranks of the group decide together, each for its own tokens.
            routing, demand = route_across(
                scored.noisy, self.exchange, capacity=self._capacity, **self._options(scored.scores, bias)
            )
        else:
            parts = group_parts(x.shape[0], self._group_size(x.shape[0], tokens_per_image, training))
            routing = self._route_parts(scored, bias, parts, training)
        balance = self._balance(scored, routing, parts, demand, training)
        aux = balance * config.aux_loss_weight
        if config.z_loss_weight:
            aux = aux + losses.z_loss(scored.clean) * config.z_loss_weight
        return Routed(rows, routing, aux, _statistics(routing, scored, balance), mix)

    def pairs(self, routing: Routing, random: RandomContext, token: Tensor) -> Tensor:
        """Returns (R, k) int64, a number for every pair that no layout of the run changes."""
        config, device = self.config, token.device
        if config.choice == "soft":
            slots = config.num_experts * config.slots
            return (random.sample[:, None] * slots + torch.arange(slots, device=device)).view(-1, 1)
        if config.choice == "expert":
            return token[:, None] * config.num_experts + routing.expert
        return token[:, None] * config.top_k + torch.arange(config.top_k, device=device)

    def _add_noise(self, clean: Tensor, random: RandomContext | None, token: Tensor | None) -> Tensor:
        config, noisy = self.config, clean
        if random is not None and config.gate_noise > 0:
            random, std = with_words(random), config.gate_noise / config.num_experts
            noisy = torch.empty_like(clean, requires_grad=False)
            for rows in row_chunks(clean):
                noise = gate_noise(random, token[rows], clean.shape[1], layer=self.layer)
                noisy[rows] = std * noise.to(clean.dtype)
            noisy = noisy.add_(clean)  # into the memory of the noise
        return noisy

    def _score(self, clean: Tensor, noisy: Tensor) -> Scored:
        if self.config.scores == "softmax":
            scores = torch.softmax(noisy, dim=1)
            return Scored(clean, noisy, scores, scores if noisy is clean else torch.softmax(clean, dim=1))
        return Scored(clean, noisy, torch.sigmoid(noisy), None)

    def _is_fused(self, clean: Tensor, training: bool) -> bool:
        """Returns whether the compiled operator covers the options; if not, the Python form does what it would."""
        config = self.config
        limited = 0 < config.group_limit < config.expert_groups
        across = training and (self.exchange is not None or self.balance_exchange is not None)
        covered = config.choice == "token" and not limited and not across
        return covered and moe_route.available(clean)

    def _route_fused(
        self,
        x: Tensor,
        clean: Tensor,
        noisy: Tensor,
        bias: Tensor | None,
        *,
        tokens_per_image: int,
        training: bool,
    ) -> Routed:
        config, num_experts = self.config, clean.shape[1]
        parts = group_parts(x.shape[0], self._group_size(x.shape[0], tokens_per_image, training))
        capacities = [self._capacity(size, training=training) for _, size in parts]
        noise = None if noisy is clean else noisy
        own = config.balance_loss == "load_importance" and noise is not None  # else they are the scores
        result = moe_route.route_tokens(
            clean, noise, bias=bias, top_k=config.top_k, group_size=max(parts[0][1], 1), capacity=capacities[0],
            last_capacity=capacities[-1], sigmoid=config.scores == "sigmoid", normalize=config.normalize_gate,
            prioritized=config.batch_prioritized, probabilities=own,
        )  # fmt: skip
        capacity = None if capacities[0] is None else max(capacities)
        columns = {name: getattr(result, name) for name in ("expert", "slot", "gate", "keep", "demand", "kept")}
        routing = Routing(capacity=capacity, group_size=max(parts[0][1], 1), **columns)
        scored = Scored(clean, noisy, result.scores, result.probabilities if own else result.scores)
        aux, balance = self._fused_loss(scored, result.threshold, routing, parts)
        demand, kept, dropped = result.totals.split([num_experts, num_experts, 1])
        stats = RoutingStats(demand, kept, dropped.view(()), result.entropy, balance)
        return Routed(x, routing, aux, stats)

    def _fused_loss(
        self, scored: Scored, threshold: Tensor, routing: Routing, parts: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Returns the weighted losses and the balance loss, by the operator where the device has it."""
        config = self.config
        if not moe_balance.available(scored.clean):
            balance = self._balance(scored, routing, parts, None, False)
            aux = balance * config.aux_loss_weight
            if config.z_loss_weight:
                aux = aux + losses.z_loss(scored.clean) * config.z_loss_weight
            return aux, balance.detach()
        kind = config.balance_loss
        if kind == "gshard" and config.scores == "sigmoid":
            kind = "gshard of shares"
        size = max(scored.clean.shape[0], 1) if config.balance_scope == "global" else max(parts[0][1], 1)
        return moe_balance.auxiliary_loss(
            scored.probabilities, threshold, routing.expert, kind=kind,
            noise_std=config.gate_noise / config.num_experts, weight=config.aux_loss_weight, group_size=size,
            logits=scored.clean if config.z_loss_weight else None, z_weight=config.z_loss_weight,
        )  # fmt: skip

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

    def _options(self, scores: Tensor, bias: Tensor | None) -> dict[str, Any]:
        config = self.config
        return {
            "top_k": config.top_k,
            "batch_prioritized": config.batch_prioritized,
            "normalize_gate": config.normalize_gate,
            "scores": scores,
            "bias": bias,
            "expert_groups": config.expert_groups,
            "group_limit": config.group_limit or config.expert_groups,
        }

    def _route_parts(
        self, scored: Scored, bias: Tensor | None, parts: list[tuple[int, int]], training: bool
    ) -> Routing:
        routings = []
        for scores, logits, (_, size) in zip(_cut(scored.scores, parts), _cut(scored.noisy, parts), parts):
            capacity = self._capacity(size, training=training)
            if self.config.choice == "expert":
                routings.append(route_by_expert(scores, capacity=capacity, group_size=size))
            else:
                options = self._options(scores, bias)
                routings.append(route(logits, capacity=capacity, group_size=size, **options))
        return join(routings)

    def _balance(
        self,
        scored: Scored,
        routing: Routing,
        parts: list[tuple[int, int]],
        demand: GroupDemand | None,
        training: bool,
    ) -> Tensor:
        """Returns the balance loss without its weight: a mean over tokens of the groups' losses.

        Over ranks it has the same value on all of them, and weights that sum to one weigh it later (the task weighs a
        rank by its images), so it counts once.
        """
        config, num_tokens = self.config, scored.clean.shape[0]
        if config.balance_loss == "none":
            return scored.clean.new_zeros(())
        exchange = self.balance_exchange if config.balance_scope == "global" else self.exchange
        if exchange is not None and training:
            return self._balance_across(exchange, scored, routing, demand)
        if config.balance_scope == "global":
            parts = [(num_tokens, max(num_tokens, 1))]
        if config.balance_loss == "gshard":
            inputs = [_cut(value, parts) for value in (scored.scores, routing.expert[:, 0])]
            options = {"shares": config.scores == "sigmoid"}
            groups = [losses.gshard(*part, group_size=size, **options) for *part, (_, size) in zip(*inputs, parts)]
        else:
            inputs = [_cut(value, parts) for value in (scored.probabilities, _threshold(scored, routing))]
            options = {"noise_std": config.gate_noise / config.num_experts}
            groups = [losses.load_importance(*p, group_size=size, **options) for *p, (_, size) in zip(*inputs, parts)]
        weighted = [loss * (part.shape[0] / max(num_tokens, 1)) for loss, part in zip(groups, inputs[0])]
        return sum(weighted[1:], weighted[0])

    def _balance_across(
        self, exchange: GroupExchange, scored: Scored, routing: Routing, demand: GroupDemand | None
    ) -> Tensor:
        """Returns the balance loss of all tokens of the ranks of the exchange as one group."""
        config, num_tokens = self.config, scored.clean.shape[0]
        if config.balance_loss == "gshard":
            if config.balance_scope == "group":
                first_GE = demand.count_RkE[:, :1].sum(dim=0)
            else:
                own = losses.count_first(routing.expert[:, 0], config.num_experts, max(num_tokens, 1))
                first_GE = exchange.gather(own.sum(dim=0)).sum(dim=0, keepdim=True)
            own = losses.score_sums(scored.scores, max(num_tokens, 1), shares=config.scores == "sigmoid")
            return losses.gshard_of_sums(exchange.sum(own), first_GE)
        std = config.gate_noise / config.num_experts
        load = losses.load_of(
            scored.probabilities, _threshold(scored, routing), noise_std=std, group_size=max(num_tokens, 1)
        )
        sums = exchange.sum(torch.stack([scored.probabilities.sum(dim=0), load[0]]))
        return losses.load_importance_of_sums(sums[:1], sums[1:])


def _threshold(scored: Scored, routing: Routing) -> Tensor:
    """Returns (T,), the noisy logit of every token's last choice."""
    return pick(scored.noisy, routing.expert[:, -1:]).squeeze(1)


def group_parts(num_tokens: int, group_size: int) -> list[tuple[int, int]]:
    """Returns (tokens, group size) of the full routing groups and, where tokens are left over, of the smaller last one.

    A smaller group occurs in the last, uneven batch of an epoch or an evaluation; it competes for its own share of
    slots.
    """
    group_size = max(group_size if group_size <= num_tokens else num_tokens, 1)  # no min: of symbols it is never simple
    rest = num_tokens % group_size
    return [(num_tokens - rest, group_size), (rest, rest)] if rest else [(num_tokens, group_size)]


def _cut(value: Tensor, parts: list[tuple[int, int]]) -> Sequence[Tensor]:
    """Returns the rows of every part; `value` itself where it is one, for a view would have a gradient of its own."""
    return [value] if len(parts) == 1 else value.split([count for count, _ in parts])


@torch.no_grad()
def _statistics(routing: Routing, scored: Scored, aux: Tensor) -> RoutingStats:
    demand, kept = routing.demand.sum(dim=0), routing.kept.sum(dim=0)
    if scored.probabilities is None:
        entropy = losses.mean_entropy(scored.clean, logits=True)
    else:
        entropy = losses.mean_entropy(scored.probabilities)
    return RoutingStats(demand, kept, (demand - kept).sum(), entropy, aux.detach())
