"""ZeRO-0: dense parameters and their optimizer state on every rank (DDP), experts on the ranks that own them."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swin_moe.checkpoint import Piece
from swin_moe.config import OptimConfig
from swin_moe.engine.common import Held, StepEngine, materialize
from swin_moe.engine.parts import Parts
from swin_moe.engine.weight_copies import copies_of
from swin_moe.models.network import Network
from swin_moe.optim import build_optimizer
from swin_moe.parallel.apply import expert_parameters
from swin_moe.parallel.clip import SquareSums, replicated_squares
from swin_moe.parallel.expert_reduction import ExpertReduction
from swin_moe.parallel.groups import Groups

Optimizers = Callable[[OptimConfig, list[dict], Groups], list[torch.optim.Optimizer]]
_NEEDLESS = b"find_unused_parameters=True was specified"


@contextmanager
def without_needless_warning() -> Iterator[None]:
    """Returns a context in which C++ writes to stderr as ever, but for the line that says what `replicate` explains."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if _NEEDLESS not in line:
                    os.write(2, line)


class _Replicated(DistributedDataParallel):
    """DDP whose first search for unused parameters is quiet: torch warns once a process, in C++, of 700 characters."""

    _searched = False

    def _post_forward(self, output: Any) -> Any:
        with nullcontext() if self._searched else without_needless_warning():
            output = super()._post_forward(output)
        self._searched |= self.require_backward_grad_sync
        return output


def replicate(model: nn.Module, groups: Groups) -> nn.Module:
    """Returns the model wrapped so that dense gradients are averaged over the world; experts are left alone."""
    if groups.world_size == 1:
        return model
    ignored = [name for name, _ in expert_parameters(model)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    # find_unused_parameters: not for unused ones, but because DDP otherwise rebuilds its buckets after the first step.
    # With more than 2 ranks the order of a ring's sums depends on the bucket, so a resumed run would differ in bits.
    # init_sync off: initial weights are a function of the seed, equal on all ranks without a broadcast.
    return _Replicated(
        model,
        process_group=groups.world,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
        init_sync=False,
    )


def all_here(config: OptimConfig, param_groups: list[dict], groups: Groups) -> list[torch.optim.Optimizer]:
    """Returns one optimizer of all this rank has: every rank updates all dense parameters with the same gradients."""
    return [build_optimizer(config, param_groups)]


class ReplicatedEngine(StepEngine):
    """Whole parameters on every rank; who updates which of them is the optimizers' affair.

    Args:
        optimizers: (optim section, parameter groups, groups of ranks) -> the optimizers that together update all.
    """

    parts: Parts

    def __init__(self, model: Network, *, optimizers: Optimizers = all_here, **options: Any):
        self._build_optimizers = optimizers
        super().__init__(model, **options)

    def prepare(self, model: Network) -> tuple[nn.Module, Held, list[torch.optim.Optimizer]]:
        """See StepEngine."""
        materialize(model, self.config, self.device)
        self.experts = ExpertReduction(model, self.groups)
        copies = copies_of(model, self.config, world_size=self.groups.world_size)
        parts = Parts(model, self.layout, self.config, copies=copies)
        optimizers = self._build_optimizers(self.config.optim, parts.param_groups, self.groups)
        parts.follow(optimizers)
        return self.wrap(model, optimizers), parts, optimizers

    def wrap(self, model: Network, optimizers: list[torch.optim.Optimizer]) -> nn.Module:
        """Returns the model as it is called in training: what brings dense gradients together is around it."""
        return replicate(model, self.groups)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """See Engine. Backward belongs inside: DDP decides in the forward whether it will communicate."""
        self.experts.begin(last=last)
        apart = nullcontext() if last or self.model is self.local_model else self.model.no_sync()
        with apart, self.parts.copies_used():
            yield

    def differentiate(self, loss: Tensor) -> None:
        """See StepEngine."""
        super().differentiate(loss)
        self.parts.collect()

    def reduce(self) -> None:
        """See StepEngine. DDP has averaged the dense gradients during backward, and experts' sums are under way."""
        self.experts.finish(self.groups.world_size)

    def pieces(self) -> Iterable[Piece]:
        """See Engine. What is saved is what the network computes with."""
        if self.parts.copies is not None:
            self.parts.copies.verify()
        return super().pieces()

    def discard_gradients(self) -> str | None:
        """See Engine."""
        self.experts.discard()
        return super().discard_gradients()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """See Engine."""
        with super().evaluation(), self.parts.copies_used():
            yield

    def square_sums(self) -> SquareSums:
        """See StepEngine."""
        return replicated_squares(self.local_model, self.groups, lambda name, _: self.parts[name].gradient)
