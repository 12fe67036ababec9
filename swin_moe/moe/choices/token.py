"""Tokens choose experts: the k with the highest scores (Shazeer et al., arXiv:1701.06538; Swin-MoE, arXiv:2206.03382).

Shape legend: T tokens, E experts, k choices per token, G routing groups.
"""

from typing import Any

import torch
from torch import Tensor

from swin_moe.moe.balance import cut
from swin_moe.moe.choices.base import Assigned, Batch, Choice, Routed, RoutingStats
from swin_moe.moe.routing import Routing, join, route
from swin_moe.moe.routing_groups import route_across
from swin_moe.moe.scored import Scored
from swin_moe.ops.moe import moe_balance, moe_layer, moe_route
from swin_moe.randomness import RandomContext


class TokenChoice(Choice):
    """Every token goes to its top_k experts, as far as these have slots for its routing group."""

    def assign(self, batch: Batch, scored: Scored, bias: Tensor | None) -> Assigned:
        """Returns the routing of every routing group; where a group spans ranks, they decide together."""
        options = self._options(bias)
        if self.exchange is not None and batch.training:
            # The ranks of the group decide together, each for its own tokens.
            routing, demand = route_across(
                scored.noisy, self.exchange, capacity=self.capacity, scores=scored.scores, **options
            )
            return Assigned(routing, [(batch.x.shape[0], max(batch.x.shape[0], 1))], demand=demand)
        parts = self.parts(batch)
        routings = [
            route(
                logits,
                capacity=self.capacity(size, training=batch.training),
                group_size=size,
                scores=scores,
                **options,
            )
            for scores, logits, (_, size) in zip(cut(scored.scores, parts), cut(scored.noisy, parts), parts)
        ]
        return Assigned(join(routings), parts)

    def draws(self) -> bool:
        """Returns whether there is noise or dropout; a subclass may draw more."""
        return self.config.gate_noise > 0 or self.config.dropout > 0 or type(self) is not TokenChoice

    def pairs(self, routing: Routing, random: RandomContext, token: Tensor) -> Tensor:
        """Returns (T, k), the number of the token's choice."""
        top_k = self.config.top_k
        return token[:, None] * top_k + torch.arange(top_k, device=token.device)

    def finish(self, batch: Batch, clean: Tensor, noisy: Tensor, bias: Tensor | None) -> Routed:
        """Returns what to do, by the compiled operator where it covers the options."""
        if batch.counts is None and self._is_fused(clean, batch.training):
            return self._finish_fused(batch, clean, noisy, bias)
        return super().finish(batch, clean, noisy, bias)

    def _options(self, bias: Tensor | None) -> dict[str, Any]:
        config = self.config
        return {
            "top_k": config.top_k,
            "batch_prioritized": config.batch_prioritized,
            "normalize_gate": config.normalize_gate,
            "bias": bias,
            "expert_groups": config.expert_groups,
            "group_limit": config.group_limit or config.expert_groups,
        }

    def _is_fused(self, clean: Tensor, training: bool) -> bool:
        """Returns whether the compiled operator covers the options; if not, the Python form does what it would."""
        return self._covers(training) and moe_route.available(clean)

    def _covers(self, training: bool) -> bool:
        config = self.config
        limited = 0 < config.group_limit < config.expert_groups
        return not limited and not (training and (self.exchange is not None or self.balance_exchange is not None))

    def at_once(
        self, x: Tensor, *, tokens_per_image: int, training: bool, draws: bool
    ) -> tuple[moe_layer.Slots, moe_layer.Options] | None:
        """Returns how x (T, D) is routed by moe_layer.moe_layer; None where that does not cover the options."""
        if type(self) is not TokenChoice or not self._covers(training):
            return None
        config, parts = self.config, self.parts(Batch(x, tokens_per_image, training))
        capacities = [self.capacity(size, training=training) for _, size in parts]
        size = max(parts[0][1], 1)
        slots = moe_layer.Slots(config.top_k, size, capacities[0], capacities[-1], config.batch_prioritized)
        std = config.gate_noise / config.num_experts
        options = moe_layer.Options(
            layer=self.layer,
            noise=std if draws else 0.0,
            drop=config.dropout if draws else 0.0,
            sigmoid=config.scores == "sigmoid",
            normalize=config.normalize_gate,
            kind=self._balanced(),
            noise_std=std,
            balance_group=max(x.shape[0], 1) if config.balance_scope == "global" else size,
            weight=config.aux_loss_weight,
            z_weight=config.z_loss_weight,
        )
        return slots, options

    def _balanced(self) -> str:
        """Returns what the balance loss is of, a key of moe_balance.KINDS."""
        of_shares = self.config.balance_loss == "gshard" and self.config.scores == "sigmoid"
        return "gshard of shares" if of_shares else self.config.balance_loss

    def _finish_fused(self, batch: Batch, clean: Tensor, noisy: Tensor, bias: Tensor | None) -> Routed:
        config, num_experts = self.config, clean.shape[1]
        parts = self.parts(batch)
        capacities = [self.capacity(size, training=batch.training) for _, size in parts]
        noise = None if noisy is clean else noisy
        own = config.balance_loss == "load_importance" and noise is not None  # else they are the scores
        result = moe_route.route_tokens(
            clean,
            noise,
            bias=bias,
            top_k=config.top_k,
            group_size=max(parts[0][1], 1),
            capacity=capacities[0],
            last_capacity=capacities[-1],
            sigmoid=config.scores == "sigmoid",
            normalize=config.normalize_gate,
            prioritized=config.batch_prioritized,
            probabilities=own,
        )
        known = [capacity for capacity in capacities if capacity is not None]
        capacity = max(known) if known else None
        columns = {name: getattr(result, name) for name in ("expert", "slot", "gate", "keep", "demand", "kept")}
        routing = Routing(capacity=capacity, group_size=max(parts[0][1], 1), **columns)
        scored = Scored(clean, noisy, result.scores, result.probabilities if own else result.scores)
        aux, balance = self._fused_loss(scored, result.threshold, Assigned(routing, parts))
        demand, kept, dropped = result.totals.split([num_experts, num_experts, 1])
        stats = RoutingStats(demand, kept, dropped.view(()), result.entropy, balance)
        return Routed(batch.x, routing, aux, stats)

    def _fused_loss(self, scored: Scored, threshold: Tensor, assigned: Assigned) -> tuple[Tensor, Tensor]:
        """Returns the weighted losses and the balance loss, by the operator where the device has it."""
        config, parts = self.config, assigned.parts
        if not moe_balance.available(scored.clean):
            balance, aux = self.losses(scored, assigned, training=False)
            return aux, balance.detach()
        size = max(scored.clean.shape[0], 1) if config.balance_scope == "global" else max(parts[0][1], 1)
        return moe_balance.auxiliary_loss(
            scored.softmax,
            threshold,
            assigned.routing.expert,
            kind=self._balanced(),
            noise_std=config.gate_noise / config.num_experts,
            weight=config.aux_loss_weight,
            group_size=size,
            logits=scored.clean if config.z_loss_weight else None,
            z_weight=config.z_loss_weight,
        )
