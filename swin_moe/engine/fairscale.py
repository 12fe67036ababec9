"""FairScale 0.4.13 as it is right on today's torch: OSS (ZeRO-1) and ShardedDDP (ZeRO-2), and nothing else of it.

OSS deals whole parameters out, as torch's ZeroRedundancyOptimizer does: dense ones over the world, experts over the
ranks that hold the same ones. ShardedDDP then sends a dense gradient only to the rank that updates the parameter.
Its own clipping (over all ranks, wrong for experts) and its checkpoint wrapper (drops the auxiliary loss's gradient)
are not used; what else does not work is refused in limits.py.
"""

import logging
import warnings

import torch
from torch import nn

from swin_moe.config import Config
from swin_moe.engine.base import Engine
from swin_moe.engine.limits import check_engine
from swin_moe.engine.replicated import ReplicatedEngine
from swin_moe.engine.zero_redundancy import dealt_out
from swin_moe.models.network import Network
from swin_moe.optim import Schedule
from swin_moe.parallel.clip import SquareSums, sharded_squares, sum_of_squares
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
    variant = ShardedGradientEngine if config.parallel.zero == 2 else ReplicatedEngine
    from fairscale.optim.oss import OSS

    optimizers = dealt_out(OSS, ranks_as="group")
    return variant(model, config=config, groups=groups, schedule=schedule, device=device, optimizers=optimizers)


class ShardedGradientEngine(ReplicatedEngine):
    """OSS with ShardedDDP: a dense gradient is kept by the rank that updates the parameter, by no other."""

    def wrap(self, model: Network, optimizers: list[torch.optim.Optimizer]) -> nn.Module:
        """See ReplicatedEngine. Only parameters of the dense optimizer are reduced, experts are left alone."""
        from fairscale.nn.data_parallel import ShardedDataParallel

        if self.groups.world_size == 1:
            return model
        wrapped = ShardedDataParallel(
            model,
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
        wrapped.refresh_trainable()  # now, or the first forward moves parameters to yet other buffers
        return wrapped

    def square_sums(self) -> SquareSums:
        """See StepEngine. Dense gradients are on one rank each; of equal expert gradients the first replica's count."""
        first = self.groups.rank < self.groups.expert_size
        names = [name for name in self.parts.trainable if first or not placement(name).is_expert]
        gradients = [gradient for name in names if (gradient := self.parts[name].gradient) is not None]
        return sharded_squares(sum_of_squares(gradients, self.device), self.groups)
