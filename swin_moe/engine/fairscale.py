"""FairScale 0.4.13 as it is right on today's torch: OSS (ZeRO-1) and ShardedDDP (ZeRO-2), and nothing else of it.

OSS deals whole parameters out, as torch's ZeroRedundancyOptimizer does: dense ones over the world, experts over the
ranks that hold the same ones. ShardedDDP then sends a dense gradient only to the rank that updates the parameter.
Its own clipping (over all ranks, wrong for experts) and its checkpoint wrapper (drops the auxiliary loss's gradient)
are not used; what else does not work is refused in limits.py.
"""

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed import ProcessGroup

from swin_moe.config import Config
from swin_moe.engine.base import Engine
from swin_moe.engine.common import materialize
from swin_moe.engine.limits import check_engine
from swin_moe.engine.zero_redundancy import ZeroRedundancyEngine
from swin_moe.models.network import Network
from swin_moe.optim import Schedule, build_optimizer, optimizer_class
from swin_moe.parallel.clip import SquareSums, sharded_squares, sum_of_squares
from swin_moe.parallel.expert_reduction import ExpertReduction
from swin_moe.parallel.groups import Groups, ensure_distributed
from swin_moe.parallel.sharding import placement
from swin_moe.registry import require

require("fairscale", "0.4.13")


def fairscale_engine(
    model: Network, *, config: Config, groups: Groups, schedule: Schedule, device: torch.device
) -> Engine:
    """Returns the engine of parallel.zero."""
    check_engine(config, groups.world_size)
    ensure_distributed(device)
    warnings.filterwarnings("ignore", category=FutureWarning, module="fairscale")
    logging.getLogger("fairscale").setLevel(logging.ERROR)
    variant = ShardedGradientEngine if config.parallel.zero == 2 else ShardedOptimizerEngine
    return variant(model, config=config, groups=groups, schedule=schedule, device=device)


class ShardedOptimizerEngine(ZeroRedundancyEngine):
    """OSS: gradients on every rank, optimizer state and updates on one."""

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """See StepEngine. OSS moves parameters into buffers of its own, so their memory is another one afterwards."""
        optimizers = super().build_optimizers()
        self._wrap(optimizers)
        for part in self.parts.values():
            part.local = part.parameter.detach()
        return optimizers

    def _wrap(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Wraps the model where that needs the optimizers."""

    def _share_out(self, groups: list[dict], ranks: ProcessGroup | None) -> torch.optim.Optimizer | None:
        """See ZeroRedundancyEngine."""
        from fairscale.optim.oss import OSS

        if not groups or ranks is None:
            return build_optimizer(self.config.optim, groups) if groups else None
        kind, options = optimizer_class(self.config.optim)
        return OSS(groups, kind, group=ranks, **options)


class ShardedGradientEngine(ShardedOptimizerEngine):
    """OSS with ShardedDDP: a dense gradient is kept by the rank that updates the parameter, by no other."""

    def distribute(self, model: Network) -> nn.Module:
        """See StepEngine. ShardedDDP needs the optimizer, so `_wrap` does it."""
        materialize(model, self.config, self.device)
        self.experts = ExpertReduction(model, self.groups)
        return model

    def _wrap(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """See ShardedOptimizerEngine. Only parameters of the dense optimizer are reduced, experts are left alone."""
        from fairscale.nn.data_parallel import ShardedDataParallel

        if self.groups.world_size == 1:
            return
        self.model = ShardedDataParallel(
            self.local_model,
            optimizers[0],
            process_group=self.groups.world,
            # Nothing is broadcast: initial weights are a function of the seed, and experts differ between ranks.
            sync_models_at_startup=False,
            broadcast_buffers=False,
            # Its buckets are views that keep old gradients once gradients are cleared by setting None: wrong from the
            # second step on (measured 5e-2). Without buckets every gradient is reduced by itself.
            reduce_buffer_size=0,
            auto_refresh_trainable=False,
        )
        self.model.refresh_trainable()  # now, or the first forward moves parameters to yet other buffers

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """See Engine. Backward belongs inside, as with DDP."""
        self.experts.begin(last=last)
        return nullcontext() if last or self.model is self.local_model else self.model.no_sync()

    def reduce(self) -> None:
        """See StepEngine. ShardedDDP has brought dense gradients to their owners, and dropped them elsewhere."""
        self.experts.finish(self.groups.world_size)

    def square_sums(self) -> SquareSums:
        """See StepEngine. Dense gradients are on one rank each; of equal expert gradients the first replica's count."""
        first = self.groups.rank < self.groups.expert_size
        gradients = [
            part.parameter.grad
            for part in self.trainable
            if part.parameter.grad is not None and (first or not placement(part.name).is_expert)
        ]
        return sharded_squares(sum_of_squares(gradients, self.device), self.groups)
