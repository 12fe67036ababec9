"""The default engine: torch's own data parallelism and optimizers, one variant per ZeRO stage."""

import logging

import torch

from swin_moe.config import Config
from swin_moe.engine.base import Engine
from swin_moe.models.network import Network
from swin_moe.optim import Schedule
from swin_moe.parallel.groups import Groups
from swin_moe.registry import lookup

LOGGER = logging.getLogger("swin_moe")

VARIANTS = {
    "0": "swin_moe.engine.replicated:ReplicatedEngine",
    "1": "swin_moe.engine.zero_redundancy:zero_redundancy_engine",
    "2": "swin_moe.engine.fully_sharded:FullyShardedEngine",
    "3": "swin_moe.engine.fully_sharded:FullyShardedEngine",
}


def torch_engine(model: Network, *, config: Config, groups: Groups, schedule: Schedule, device: torch.device) -> Engine:
    """Returns the engine of parallel.zero; one rank alone has nothing to shard and gets the replicated one."""
    stage = config.parallel.zero
    if stage and groups.world_size == 1:
        LOGGER.info("parallel.zero=%d has no effect in a world of one rank: there is nobody to share with", stage)
        stage = 0
    variant = lookup(VARIANTS, str(stage), key="parallel.zero")
    return variant(model, config=config, groups=groups, schedule=schedule, device=device)
