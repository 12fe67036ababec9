"""ZeRO-0: dense parameters and their optimizer state on every rank (DDP), experts on the ranks that own them."""

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swin_moe.engine.common import StepEngine, materialize
from swin_moe.parallel.apply import expert_parameters, reduce_expert_gradients
from swin_moe.parallel.clip import SquareSums, replicated_squares
from swin_moe.parallel.groups import Groups


def replicate(model: nn.Module, groups: Groups) -> nn.Module:
    """Returns the model wrapped so that dense gradients are averaged over the world; experts are left alone."""
    if groups.world_size == 1:
        return model
    ignored = [name for name, _ in expert_parameters(model)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    # find_unused_parameters: not for unused ones, but because DDP otherwise rebuilds its buckets after the first step.
    # With more than 2 ranks the order of a ring's sums depends on the bucket, so a resumed run would differ in bits.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    # init_sync off: initial weights are a function of the seed, equal on all ranks without a broadcast.
    return DistributedDataParallel(
        model,
        process_group=groups.world,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
        init_sync=False,
    )


class ReplicatedEngine(StepEngine):
    """Every rank updates all dense parameters with the same gradients."""

    def distribute(self, model: nn.Module) -> nn.Module:
        """See StepEngine."""
        return replicate(materialize(model, self.config, self.device), self.groups)

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """See Engine. Backward belongs inside: DDP decides in the forward whether it will communicate."""
        return nullcontext() if last or self.model is self.local_model else self.model.no_sync()

    def reduce(self) -> None:
        """See StepEngine. DDP has averaged the dense gradients during backward."""
        reduce_expert_gradients(self.local_model, self.groups, self.groups.world_size)

    def square_sums(self) -> SquareSums:
        """See StepEngine."""
        return replicated_squares(self.local_model, self.groups)
