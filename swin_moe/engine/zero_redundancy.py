"""ZeRO-1: every rank has all dense parameters and gradients, but updates, and keeps optimizer state for, only some.

A library's optimizer deals whole parameters out, dense ones over the world, experts over the ranks that hold the same
experts; after its step each rank broadcasts what it updated. Updates are bit-identical to ZeRO-0: the same gradients,
the same arithmetic, on another rank.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from swin_moe.config import OptimConfig
from swin_moe.engine.replicated import Optimizers, ReplicatedEngine
from swin_moe.optim import build_optimizer, optimizer_class
from swin_moe.parallel.groups import Groups
from swin_moe.parallel.sharding import placement


def dealt_out(share: Callable[..., torch.optim.Optimizer], *, ranks_as: str) -> Optimizers:
    """Returns what builds an optimizer of dense parameters and one of experts, each by a library's class.

    share: Called as share(parameter groups, class of the optimizer of a share, ranks_as=ProcessGroup, its options).
    """

    def build(config: OptimConfig, param_groups: list[dict], groups: Groups) -> list[torch.optim.Optimizer]:
        optimizers = []
        for is_expert, ranks in ((False, groups.world), (True, groups.expert_data)):
            chosen = _chosen(param_groups, is_expert=is_expert)
            if chosen and ranks is None:  # a rank by itself
                optimizers.append(build_optimizer(config, chosen))
            elif chosen and ranks is not None:
                kind, options = optimizer_class(config)
                optimizers.append(share(chosen, kind, **{ranks_as: ranks}, **options))
        return optimizers

    return build


def _chosen(param_groups: list[dict], *, is_expert: bool) -> list[dict]:
    """Returns the groups with just the dense or just the expert parameters, empty ones left out."""
    chosen = []
    for group in param_groups:
        params = [p for n, p in zip(group["names"], group["params"]) if placement(n).is_expert == is_expert]
        if params:
            chosen.append({"params": params, "weight_decay": group["weight_decay"], "lr_scale": group["lr_scale"]})
    return chosen


zero_redundancy_engine = partial(
    ReplicatedEngine, optimizers=dealt_out(ZeroRedundancyOptimizer, ranks_as="process_group")
)
