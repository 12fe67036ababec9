"""What every routing choice has in common: Choice, whose subclasses say who goes where, and what a layer gets from it.

Shape legend: B images, L tokens per image, T = B * L, D channels, E experts (with soft MoE: slots of an image), k
choices per token, G routing groups, R rows to dispatch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe import losses
from swin_moe.moe.balance import balance_loss, balance_loss_across, cut
from swin_moe.moe.routers import Router
from swin_moe.moe.routing import Routing, expert_capacity, group_parts, image_shares, uneven_parts
from swin_moe.moe.routing_groups import GroupDemand, GroupExchange
from swin_moe.moe.scored import Scored, with_noise
from swin_moe.ops.moe import moe_layer
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
class Routed:
    """What a layer has to do with a batch."""

    rows: Tensor  # (R, D) to dispatch: the tokens, or the slots of soft MoE
    routing: Routing  # of the rows
    aux: Tensor  # scalar, auxiliary losses times their weights
    stats: RoutingStats

    def restore(self, y: Tensor) -> Tensor:
        """Returns (T, D), the layer's output, of what was combined for the rows."""
        return y


class Batch(NamedTuple):
    """The tokens of whole images, as a choice sees them."""

    x: Tensor  # (T, D)
    tokens_per_image: int
    training: bool
    counts: tuple[int, ...] | None = None  # tokens of each image, where images have unequally many


class Assigned(NamedTuple):
    """Who goes where."""

    routing: Routing
    parts: list[tuple[int, int]]  # (tokens, group size), as of routing.group_parts
    shares: list[float] | None = None  # of each part in the mean of the losses; None = by its tokens
    demand: GroupDemand | None = None  # of all ranks of a routing group that spans several


class Choice:
    """The rule by which a layer's logits become a routing and a loss. Has no parameters: those are the router's.

    A subclass gives assign and pairs; what it means to a config, and where it stands, is a row of
    config.choices.CHOICES.

    Args:
        layer: Number of the block in the network; the noise depends on it.
    """

    def __init__(self, config: MoEConfig, layer: int) -> None:
        self.config, self.layer = config, layer
        self.exchange: GroupExchange | None = None  # set where a routing group of training spans ranks
        self.balance_exchange: GroupExchange | None = None  # set where the balance loss of training does

    def assign(self, batch: Batch, scored: Scored, bias: Tensor | None) -> Assigned:
        """Returns who goes where. bias: (E,) of each expert, which changes who is chosen; None = 0."""
        raise NotImplementedError

    def at_once(
        self, x: Tensor, *, tokens_per_image: int, training: bool, draws: bool
    ) -> tuple[moe_layer.Slots, moe_layer.Options] | None:
        """Returns how x (T, D) is routed by moe_layer.moe_layer; None where that does not cover the rule."""
        return None

    def draws(self) -> bool:
        """Returns whether a forward in training draws anything: noise, or which hidden units are dropped."""
        return True

    def pairs(self, routing: Routing, random: RandomContext, token: Tensor) -> Tensor:
        """Returns (R, k) int64, a number for every pair that no layout of the run changes.

        token: (T,) the global index of every token.
        """
        raise NotImplementedError

    def route(
        self,
        x: Tensor,
        router: Router,
        *,
        tokens_per_image: int,
        training: bool,
        random: RandomContext | None,
        token: Tensor | None,
        counts: tuple[int, ...] | None = None,
    ) -> Routed:
        """Returns what to do with the tokens x (T, D) of whole images. To be called outside autocast.

        Args:
            counts: Tokens of each image, where padding was left out; None = all have tokens_per_image.
            random, token: What noise is drawn from, and the (T,) global index of every token; None = no noise.
        """
        clean = router(x)
        noisy = self.add_noise(clean, random, token)
        # Once, however many parts follow: where an engine gathers parameters per module this is a collective.
        bias = None if router.balance is None else router.balance()
        return self.finish(Batch(x, tokens_per_image, training, counts), clean, noisy, bias)

    def finish(self, batch: Batch, clean: Tensor, noisy: Tensor, bias: Tensor | None) -> Routed:
        """Returns what to do, of the logits (T, E) without and with noise."""
        scored = Scored.of(self.config, clean, noisy)
        assigned = self.assign(batch, scored, bias)
        if batch.counts is not None and (images := self.group_images(training=batch.training)):
            # By images, as a task weighs ranks, whose images have unequally many tokens.
            assigned = assigned._replace(shares=image_shares(batch.counts, images))
        balance, aux = self.losses(scored, assigned, training=batch.training)
        stats = statistics(assigned.routing, scored, balance)
        return Routed(batch.x, assigned.routing, aux, stats)

    def add_noise(self, clean: Tensor, random: RandomContext | None, token: Tensor | None) -> Tensor:
        """Returns the logits (T, E) with model.moe.gate_noise."""
        return with_noise(self.config, self.layer, clean, random, token)

    def group_size(self, num_tokens: int, tokens_per_image: int, *, training: bool) -> int:
        """Returns the tokens of a full routing group."""
        return num_tokens if self.config.capacity_scope == "rank" else self.config.group_images * tokens_per_image

    def group_images(self, *, training: bool) -> int:
        """Returns the images of a routing group; 0 = all of the rank's micro-batch."""
        return 0 if self.config.capacity_scope == "rank" else self.config.group_images

    def parts(self, batch: Batch) -> list[tuple[int, int]]:
        """Returns (tokens, group size) of the batch's routing groups, see routing.group_parts."""
        num_tokens = batch.x.shape[0]
        if batch.counts is not None and (images := self.group_images(training=batch.training)):
            return uneven_parts(batch.counts, images)
        size = self.group_size(num_tokens, batch.tokens_per_image, training=batch.training)
        return group_parts(num_tokens, size)

    def capacity(self, group_size: int, *, training: bool = True) -> int | None:
        """Returns the slots of one expert in a routing group of this many tokens; None = by need."""
        return self.capacity_of(group_size, self.config.capacity_factor if training else self.config.eval_factor)

    def capacity_of(self, group_size: int, factor: float) -> int | None:
        """Returns the slots of one expert for a capacity factor, see routing.expert_capacity."""
        return expert_capacity(group_size, self.config.num_experts, top_k=self.config.top_k, factor=factor)

    def losses(self, scored: Scored, assigned: Assigned, *, training: bool) -> tuple[Tensor, Tensor]:
        """Returns (the balance loss without its weight, all auxiliary losses times their weights), scalars."""
        config = self.config
        exchange = self.balance_exchange if config.balance_scope == "global" else self.exchange
        if config.balance_loss != "none" and exchange is not None and training:
            balance = balance_loss_across(config, exchange, scored, assigned.routing, assigned.demand)
        else:
            balance = balance_loss(config, scored, assigned.routing, assigned.parts, assigned.shares)
        aux = balance * config.aux_loss_weight
        if config.z_loss_weight:
            aux = aux + self._z_loss(scored.clean, assigned) * config.z_loss_weight
        return balance, aux

    def _z_loss(self, clean: Tensor, assigned: Assigned) -> Tensor:
        if assigned.shares is None:
            return losses.z_loss(clean)
        found = [losses.z_loss(part) * share for part, share in zip(cut(clean, assigned.parts), assigned.shares)]
        return torch.stack(found).sum()


@torch.no_grad()
def statistics(routing: Routing, scored: Scored, balance: Tensor) -> RoutingStats:
    """Returns what a forward did, of its routing, logits and unweighted balance loss."""
    demand, kept = routing.demand.sum(dim=0), routing.kept.sum(dim=0)
    if scored.probabilities is None:
        entropy = losses.mean_entropy(scored.clean, logits=True)
    else:
        entropy = losses.mean_entropy(scored.probabilities)
    return RoutingStats(demand, kept, (demand - kept).sum(), entropy, balance.detach())
