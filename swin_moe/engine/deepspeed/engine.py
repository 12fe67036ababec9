"""DeepSpeed ZeRO 1-3 with experts that are not its own: it partitions, reduces and gathers; the step itself is ours.

Its gradient norm, clipping, loss scaling and checkpoints are not used: with foreign experts its checkpoints lose or
scramble them (measured), and one rule for norm, clip and skip has to hold for all engines. State leaves and enters as
named pieces that are views of its flat buffers, so saving and loading communicate nothing and copy nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from swin_moe.checkpoint import Piece
from swin_moe.config import Config
from swin_moe.engine.base import StepStats
from swin_moe.engine.common import average_name, decide, materialize, state_name, state_tensors
from swin_moe.engine.deepspeed.flat import flat_pieces
from swin_moe.engine.deepspeed.shards import first_not_finite, shards_of
from swin_moe.engine.deepspeed.start import configuration, import_deepspeed, mark_experts, split_groups
from swin_moe.engine.ema import WeightAverage, evaluating
from swin_moe.engine.limits import check_engine
from swin_moe.engine.precision import LossScale, autocast
from swin_moe.engine.router_balance import RouterBalance
from swin_moe.layout import Chunk
from swin_moe.models.network import Network
from swin_moe.optim import Schedule, build_optimizer, parameter_groups
from swin_moe.parallel.apply import parameter_layout
from swin_moe.parallel.clip import norm_and_numbers, sharded_squares, sum_of_squares
from swin_moe.parallel.groups import Groups, ensure_distributed
from swin_moe.registry import require

require("deepspeed", "0.19.8")


class DeepSpeedEngine:
    """See engine/base.py for the protocol."""

    def __init__(self, model: Network, *, config: Config, groups: Groups, schedule: Schedule, device: torch.device):
        check_engine(config, groups.world_size)
        ensure_distributed(device)
        self.config, self.groups, self.schedule, self.device = config, groups, schedule, device
        self.layout = parameter_layout(model, groups)
        self.local_model = materialize(model, config, device)
        _compute_in(model, config.engine.precision, device)
        deepspeed = import_deepspeed(device)
        stage = config.parallel.zero
        expert_group = mark_experts(model, groups, stage=stage)
        param_groups = split_groups(parameter_groups(model, config.optim, config.model.depths), expert_group)
        self.trainable = [name for group in param_groups for name in group["names"]]
        self.model, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(config.optim, param_groups),
            config=configuration(config, config.accumulation(groups.world_size)[0]),
            dist_init_required=False,
        )
        self.optimizer = self.model.optimizer.optimizer  # torch's, over the flat buffers
        self.shards = shards_of(self.model.optimizer, model, stage=stage)
        self._allocate_state()
        self.loss_scale = LossScale(config.engine.precision == "fp16")
        weights = {str(i): buffer for i, buffer in enumerate(self.shards.buffers)}
        self.ema = WeightAverage(weights, config.optim.ema) if config.optim.ema else None
        self.balance = RouterBalance(model, groups, lambda name: self._pieces_of(name, name, self.shards.buffers))
        self.updates = 0
        self._norm: float | None = None  # of this step's gradients, once measured
        self._accumulating = False

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
                self.shards.reduce_accumulated(self.model)

    def _set_accumulating(self, accumulating: bool) -> None:
        self._accumulating = accumulating
        self.model.inside_no_sync_ctxt = self.model.optimizer._coalesce_grad_reduction = accumulating

    def autocast(self) -> AbstractContextManager:
        """Returns nothing to enter: the library switches an outer autocast off, so the model enters it itself."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        self.model.backward(loss * self.loss_scale.value, scale_wrt_gas=False)
        self.balance.count()

    @torch.no_grad()
    def measure(self, numbers: Tensor | None = None) -> list[list[float]]:
        """See Engine."""
        square = sum_of_squares(self._gradients(), self.device).to(self.device)  # gradients may be offloaded
        norm, rows = norm_and_numbers(sharded_squares(square, self.groups), self.groups, numbers)
        self._norm = norm / self.loss_scale.value
        return rows

    @torch.no_grad()
    def step(self, t: int) -> StepStats:
        """See Engine."""
        if self._norm is None:
            self.measure()
        norm, scale, self._norm = self._norm, self.loss_scale.value, None
        assert norm is not None, "measure sets it"
        finite, factor = decide(norm, self.config.optim.clip_norm)
        if finite:
            if factor != scale:
                torch._foreach_mul_(self._gradients(), factor / scale)
            finite = self._update(t)
        if not finite:
            self.balance.clear()
        self.loss_scale.update(finite=finite)
        return StepStats(norm, factor, self.schedule(t), not finite, scale)

    def _gradients(self) -> list[Tensor]:
        return [g for tensors in self.shards.gradients() for g in tensors]

    def _update(self, t: int) -> bool:
        """Returns whether the library updated; it skips where float32 cannot hold the square of an unclipped norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(t, group["lr_scale"])
        self.model.step()
        if self.model.optimizer.overflow:
            return False
        self.balance.update()
        self.updates += 1
        if self.ema:
            self.ema.update()
        return True

    def discard_gradients(self) -> str | None:
        """Clears the gradients of a skipped step; returns the first parameter of this rank that is not finite."""
        name = first_not_finite(self.shards)
        self.shards.discard()
        self.balance.clear()
        return name

    def change_weights(self, change: Callable[[dict[str, tuple[Tensor, Chunk]]], None]) -> None:
        """Raises ValueError: networks are cut elsewhere than those that follow them. engine/limits.py refuses them."""
        raise ValueError("engine.name=deepspeed cannot change weights beside the optimizer; use engine.name=torch")

    def evaluation(self) -> AbstractContextManager:
        """See Engine."""
        return evaluating(self.local_model, self.ema, self.shards.publish)

    @property
    def _updated(self) -> list[Tensor]:
        """The flat buffers that the optimizer updates."""
        return self.shards.buffers[: self.shards.num_updated]

    def _allocate_state(self) -> None:
        """Creates the optimizer state now, as zeros, so that a checkpoint of any step holds the same tensors."""
        for buffer in self._updated:
            state = self.optimizer.state[buffer]
            if self.config.optim.name == "adamw":
                state["step"] = torch.zeros((), dtype=torch.float32, device=buffer.device)
            for key in state_tensors(self.config.optim):
                state[key] = torch.zeros_like(buffer, requires_grad=False)

    def pieces(self) -> Iterable[Piece]:
        """See Engine. Views of the flat buffers: filling them, and load_state, loads the engine."""
        pieces = []
        for name in self.layout:
            pieces += self._pieces_of(name, name, self.shards.buffers)
        for key in state_tensors(self.config.optim):
            moments = [self.optimizer.state[buffer][key] for buffer in self._updated]
            for name in self.trainable:
                pieces += self._pieces_of(state_name(key, name), name, moments)
        if self.ema:
            averages = list(self.ema.average.values())
            for name in self.layout:
                pieces += self._pieces_of(average_name(name), name, averages)
        return pieces

    def _pieces_of(self, saved: str, name: str, buffers: Sequence[Tensor]) -> list[Piece]:
        return flat_pieces(saved, name, self.shards.fragments[name], buffers, self.layout)

    def state(self) -> dict:
        """See Engine."""
        return {"updates": self.updates, "loss_scale": self.loss_scale.state(), "optimizer": self.config.optim.name}

    def load_state(self, state: dict) -> None:
        """See Engine."""
        self.updates = state["updates"]
        self.loss_scale.load_state(state["loss_scale"])
        for buffer in self._updated:
            if "step" in self.optimizer.state[buffer]:
                self.optimizer.state[buffer]["step"].fill_(self.updates)
        self.shards.publish()


def _compute_in(model: nn.Module, precision: str, device: torch.device) -> None:
    """Makes the model enter autocast itself; weights stay float32, as with every engine."""
    if precision == "fp32":
        return
    forward = model.forward

    def forward_in_autocast(*args: object, **options: object) -> object:
        with autocast(precision, device):
            return forward(*args, **options)

    model.forward = forward_in_autocast
