"""ZeRO-2 and 3: parameters, gradients and optimizer state cut over the ranks that replicate them (torch's FSDP2).

Dense parameters are cut along dim 0 over the world, as torch.chunk cuts; one block is whole at a time (ZeRO-3), or from
its forward to its backward (ZeRO-2). Experts stay out of the dense shards: where ranks hold the same experts they are
cut over just those ranks (expert_data), else they are left as they are.

Chosen from measurement (torch 2.13, gloo): no gradient divide factor (gloo has no PREMUL_SUM, and on one rank it
divides twice), hence FSDP averages over expert_data and `reduce` divides by the rest; no FSDP over a single rank; mixed
precision by autocast, not by FSDP, so that routers and norms see the same numbers as in ZeRO-0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from swin_moe.engine.common import Held, StepEngine, materialize
from swin_moe.engine.parts import Parts
from swin_moe.layout import Chunk
from swin_moe.models.network import Network
from swin_moe.models.swin import Block
from swin_moe.moe.experts import GroupedExperts
from swin_moe.optim import build_optimizer
from swin_moe.parallel.sharding import cut_dim, placement, sub_chunk


class FullyShardedEngine(StepEngine):
    """Every rank updates its shards; gradients arrive by reduce-scatter during backward."""

    parts: Parts

    def prepare(self, model: Network) -> tuple[nn.Module, Held, list[torch.optim.Optimizer]]:
        """See StepEngine."""
        self._shard(model)
        cut = {n: (self.layout[n][0], _cut(p, self.layout[n][1])) for n, p in model.named_parameters()}
        parts = Parts(model, cut, self.config)
        optimizers = [build_optimizer(self.config.optim, parts.param_groups)]
        parts.follow(optimizers)
        return model, parts, optimizers

    def _shard(self, model: Network) -> None:
        """Block by block: allocated, filled, cut, so that the model is never whole on a rank."""
        world = self._mesh(self.groups.world)
        replicas = self._mesh(self.groups.expert_data)
        options: dict[str, Any] = {"mesh": world, "reshard_after_forward": self.config.parallel.zero == 3}
        rest = set(model.modules())
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            inside = set(block.modules())
            materialize(model, self.config, self.device, only=inside)
            self._shard_experts(block, replicas)
            fully_shard(block, **options, ignored_params=_experts(block))
            rest -= inside
        materialize(model, self.config, self.device, only=rest)
        # The root's own parameters are used at both ends of the network: they stay whole from forward to backward.
        fully_shard(model, mesh=world, reshard_after_forward=False, ignored_params=_experts(model))

    def _mesh(self, group: ProcessGroup | None) -> DeviceMesh | None:
        return None if group is None else DeviceMesh.from_group(group, self.device.type)

    def _shard_experts(self, block: nn.Module, replicas: DeviceMesh | None) -> None:
        """Cuts the block's experts over the ranks that hold the same ones."""
        for experts in [m for m in block.modules() if isinstance(m, GroupedExperts)]:
            if replicas is None or not experts.num_local_experts:
                continue
            fully_shard(
                experts,
                mesh=replicas,
                reshard_after_forward=self.config.parallel.zero == 3,
                shard_placement_fn=lambda p: Shard(cut_dim(tuple(p.shape), replicas.size())),
            )

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """See Engine. Before the last micro-batch gradients stay whole on the rank, and in ZeRO-2 parameters too."""
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        if self.config.parallel.zero == 2:
            self.model.set_reshard_after_backward(last)
        yield

    def reduce(self) -> None:
        """See StepEngine. FSDP has averaged over the ranks it cut over: over the world, or over expert_data."""
        found = [self.parts[name].gradient for name in self.parts.trainable if placement(name).is_expert]
        gradients = [gradient for gradient in found if gradient is not None]
        if gradients and self.groups.expert_size > 1:
            torch._foreach_mul_(gradients, 1.0 / self.groups.expert_size)

    def publish(self) -> None:
        """See StepEngine. Drops whole parameters that an evaluation left gathered (ZeRO-2, and the root)."""
        super().publish()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _cut(parameter: nn.Parameter, chunk: Chunk) -> Chunk:
    """Returns which box of the global parameter this rank has of `chunk`."""
    if not isinstance(parameter, DTensor):
        return chunk
    mesh, (cut,) = parameter.device_mesh, parameter.placements
    assert isinstance(cut, Shard)
    return sub_chunk(chunk, cut.dim, mesh.get_local_rank(), mesh.size())


def _experts(module: nn.Module) -> set[nn.Parameter]:
    """Returns the expert parameters below a module."""
    return {p for experts in module.modules() if isinstance(experts, GroupedExperts) for p in experts.parameters()}
