"""DeepSpeed ZeRO 1-3 with experts that are not its own: it partitions, reduces and gathers; the step itself is ours.

Its gradient norm, clipping, loss scaling and checkpoints are not used: with foreign experts its checkpoints lose or
scramble them (measured), and one rule for norm, clip and skip has to hold for all engines. State leaves and enters as
named pieces that are views of its flat buffers, so saving and loading communicate nothing and copy nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from swin_moe.engine.common import Held, StepEngine, materialize
from swin_moe.engine.deepspeed.shards import OptimizerShards, Shards, WeightShards
from swin_moe.engine.deepspeed.start import configuration, import_deepspeed, mark_experts, split_groups
from swin_moe.engine.limits import check_engine
from swin_moe.engine.precision import autocast
from swin_moe.layout import Chunk
from swin_moe.models.network import Network
from swin_moe.optim import optimizer_class, parameter_groups
from swin_moe.parallel.groups import ensure_distributed
from swin_moe.registry import require

require("deepspeed", "0.19.8")


class DeepSpeedEngine(StepEngine):
    """See engine/base.py for the protocol."""

    parts: Shards

    def prepare(self, model: Network) -> tuple[nn.Module, Held, list[torch.optim.Optimizer]]:
        """See StepEngine. The optimizer is torch's, over the flat buffers."""
        config, groups, stage = self.config, self.groups, self.config.parallel.zero
        check_engine(config, groups.world_size)
        ensure_distributed(self.device)
        materialize(model, config, self.device)
        _compute_in(model, config.engine.precision, self.device)
        deepspeed = import_deepspeed(self.device)
        expert_group = mark_experts(model, groups, stage=stage)
        param_groups = split_groups(parameter_groups(model, config.optim, config.model.depths), expert_group)
        kind, options = optimizer_class(config.optim)  # exactly torch's: the library compares classes
        wrapped, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=kind(param_groups, **options),
            config=configuration(config, config.accumulation(groups.world_size)[0]),
            dist_init_required=False,
        )
        self._accumulating = False
        trainable = [name for group in param_groups for name in group["names"]]
        shards = (WeightShards if stage == 3 else OptimizerShards)(wrapped, model, trainable, self.layout)
        return wrapped, shards, [wrapped.optimizer.optimizer]

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """See Engine. Gradients of several micro-batches stay on the parameters, whole, until the last backward.

        As the library's coalesce_grad_reduction, which cannot be used: leaving it by an error communicates.
        """
        if not last and not self._accumulating:
            self._set_accumulating(True)
        self.model.set_gradient_accumulation_boundary(last)
        yield
        if last and self._accumulating:
            self._set_accumulating(False)
            with torch.no_grad():
                self.parts.reduce_accumulated()

    def _set_accumulating(self, accumulating: bool) -> None:
        self._accumulating = accumulating
        self.model.inside_no_sync_ctxt = self.model.optimizer._coalesce_grad_reduction = accumulating

    def autocast(self) -> AbstractContextManager:
        """Returns nothing to enter: the library switches an outer autocast off, so the model enters it itself."""
        return nullcontext()

    def differentiate(self, loss: Tensor) -> None:
        """See StepEngine."""
        self.model.backward(loss, scale_wrt_gas=False)

    def change_weights(self, change: Callable[[dict[str, tuple[Tensor, Chunk]]], None]) -> None:
        """Raises ValueError: networks are cut elsewhere than those that follow them. engine/limits.py refuses them."""
        raise ValueError("engine.name=deepspeed cannot change weights beside the optimizer; use engine.name=torch")


def _compute_in(model: nn.Module, precision: str, device: torch.device) -> None:
    """Makes the model enter autocast itself; weights stay float32, as with every engine."""
    if precision == "fp32":
        return
    forward = model.forward

    def forward_in_autocast(*args: object, **options: object) -> object:
        with autocast(precision, device):
            return forward(*args, **options)

    model.forward = forward_in_autocast
