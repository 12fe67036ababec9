"""ZeRO-1: every rank has all dense parameters and gradients, but updates, and keeps optimizer state for, only some.

torch's ZeroRedundancyOptimizer deals whole parameters out, dense ones over the world, experts over the ranks that hold
the same experts; after its step each rank broadcasts what it updated.
"""

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.optim import ZeroRedundancyOptimizer

from swin_moe.engine.replicated import ReplicatedEngine
from swin_moe.optim import build_optimizer, optimizer_class
from swin_moe.parallel.sharding import placement


class ZeroRedundancyEngine(ReplicatedEngine):
    """Updates are bit-identical to ZeRO-0: the same gradients, the same arithmetic, on another rank."""

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """See StepEngine."""
        dense, experts = self._split(is_expert=False), self._split(is_expert=True)
        found = [self._share_out(dense, self.groups.world), self._share_out(experts, self.groups.expert_data)]
        return [optimizer for optimizer in found if optimizer is not None]

    def _split(self, *, is_expert: bool) -> list[dict]:
        """Returns param_groups with just the dense or just the expert parameters, empty groups left out."""
        groups = []
        for group in self.param_groups:
            chosen = [p for n, p in zip(group["names"], group["params"]) if placement(n).is_expert == is_expert]
            if chosen:
                groups.append({"params": chosen, "weight_decay": group["weight_decay"], "lr_scale": group["lr_scale"]})
        return groups

    def _share_out(self, groups: list[dict], ranks: ProcessGroup | None) -> torch.optim.Optimizer | None:
        """Returns an optimizer of these groups over `ranks`; a plain one for None, a rank by itself."""
        if not groups or ranks is None:
            return build_optimizer(self.config.optim, groups) if groups else None
        kind, options = optimizer_class(self.config.optim)
        return ZeroRedundancyOptimizer(groups, kind, process_group=ranks, **options)

    def state_of(self, leaf: nn.Parameter) -> dict | None:
        """See StepEngine."""
        return self._state[leaf]

    def _allocate_state(self) -> None:
        self._state: dict[nn.Parameter, dict | None] = {part.leaf: None for part in self.trainable}
        for optimizer in self.optimizers:
            local = getattr(optimizer, "optim", optimizer)  # of a wrapper: the optimizer of this rank's share
            for group in local.param_groups:
                for leaf in group["params"]:
                    self._state[leaf] = local.state[leaf]
        super()._allocate_state()
