"""The balance loss of a layer, without its weight: of the routing groups of this rank, or of all ranks' tokens as one.

Formulas are losses.py's; here is over which tokens they go. Shapes: T tokens, E experts, k choices, G routing groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe import losses
from swin_moe.moe.routing import Routing
from swin_moe.moe.routing_groups import GroupDemand, GroupExchange
from swin_moe.moe.scored import Scored


def balance_loss(
    config: MoEConfig,
    scored: Scored,
    routing: Routing,
    parts: list[tuple[int, int]],
    weights: list[float] | None = None,
) -> Tensor:
    """Returns the balance loss of this rank's tokens: a mean of the groups' losses.

    Args:
        parts: (tokens, group size) as of routing.group_parts; with model.moe.balance_scope=global all tokens are one
            group.
        weights: Of each part in the mean; None = by its tokens.
    """
    num_tokens = scored.clean.shape[0]
    if config.balance_loss == "none":
        return scored.clean.new_zeros(())
    if config.balance_scope == "global":
        parts, weights = [(num_tokens, max(num_tokens, 1))], None
    if config.balance_loss == "gshard":
        inputs = [cut(value, parts) for value in (scored.scores, routing.expert[:, 0])]
        shares = config.scores == "sigmoid"
        groups = [losses.gshard(*p, group_size=size, shares=shares) for *p, (_, size) in zip(*inputs, parts)]
    else:
        inputs = [cut(value, parts) for value in (scored.softmax, scored.threshold(routing))]
        std = config.gate_noise / config.num_experts
        groups = [losses.load_importance(*p, group_size=size, noise_std=std) for *p, (_, size) in zip(*inputs, parts)]
    weights = [part.shape[0] / max(num_tokens, 1) for part in inputs[0]] if weights is None else weights
    weighted = [loss * weight for loss, weight in zip(groups, weights, strict=True)]
    return sum(weighted[1:], weighted[0])


def balance_loss_across(
    config: MoEConfig, exchange: GroupExchange, scored: Scored, routing: Routing, demand: GroupDemand | None
) -> Tensor:
    """Returns the balance loss of all tokens of the ranks of the exchange as one group.

    It has the same value on all of them, and weights that sum to one weigh it later (the task weighs a rank by its
    images), so it counts once.
    """
    num_tokens = scored.clean.shape[0]
    if config.balance_loss == "gshard":
        if config.balance_scope == "group":
            assert demand is not None, "a routing group that spans ranks has a common demand"
            first_GE = demand.count_RkE[:, :1].sum(dim=0)
        else:
            own = losses.count_first(routing.expert[:, 0], config.num_experts, max(num_tokens, 1))
            first_GE = exchange.gather(own.sum(dim=0)).sum(dim=0, keepdim=True)
        own = losses.score_sums(scored.scores, max(num_tokens, 1), shares=config.scores == "sigmoid")
        return losses.gshard_of_sums(exchange.sum(own), first_GE)
    std = config.gate_noise / config.num_experts
    load = losses.load_of(scored.softmax, scored.threshold(routing), noise_std=std, group_size=max(num_tokens, 1))
    sums = exchange.sum(torch.stack([scored.softmax.sum(dim=0), load[0]]))
    return losses.load_importance_of_sums(sums[:1], sums[1:])


def cut(value: Tensor, parts: list[tuple[int, int]]) -> Sequence[Tensor]:
    """Returns the rows of every part; `value` itself where it is one, for a view would have a gradient of its own."""
    return [value] if len(parts) == 1 else value.split([count for count, _ in parts])
