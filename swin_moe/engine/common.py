"""What all engines share: materializing a model, names of saved tensors, one decision per step, and the step itself.

An engine subclasses StepEngine and says how it spreads a model (replicated.py, fully_sharded.py, deepspeed/engine.py);
what it holds of the weights is a Held: a tensor per parameter (parts.py), or flat buffers (deepspeed/shards.py).
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swin_moe.checkpoint import Piece
from swin_moe.config import Config, OptimConfig
from swin_moe.engine.base import StepStats
from swin_moe.engine.ema import WeightAverage, evaluating
from swin_moe.engine.precision import LossScale, autocast
from swin_moe.engine.router_balance import RouterBalance
from swin_moe.layout import Chunk
from swin_moe.models.network import Network
from swin_moe.ops.host_memory import keep_freed_memory
from swin_moe.optim import Schedule, frozen_parameters
from swin_moe.parallel.apply import parameter_layout
from swin_moe.parallel.clip import SquareSums, norm_and_numbers, sharded_squares, sum_of_squares
from swin_moe.parallel.groups import Groups

# Adam's and SGD's tensors that are saved; "step" is the same for all parameters and saved once as a number.
STATE_TENSORS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def state_tensors(config: OptimConfig) -> tuple[str, ...]:
    """Returns the names of an optimizer's tensors per parameter; none for SGD without momentum."""
    return () if config.name == "sgd" and not config.momentum else STATE_TENSORS[config.name]


def state_name(kind: str, name: str) -> str:
    """Returns the name under which the optimizer state `kind` (exp_avg, ...) of a parameter is saved."""
    return f"optim.{kind}/{name}"


def average_name(name: str) -> str:
    """Returns the name under which the averaged weights of a parameter are saved."""
    return f"ema/{name}"


def materialize(
    model: Network, config: Config, device: torch.device, *, only: Collection[nn.Module] | None = None
) -> Network:
    """Returns the model, with parameters that were on meta allocated on `device` and filled from run.seed.

    A parameter's initial value is a function of the seed and its name, so a large model can be materialized and cut
    in parts without ever being whole. Does nothing to parameters that are not on meta.

    Args:
        model: Parallelized, so that a rank never allocates experts of others.
        only: Modules whose own parameters are wanted, a MoE layer with all it contains; None = all.
    """
    dtype = torch.float64 if config.engine.precision == "fp64" else torch.float32
    frozen_names = frozen_parameters(model, config.optim.freeze)
    allocated = set()
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and (only is None or module in only):
                frozen = (f"{name}.{key}" if name else key) in frozen_names
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, key, nn.Parameter(value, requires_grad=parameter.requires_grad and not frozen))
                allocated.add(module)
    if allocated:
        model.init_weights(config.run.seed, only)
    return model


def decide(norm: float, limit: float) -> tuple[bool, float]:
    """Returns (whether to update, what to multiply gradients by): min(1, limit / (norm + 1e-6)), limit 0 = no clipping.

    The norm is the same number on all ranks, so they skip together.
    """
    finite = math.isfinite(norm)
    return finite, min(1.0, limit / (norm + 1e-6)) if limit and finite else 1.0


class Held(Protocol):
    """What this rank holds of the weights and updates, in the form of its engine, by labels of its own."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Label -> tensor: what the optimizer updates, and frozen parameters."""

    @property
    def states(self) -> Mapping[str, dict]:
        """Label -> optimizer state, of what this rank updates."""

    @property
    def trainable(self) -> list[str]:
        """The parameters that are updated, on this rank or another."""

    def gradients(self) -> list[Tensor]:
        """Returns the reduced gradients of what this rank holds, after the last backward of a step."""

    def apply(self, optimizers: list[torch.optim.Optimizer]) -> bool:
        """Updates the weights by the gradients; returns False where a library refused to."""

    def settle(self) -> None:
        """Ends an update: brings it to the model and drops the gradients, where `apply` has not."""

    def first_not_finite(self) -> str | None:
        """Returns the first parameter whose gradient on this rank is not finite."""

    def discard(self) -> None:
        """Drops the gradients of a step without an update."""

    def publish(self) -> None:
        """Brings changed weights to the parameters that the model computes with. Collective."""

    def pieces_of(self, saved: str, name: str, tensors: Mapping[str, Tensor]) -> list[Piece]:
        """Returns this rank's pieces of a parameter's tensor, views; empty ones where it holds nothing.

        Args:
            saved: Name in the checkpoint. name: The parameter's.
            tensors: Label -> tensor as large as the weight; without labels of which another rank holds it.
        """


class StepEngine:
    """The order of a step and everything saved; see engine/base.py for the protocol.

    Subclasses say how the model is spread (prepare), how gradients come together (micro_step, reduce) and which of
    their elements are whose (square_sums).

    Args:
        model: Parallelized; on meta, or materialized.
        schedule: Learning rate by optimizer step.
        device: Where this rank computes.
    """

    model: Any  # wrapped, by whatever spreads it
    parts: Held

    def __init__(self, model: Network, *, config: Config, groups: Groups, schedule: Schedule, device: torch.device):
        if device.type == "cpu":
            keep_freed_memory()
        self.config, self.groups, self.schedule, self.device = config, groups, schedule, device
        self.local_model = model
        self.layout = parameter_layout(model, groups)
        self.model, self.parts, self.optimizers = self.prepare(model)
        self._allocate_state()
        self.loss_scale = LossScale(config.engine.precision == "fp16")
        self.ema = WeightAverage(self.parts.weights, config.optim.ema) if config.optim.ema else None
        self.balance = RouterBalance(model, groups, lambda name: self.parts.pieces_of(name, name, self.parts.weights))
        self.updates = 0
        self._norm: float | None = None  # of this step's gradients, once measured

    # What the variants differ in.

    def prepare(self, model: Network) -> tuple[nn.Module, Held, list[torch.optim.Optimizer]]:
        """Returns (what the training loop calls, what this rank holds, the optimizers that together update all of it),
        after materializing `model` and spreading it over the ranks.
        """
        raise NotImplementedError

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """See Engine."""
        raise NotImplementedError

    def differentiate(self, loss: Tensor) -> None:
        """Runs the backward of a loss that is scaled already."""
        loss.backward()

    def reduce(self) -> None:
        """Finishes the reduction of gradients over ranks, after the last backward of a step."""

    def square_sums(self) -> SquareSums:
        """Returns what the global norm of the reduced gradients is the root of: here no element is on two ranks."""
        square = sum_of_squares(self.parts.gradients(), self.device).to(self.device)  # gradients may be offloaded
        return sharded_squares(square, self.groups)

    def publish(self) -> None:
        """Brings weights that were changed other than by a training step to the model. Collective."""
        self.parts.publish()

    # The step.

    def autocast(self) -> AbstractContextManager:
        """Returns the context for the forward; the loss is computed outside it, in float32."""
        return autocast(self.config.engine.precision, self.device)

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        self.differentiate(loss * self.loss_scale.value)
        self.balance.count()

    @torch.no_grad()
    def measure(self, numbers: Tensor | None = None) -> list[list[float]]:
        """See Engine."""
        self.reduce()
        norm, rows = norm_and_numbers(self.square_sums(), self.groups, numbers)
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
                torch._foreach_mul_(self.parts.gradients(), factor / scale)
            finite = self._update(t)
        if not finite:
            self.balance.clear()
        self.loss_scale.update(finite=finite)
        return StepStats(norm, factor, self.schedule(t), not finite, scale)

    def _update(self, t: int) -> bool:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule(t, group["lr_scale"])
        if not self.parts.apply(self.optimizers):
            return False
        self.balance.update()
        self.parts.settle()
        self.updates += 1
        if self.ema:
            self.ema.update()
        return True

    def discard_gradients(self) -> str | None:
        """See Engine."""
        name = self.parts.first_not_finite()
        self.parts.discard()
        self.balance.clear()
        return name

    @torch.no_grad()
    def change_weights(self, change: Callable[[dict[str, tuple[Tensor, Chunk]]], None]) -> None:
        """See Engine."""
        weights = self.parts.weights
        pieces = [piece for name in self.layout for piece in self.parts.pieces_of(name, name, weights)]
        change({piece.name: (piece.tensor, piece.chunk) for piece in pieces})
        self._published()

    def evaluation(self) -> AbstractContextManager:
        """See Engine."""
        return evaluating(self.local_model, self.ema, self._published)

    @torch.no_grad()
    def _published(self) -> None:
        self.publish()

    # What is saved.

    def _allocate_state(self) -> None:
        """Creates the optimizer state now, as zeros, so that a checkpoint of any step holds the same tensors."""
        weights = self.parts.weights
        for label, state in self.parts.states.items():
            if self.config.optim.name == "adamw":
                state["step"] = torch.zeros((), dtype=torch.float32, device=weights[label].device)
            for key in state_tensors(self.config.optim):
                state[key] = torch.zeros_like(weights[label])

    def pieces(self) -> Iterable[Piece]:
        """See Engine. The tensors are views: filling them, and load_state, loads the engine."""
        parts, saved = self.parts, [(name, name, self.parts.weights) for name in self.layout]
        for key in state_tensors(self.config.optim):
            moments = {label: state[key] for label, state in parts.states.items()}
            saved += [(state_name(key, name), name, moments) for name in parts.trainable]
        if self.ema:
            saved += [(average_name(name), name, self.ema.average) for name in self.layout]
        return [piece for row in saved for piece in parts.pieces_of(*row)]

    def state(self) -> dict:
        """See Engine."""
        return {"updates": self.updates, "loss_scale": self.loss_scale.state(), "optimizer": self.config.optim.name}

    def load_state(self, state: dict) -> None:
        """See Engine."""
        self.updates = state["updates"]
        self.loss_scale.load_state(state["loss_scale"])
        for own in self.parts.states.values():
            if "step" in own:
                own["step"].fill_(self.updates)
        self._published()
