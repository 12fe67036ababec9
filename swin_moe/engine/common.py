"""What all engines share: materializing a model, names of saved tensors, one decision per step, and the step itself.

An engine of torch's own optimizers subclasses StepEngine (replicated.py, zero_redundancy.py, fully_sharded.py). Others
use the functions: materialize, state_name, average_name, decide, and parallel/clip.py for the norm.
"""

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

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
from swin_moe.optim import Schedule, build_optimizer, frozen_parameters, parameter_groups
from swin_moe.parallel.apply import parameter_layout
from swin_moe.parallel.clip import SquareSums, norm_and_numbers
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


@dataclass
class Part:
    """This rank's part of one parameter: what is updated, averaged and saved. Plain tensors only.

    leaf shares memory with the model's parameter, or is a copy on the CPU (engine.offload=optimizer).
    """

    name: str
    parameter: nn.Parameter  # the model's; may be a DTensor
    local: Tensor  # its part on this rank, a plain tensor of the same memory
    leaf: nn.Parameter  # what the optimizer updates
    shape: tuple[int, ...]  # global
    chunk: Chunk  # the box of it that local and leaf hold

    @property
    def offloaded(self) -> bool:
        """True where the optimizer's copy is not the model's memory."""
        return self.leaf.data_ptr() != self.local.data_ptr() and self.local.numel() > 0


class StepEngine:
    """The order of a step and everything saved; see engine/base.py for the protocol.

    Subclasses say how the model is spread (distribute), how gradients come together (reduce, square_sums), which part
    of a parameter is this rank's (local_part), and which optimizers update them (build_optimizers).

    Args:
        model: Parallelized; on meta, or materialized.
        schedule: Learning rate by optimizer step.
        device: Where this rank computes.
    """

    def __init__(self, model: Network, *, config: Config, groups: Groups, schedule: Schedule, device: torch.device):
        self.config, self.groups, self.schedule, self.device = config, groups, schedule, device
        self.local_model = model
        self.layout = parameter_layout(model, groups)
        self.model: Any = self.distribute(model)  # wrapped, by whatever spreads it
        self.parts = {name: self._part(name, parameter) for name, parameter in model.named_parameters()}
        self.param_groups = parameter_groups(model, config.optim, config.model.depths)
        for group in self.param_groups:
            group["params"] = [self.parts[name].leaf for name in group["names"]]
        self.trainable = [self.parts[name] for group in self.param_groups for name in group["names"]]
        self.optimizers = self.build_optimizers()
        self.loss_scale = LossScale(config.engine.precision == "fp16")
        average = config.optim.ema
        self.ema = WeightAverage({n: part.leaf for n, part in self.parts.items()}, average) if average else None
        self.balance = RouterBalance(model, groups, lambda name: [self._weights_of(name)])
        self.updates = 0
        self._norm: float | None = None  # of this step's gradients, once measured
        self._allocate_state()

    # What the variants differ in.

    def distribute(self, model: Network) -> nn.Module:
        """Returns what the training loop calls, after materializing `model` and spreading it over the ranks."""
        raise NotImplementedError

    def reduce(self) -> None:
        """Finishes the reduction of gradients over ranks, after the last backward of a step."""
        raise NotImplementedError

    def square_sums(self) -> SquareSums:
        """Returns what the global norm of the reduced gradients is the root of."""
        raise NotImplementedError

    def local_part(self, name: str, parameter: nn.Parameter) -> tuple[Tensor, Chunk]:
        """Returns (plain tensor in the parameter's memory, which box of the global parameter it is)."""
        return parameter.detach(), self.layout[name][1]

    def gradient(self, part: Part) -> Tensor | None:
        """Returns the gradient of `part.local`, a plain tensor."""
        return part.parameter.grad

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns the optimizers that together update every group of param_groups."""
        return [build_optimizer(self.config.optim, self.param_groups)]

    def state_of(self, leaf: nn.Parameter) -> dict | None:
        """Returns the optimizer state of a leaf; None where another rank holds it."""
        return self.optimizers[0].state[leaf]

    def weights_changed(self) -> None:
        """Called after weights were changed other than by a training step: averages swapped, checkpoint loaded."""

    # The step.

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """See Engine."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager:
        """Returns the context for the forward; the loss is computed outside it, in float32."""
        return autocast(self.config.engine.precision, self.device)

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        (loss * self.loss_scale.value).backward()
        self.balance.count()

    @torch.no_grad()
    def measure(self, numbers: Tensor | None = None) -> list[list[float]]:
        """See Engine."""
        self.reduce()
        if self.loss_scale.value != 1.0:
            torch._foreach_mul_(self._gradients(), 1.0 / self.loss_scale.value)
        self._norm, rows = norm_and_numbers(self.square_sums(), self.groups, numbers)
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
            if factor < 1.0:
                torch._foreach_mul_(self._gradients(), factor)
            self._update(t)
            self._clear_gradients()
        else:
            self.balance.clear()
        self.loss_scale.update(finite=finite)
        return StepStats(norm, factor, self.schedule(t), not finite, scale)

    def _gradients(self) -> list[Tensor]:
        return [g for g in map(self.gradient, self.trainable) if g is not None]

    def _update(self, t: int) -> None:
        for part in self.trainable:
            if part.leaf is not part.parameter:
                gradient = self.gradient(part)
                part.leaf.grad = gradient if gradient is None else gradient.to(part.leaf.device)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule(t, group["lr_scale"])
            optimizer.step()
        self.balance.update()
        self._publish()
        self.updates += 1
        if self.ema:
            self.ema.update()

    def _clear_gradients(self) -> None:
        for part in self.trainable:
            part.parameter.grad = part.leaf.grad = None

    def _publish(self) -> None:
        """Brings the optimizer's copies of the weights, where it has its own, to the model."""
        for part in self.parts.values():
            if part.offloaded:
                part.local.copy_(part.leaf)

    def discard_gradients(self) -> str | None:
        """Clears the gradients of a skipped step; returns the first parameter of this rank that is not finite."""
        name = None
        for part in self.trainable:
            gradient = self.gradient(part)
            if name is None and gradient is not None and not torch.isfinite(gradient).all():
                name = part.name
        self._clear_gradients()
        self.balance.clear()
        return name

    @torch.no_grad()
    def change_weights(self, change: Callable[[dict[str, tuple[Tensor, Chunk]]], None]) -> None:
        """See Engine."""
        change({name: (part.leaf.detach(), part.chunk) for name, part in self.parts.items()})
        self._take_weights()

    def evaluation(self) -> AbstractContextManager:
        """See Engine."""
        return evaluating(self.local_model, self.ema, self._take_weights)

    @torch.no_grad()
    def _take_weights(self) -> None:
        self._publish()
        self.weights_changed()

    # What is saved.

    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        local, chunk = self.local_part(name, parameter)
        assert tuple(local.shape) == chunk.size, f"{name}: {tuple(local.shape)} held, {chunk} expected"
        leaf = parameter
        if self.config.engine.offload == "optimizer":
            leaf = nn.Parameter(local.to("cpu", copy=True), requires_grad=parameter.requires_grad)
        elif type(parameter.detach()) is not Tensor:
            leaf = nn.Parameter(local, requires_grad=parameter.requires_grad)
        return Part(name, parameter, local, leaf, self.layout[name][0], chunk)

    def _allocate_state(self) -> None:
        """Creates the optimizer state now, as zeros, so that a checkpoint of any step holds the same tensors."""
        for part in self.trainable:
            state = self.state_of(part.leaf)
            if state is None:
                continue
            if self.config.optim.name == "adamw":
                state["step"] = torch.zeros((), dtype=torch.float32, device=part.leaf.device)
            for key in state_tensors(self.config.optim):
                state[key] = torch.zeros_like(part.leaf)

    def pieces(self) -> Iterable[Piece]:
        """See Engine. The tensors are views: filling them loads the engine."""
        pieces = [self._weights_of(name) for name in self.parts]
        for part in self.trainable:
            state = self.state_of(part.leaf)
            for key in state_tensors(self.config.optim):
                pieces.append(_piece(state_name(key, part.name), part, None if state is None else state[key]))
        if self.ema:
            pieces += [_piece(average_name(n), self.parts[n], average) for n, average in self.ema.average.items()]
        return pieces

    def _weights_of(self, name: str) -> Piece:
        part = self.parts[name]
        return _piece(name, part, part.leaf.detach())

    def state(self) -> dict:
        """See Engine."""
        return {"updates": self.updates, "loss_scale": self.loss_scale.state(), "optimizer": self.config.optim.name}

    def load_state(self, state: dict) -> None:
        """See Engine."""
        self.updates = state["updates"]
        self.loss_scale.load_state(state["loss_scale"])
        for part in self.trainable:
            own = self.state_of(part.leaf)
            if own is not None and "step" in own:
                own["step"].fill_(self.updates)
        self._take_weights()


def _piece(saved: str, part: Part, tensor: Tensor | None) -> Piece:
    """Returns the piece for this part; an empty one where the tensor is another rank's."""
    if tensor is None:
        empty = (0,) * len(part.shape)
        return Piece(saved, part.shape, part.leaf.dtype, Chunk(empty, empty), part.leaf.new_empty(empty))
    return Piece(saved, part.shape, tensor.dtype, part.chunk, tensor)
