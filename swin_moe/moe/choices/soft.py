"""Soft MoE (Puigcerver et al., "From Sparse to Soft Mixtures of Experts", arXiv:2308.00951).

An expert does not take tokens but slots, each a mean of all tokens of one image, weighted by a softmax over them; a
token gets a mean of all slots of its image back, weighted by a softmax over those. Nothing is chosen, so nothing is
dropped and no loss balances. For the dispatcher a slot is a token whose one expert is fixed.

Shape legend: B images, L tokens per image, T = B * L, D channels, E experts, P slots per expert and image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swin_moe.moe.choices.base import Assigned, Batch, Choice, Routed
from swin_moe.moe.routing import Routing
from swin_moe.moe.scored import Scored
from swin_moe.randomness import RandomContext


class SoftChoice(Choice):
    """Every expert takes slots, means of all tokens of an image."""

    def assign(self, batch: Batch, scored: Scored, bias: Tensor | None) -> Assigned:
        """Returns the routing of the slots, each to its own expert."""
        config, num_images = self.config, batch.x.shape[0] // max(batch.tokens_per_image, 1)
        routing = route_slots(num_images, config.num_experts, config.slots, like=scored.noisy)
        return Assigned(routing, [(batch.x.shape[0], max(batch.x.shape[0], 1))])

    def pairs(self, routing: Routing, random: RandomContext, token: Tensor) -> Tensor:
        """Returns (B * E * P, 1), the number of the image's slot."""
        slots = self.config.num_experts * self.config.slots
        return (random.sample[:, None] * slots + torch.arange(slots, device=token.device)).view(-1, 1)

    def finish(self, batch: Batch, clean: Tensor, noisy: Tensor, bias: Tensor | None) -> Routed:
        """Returns the slots as rows, and how tokens get means of their results back."""
        mix = SoftMix.of(noisy.view(-1, batch.tokens_per_image, noisy.shape[1]))
        routed = super().finish(batch, clean, noisy, bias)
        return MixedRows(mix.slots(batch.x), routed.routing, routed.aux, routed.stats, mix)


@dataclass(frozen=True)
class SoftMix:
    """The weights of one batch, from logits (B, L, E * P): the paper's X Phi, section 2.1."""

    dispatch: Tensor  # (B, L, E * P), sums to 1 over the tokens of an image
    combine: Tensor  # (B, L, E * P), sums to 1 over slots

    @classmethod
    def of(cls, logits: Tensor) -> "SoftMix":
        """Returns both softmaxes of the logits (B, L, E * P)."""
        return cls(torch.softmax(logits, dim=1), torch.softmax(logits, dim=2))

    def slots(self, x: Tensor) -> Tensor:
        """Returns (B * E * P, D), the inputs of the slots, from x (T, D) in the weights' dtype."""
        x_BLD = x.view(*self.dispatch.shape[:2], x.shape[1]).to(self.dispatch.dtype)
        return (self.dispatch.transpose(1, 2) @ x_BLD).flatten(0, 1)

    def tokens(self, y: Tensor) -> Tensor:
        """Returns (T, D) of the experts' results y (B * E * P, D)."""
        batch, _, slots = self.combine.shape
        return (self.combine @ y.view(batch, slots, y.shape[1]).to(self.combine.dtype)).flatten(0, 1)


@dataclass(frozen=True)
class MixedRows(Routed):
    """What a layer has to do with slots."""

    mix: SoftMix

    def restore(self, y: Tensor) -> Tensor:
        """Returns (T, D), every token's mean of the slots' results y."""
        return self.mix.tokens(y)


def route_slots(num_images: int, num_experts: int, slots_per_expert: int, *, like: Tensor) -> Routing:
    """Returns the routing of B * E * P slots, every one to its own expert with gate 1; device and dtype of `like`."""
    per_image = num_experts * slots_per_expert
    number = torch.arange(per_image, device=like.device)
    image = torch.arange(num_images, device=like.device)
    expert = (number // slots_per_expert).expand(num_images, -1).reshape(-1, 1)
    slot = (image[:, None] * slots_per_expert + number % slots_per_expert).view(-1, 1)
    demand = expert.new_full((1, num_experts), num_images * slots_per_expert)
    return Routing(
        expert=expert,
        slot=slot,
        gate=like.new_ones(expert.shape),
        keep=torch.ones_like(expert, dtype=torch.bool),
        capacity=num_images * slots_per_expert,
        demand=demand,
        kept=demand,
        group_size=max(num_images * per_image, 1),
    )
