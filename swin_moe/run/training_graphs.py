"""CUDA graphs of training (engine.cuda_graphs): forward, loss and backward of a micro-batch, recorded and replayed.

What changes from step to step reaches a recording as data: the micro-batch, seed and step (RandomContext.words) and the
loss scale are copied into buffers of its own. The first micro-batch of a step has recordings that write gradients,
later ones have those that add to them, so nothing is filled with zeros; gradients stay where they were recorded, and
parameters are given them after each replay. The update is not recorded; it reads and drops them as always.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from swin_moe.config import Config
from swin_moe.data.batch import Batch
from swin_moe.engine.base import Engine
from swin_moe.engine.graphs import MOST_GRAPHS, DeviceRecorder, Output, Recorder, Recording, check_rows
from swin_moe.engine.limits import serves_of
from swin_moe.engine.replicated import ReplicatedEngine
from swin_moe.moe.choices import RoutingStats
from swin_moe.ops import extension
from swin_moe.ops.random_draws import with_words
from swin_moe.randomness import RandomContext
from swin_moe.run.expert_load import moe_layers
from swin_moe.tasks.base import Keeps, RecordableLoss, StepContext, Task, find_task

_OPTION = "engine.cuda_graphs=true"


class _Recorded(NamedTuple):
    inputs: dict[str, Tensor]
    recording: Recording
    losses: Tensor  # (2,), task and auxiliary
    kept: tuple[Tensor, ...]  # MicroLoss.kept
    gradients: list[tuple[nn.Parameter, Tensor]]  # of every parameter that has one afterwards
    stats: list[RoutingStats | None]  # of every MoE layer
    addresses: tuple[int, ...]  # of what it reads besides its inputs


class GraphedMicroSteps:
    """Forward and backward of micro-batches, replayed where they are alike from step to step.

    A micro-batch is recorded that is like the one before it, the first of a step like that of the step before; that one
    ran as always (attention measures its paths there). What comes once, as the remainder of an epoch, runs as always,
    and so do shapes beyond MOST_GRAPHS and a later micro-batch of a step whose first was not replayed.
    """

    def __init__(self, task: RecordableLoss, engine: ReplicatedEngine, config: Config, recorder: Recorder) -> None:
        self.task, self.engine, self.recorder = task, engine, recorder
        self.seed = config.run.seed
        self.layers = [layer for _, layer in moe_layers(engine.local_model)]
        parts = engine.parts.values()
        holders = [
            *engine.local_model.parameters(),
            *(part.leaf for part in parts),
            *(part.parameter for part in parts),
        ]
        self.holders = list(dict.fromkeys(holders))
        self._before: dict[bool, tuple] = {}  # whether the first of a step -> what the last such micro-batch was
        self._recorded: dict[tuple, _Recorded] = {}

    def run(self, batch: Batch, context: StepContext) -> Tensor:
        """Returns (2,), the task loss and the auxiliary loss, having accumulated gradients; read it before the next.

        Raises:
            ValueError: The micro-batch cannot be recorded.
        """
        inputs = self.task.inputs(batch, context)
        words = with_words(RandomContext(self.seed, context.step, inputs["sample"])).words
        assert words is not None
        scale = torch.full((), self.engine.loss_scale.value, device=inputs["image"].device)
        inputs = {**inputs, "words": words, "scale": scale}
        held = self._gradients()
        key = (not held, context.num_samples, *((n, t.shape, t.stride(), t.dtype) for n, t in inputs.items()))
        recorded = self._recording_for(key, inputs, held, context)
        if recorded is None:
            losses, *kept = self.recorder.eager(lambda: self._compute(inputs, context))
        else:
            for name, buffer in recorded.inputs.items():
                buffer.copy_(inputs[name])
            recorded.recording.replay()
            losses, kept = recorded.losses, list(recorded.kept)
            for parameter, gradient in recorded.gradients:
                parameter.grad = gradient
            for layer, stats in zip(self.layers, recorded.stats):
                layer.stats = stats
        if kept:
            cast(Keeps, self.task).keep(tuple(kept))
        self.engine.balance.count()
        return losses

    def _recording_for(
        self, key: tuple, inputs: Mapping[str, Tensor], held: list[tuple[nn.Parameter, Tensor]], context: StepContext
    ) -> _Recorded | None:
        """Returns what is to be replayed; None where the micro-batch runs as always."""
        before, self._before[not held] = self._before.get(not held), key
        if key not in self._recorded and key != before:
            return None
        if held and not any(_same(held, other.gradients) for other in self._recorded.values()):
            return None
        recorded, addresses = self._recorded.get(key), self._addresses()
        if recorded is not None and recorded.addresses == addresses and (not held or _same(held, recorded.gradients)):
            return recorded
        self._recorded.pop(key, None)
        if len(self._recorded) < MOST_GRAPHS:
            self._recorded[key] = self._record(inputs, context, addresses)
        return self._recorded.get(key)

    def _record(self, inputs: Mapping[str, Tensor], context: StepContext, addresses: tuple[int, ...]) -> _Recorded:
        buffers, first = {name: tensor.clone() for name, tensor in inputs.items()}, not self._gradients()
        results = 0  # losses and what is kept

        def call() -> Output:
            nonlocal results
            computed = self._compute(buffers, context)
            results = len(computed)
            statistics = [t for layer in self.layers if layer.stats is not None for t in vars(layer.stats).values()]
            return (*computed, *(gradient for _, gradient in self._gradients()), *statistics)

        try:
            recording = self.recorder.record(call)
        except RuntimeError as error:
            said = (str(error).splitlines() or [""])[0]
            shape = tuple(inputs["image"].shape)
            raise ValueError(
                f"{_OPTION}: forward and backward of a micro-batch of shape {shape} cannot be recorded ({said}); use "
                f"engine.cuda_graphs=false"
            ) from error
        gradients, stats = self._gradients(), [layer.stats for layer in self.layers]
        if first:  # nothing has run: they hold nothing yet
            for parameter, _ in gradients:
                parameter.grad = None
        losses, *kept = recording.output[:results]
        return _Recorded(buffers, recording, losses, tuple(kept), gradients, stats, addresses)

    def _compute(self, inputs: Mapping[str, Tensor], context: StepContext) -> tuple[Tensor, ...]:
        """Returns the losses (2,) of a micro-batch and what is kept of it, having accumulated gradients; reads its
        inputs alone."""
        loss = self.task.loss_of(self.engine.model, inputs, replace(context, words=inputs["words"]))
        self.engine.differentiate(loss.total * inputs["scale"].to(loss.total.dtype))
        return torch.stack([loss.task, loss.aux]), *loss.kept

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(parameter, parameter.grad) for parameter in self.holders if parameter.grad is not None]

    def _addresses(self) -> tuple[int, ...]:
        model = self.engine.local_model
        return tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))


def _same(some: list[tuple[nn.Parameter, Tensor]], others: list[tuple[nn.Parameter, Tensor]]) -> bool:
    """Returns whether the same parameters have the same tensors as gradients."""
    pairs = zip(some, others)
    return len(some) == len(others) and all(p is q and gradient is other for (p, gradient), (q, other) in pairs)


def graphs_of(config: Config, task: Task, engine: Engine, device: torch.device) -> GraphedMicroSteps | None:
    """Returns what replays the micro-batches of a run that check_training let pass; None without the option."""
    if not config.engine.cuda_graphs:
        return None
    assert isinstance(engine, ReplicatedEngine), "check_training lets no other pass"
    return GraphedMicroSteps(cast(RecordableLoss, task), engine, config, DeviceRecorder(device))


def check_training(config: Config, device_type: str, world_size: int) -> None:
    """Raises ValueError where engine.cuda_graphs is set and a training step cannot be recorded."""
    if not config.engine.cuda_graphs:
        return
    if device_type != "cuda":
        raise ValueError(
            f"{_OPTION} needs a CUDA device, this run computes on {device_type}; use engine.cuda_graphs=false"
        )
    if not extension.available("cuda"):
        raise ValueError(f"{_OPTION} in training needs the compiled kernels: draws would ask the device for the step")
    if not serves_of(config.engine.name).graphs:
        raise ValueError(
            f"engine.name={config.engine.name} does not train with {_OPTION}: its buffers of gradients were not seen "
            f"to be right with recordings; use engine.name=torch"
        )
    if world_size > 1:
        raise ValueError(f"{_OPTION} trains on one rank, got {world_size}: exchanges between ranks are not recorded")
    if config.parallel.compile != "none":
        raise ValueError(f"{_OPTION} in training needs parallel.compile=none, got {config.parallel.compile}")
    if not issubclass(find_task(config), RecordableLoss):
        lacks = "whose loss is not said to be recordable (swin_moe/tasks/base.py: RecordableLoss)"
        raise ValueError(f"{_OPTION} does not train task.name={config.task.name}, {lacks}")
    check_rows(config, training=True)
