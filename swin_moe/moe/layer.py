"""The Mixture-of-Experts layer: router -> dispatcher -> experts -> combine.

Facts matched to the official Swin-MoE on Tutel (microsoft/Swin-Transformer models/swin_transformer_moe.py:MoEMlp,
microsoft/Tutel tutel/impls/moe_layer.py). The output is sum_k gate_k * expert_k(x); a dropped pair adds nothing.

Shape legend: B images, L tokens per image, T = B * L, D channels, E experts, k choices per token.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swin_moe.config import MoEConfig
from swin_moe.moe import losses
from swin_moe.moe.dispatch import Dispatcher, LocalDispatcher
from swin_moe.moe.experts import Dropout, GroupedExperts
from swin_moe.moe.group_exchange import GroupExchange, route_across
from swin_moe.moe.phases import PhaseClock, mark
from swin_moe.moe.router import CosineRouter, LinearRouter, Routing, expert_capacity, join, route
from swin_moe.randomness import RandomContext, derive_key, normal

_ROUTER_WORD = -1  # stands where experts have their number, so that a router never shares an expert's numbers


@dataclass(frozen=True)
class RoutingStats:
    """What the last forward did with this rank's tokens. Detached; nothing waits for the device."""

    demand: Tensor  # (E,) int64, pairs that chose each expert
    kept: Tensor  # (E,) int64, those that got a slot
    dropped: Tensor  # scalar int64, pairs without a slot
    entropy: Tensor  # scalar, mean over tokens of the router's entropy in nats, without noise; 0 for no tokens
    aux: Tensor  # scalar, unweighted balance loss


class MoELayer(nn.Module):
    """E feed-forward networks of which each token visits k.

    Args:
        dim: D. hidden_dim: Hidden channels of one expert.
        fc2_bias: False = second bias is frozen at zero.
        layer: Number of the block in the network; every random draw depends on it.
        init_std: Standard deviation of initial weights.
    """

    def __init__(
        self, dim: int, hidden_dim: int, config: MoEConfig, *, fc2_bias: bool, layer: int, init_std: float
    ) -> None:
        super().__init__()
        self.config, self.layer, self.init_std = config, layer, init_std
        if config.router == "cosine":
            cosine = {"projection_dim": config.cosine_dim, "init_t": config.cosine_init_t}
            self.router = CosineRouter(dim, config.num_experts, **cosine)
        else:
            self.router = LinearRouter(dim, config.num_experts)
        self.experts = GroupedExperts(dim, hidden_dim, config.num_experts, fc2_bias=fc2_bias)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.group_exchange: GroupExchange | None = None  # set where a routing group of training spans ranks
        self.stats: RoutingStats | None = None
        self.observer: Callable[[Routing], None] | None = None  # sees the routing of every forward
        self.clock: PhaseClock | None = None  # measures forward and backward while it is set

    def forward(self, x_BLD: Tensor, random: RandomContext | None = None) -> tuple[Tensor, Tensor]:
        """Returns (y of x's shape and dtype, unweighted balance loss).

        random: What training draws from; None in training makes a fresh one. Evaluation draws nothing.
        """
        batch, num_tokens, dim = x_BLD.shape
        x = mark(x_BLD.reshape(batch * num_tokens, dim), self.clock, forward="", backward="route")
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        if not self.training:
            random = None
        elif random is None:
            random = RandomContext.fresh(batch, x.device)
        token = None
        if random is not None:
            token = (random.sample[:, None] * num_tokens + torch.arange(num_tokens, device=x.device)).flatten()
        with torch.autocast(device_type, enabled=False):
            routing, aux = self._route(x, num_tokens, random, token)
            if self.observer is not None:
                self.observer(routing)
            # Cast before the rows travel: half the bytes between ranks.
            rows = mark(x.to(dtype), self.clock, forward="route", backward="dispatch")
            pair = dropout = None
            if random is not None and self.config.dropout > 0:
                pair = token[:, None] * self.config.top_k + torch.arange(self.config.top_k, device=x.device)
            dispatched = self.dispatcher.dispatch(rows, routing, pair)
            tokens = mark(dispatched.tokens, self.clock, forward="dispatch", backward="experts")
            if pair is not None:
                dropout = Dropout(self.config.dropout, random.key("expert_dropout", self.layer), dispatched.pair)
            y = self.experts(tokens, dispatched.counts, dropout, dispatched.chunks)
            y = mark(y, self.clock, forward="experts", backward="combine")
            y = self.dispatcher.combine(y, dispatched, routing.gate)
        return mark(y.to(x.dtype), self.clock, forward="combine", backward="").view(x_BLD.shape), aux

    def _route(
        self, x: Tensor, tokens_per_image: int, random: RandomContext | None, token: Tensor | None
    ) -> tuple[Routing, Tensor]:
        """Returns the routing of x (T, D) and the balance loss; updates the statistics."""
        config, noise_std = self.config, self.config.gate_noise / self.config.num_experts
        clean = self.router(x)
        noisy = clean
        if random is not None and config.gate_noise > 0:
            noise = normal(random.key("gate_noise", self.layer), token, config.num_experts)
            noisy = clean + noise_std * noise.to(clean.dtype)
        scores = torch.softmax(noisy, dim=1)
        probabilities = scores if noisy is clean else torch.softmax(clean, dim=1)
        if self.group_exchange is not None and self.training:
            routing, aux = self._route_across(self.group_exchange, noisy, scores, probabilities, noise_std)
            self.stats = _statistics(routing, probabilities, aux)
            return routing, aux
        group = x.shape[0] if config.capacity_scope == "rank" else config.group_images * tokens_per_image
        routings, parts = [], []
        for part, size in group_slices(x.shape[0], group):
            routing = self._route_groups(noisy[part], scores[part], size)
            if config.balance_loss == "gshard":
                aux = losses.gshard(scores[part], routing.expert[:, 0], group_size=size)
            else:
                threshold = noisy[part].gather(1, routing.expert[:, -1:]).squeeze(1)
                aux = losses.load_importance(probabilities[part], threshold, noise_std=noise_std, group_size=size)
            routings.append(routing)
            parts.append(aux * (len(noisy[part]) / max(len(noisy), 1)))  # a mean over tokens
        routing, aux = join(routings), sum(parts[1:], parts[0])
        self.stats = _statistics(routing, probabilities, aux)
        return routing, aux

    def _capacity(self, group_size: int) -> int | None:
        config, factor = self.config, self.config.capacity_factor
        if not self.training and config.eval_capacity_factor is not None:
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

    def _route_groups(self, noisy: Tensor, scores: Tensor, group_size: int) -> Routing:
        config = self.config
        return route(
            noisy,
            top_k=config.top_k,
            capacity=self._capacity(group_size),
            group_size=group_size,
            batch_prioritized=config.batch_prioritized,
            normalize_gate=config.normalize_gate,
            scores=scores,
        )

    def init_weights(self, seed: int, name: str) -> None:
        """Fills all weights as a function of (seed, name, global expert number); `name` is the layer's in the net."""
        generator = torch.Generator().manual_seed(derive_key(seed, zlib.crc32(name.encode()), _ROUTER_WORD))
        self.router.init_weights(generator, self.init_std)
        self.experts.init_weights(seed, name, self.init_std)


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
