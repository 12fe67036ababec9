"""What a real rank holds, to be compared with memory.py: tensors of its engine, and bytes that are alive in a step."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from swin_moe.data.batch import to_device
from swin_moe.engine.base import Engine
from swin_moe.engine.parts import Parts, local_tensor
from swin_moe.planner.trace import LiveBytes
from swin_moe.run.held import bytes_of, held_tensors

_LETTING_GO = 0.01  # seconds


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank."""

    parameters: int  # with copies in another dtype
    gradients: int  # at the end of the last backward
    optimizer: int
    averages: int
    activations: int  # at their peak, with whatever is gathered


class _LiveAndGathered(LiveBytes):
    """Also counts tensors that FSDP2 fills and empties by changing the size of their storages, below operators."""

    def __init__(self, known: Iterable[Tensor], model: Any) -> None:
        groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
        outputs = [t for g in groups if g is not None for p in g.fsdp_params for t in p.all_gather_outputs]
        super().__init__([*known, *outputs])
        self._filled = [t.untyped_storage() for t in outputs]
        self.highest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it made."""
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.highest = max(self.highest, self.live + sum(s.nbytes() for s in self._filled))
        return result


class _LiveAfterSending(LiveBytes):
    """Counts a new peak after a collective only when its thread could let go of what it sent.

    It needs Python's lock to free a storage that this counter follows, and got it before the next operator or not: the
    same step had peaks 12 MB apart from run to run.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__(known)
        self.highest, self._sent = 0, False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it made."""
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if self._sent and self.live > self.highest:
            time.sleep(_LETTING_GO)
            self._sent = False
        self.highest = max(self.highest, self.live)
        self._sent = self._sent or function.namespace == "c10d"
        return result


def measure_step(engine: Any, task: Any, batches: Iterable[Any], context: Any) -> Measured:
    """Returns what a rank holds in a step, which is taken. Another should have been taken before.

    engine: Of torch's optimizers or FairScale's (engine/parts.py), or DeepSpeed's: there gradients are those that are
        left when all are reduced, and activations include them and the bucket that they are reduced in, but what stays
        between steps.
    context: A StepContext.
    """
    batches = list(batches)
    parts = engine.parts
    if not isinstance(parts, Parts):
        return _measure_flat(engine, task, batches, context)
    weights, states, averages = held_tensors(engine).values()
    with _LiveAndGathered([local_tensor(t) for t in (*weights, *states, *averages)], engine.model) as seen:
        handles = [_gradients(part.parameter, seen) for part in parts.values() if part.parameter.requires_grad]
        _run(engine, task, batches, context)
        # Elements: where several are views of one sum, such as those of two biases side by side, it holds more.
        gradients = sum(g.numel() * g.element_size() for g in parts.gradients())
        engine.measure()
        engine.step(context.step)
    for handle in handles:
        handle.remove()
    activations = seen.highest + _inputs(batches)
    return Measured(bytes_of(weights), gradients, bytes_of(states), bytes_of(averages), activations)


def _measure_flat(engine: Any, task: Any, batches: list[Any], context: Any) -> Measured:
    parts, model = engine.parts, engine.local_model
    # Stage 3 leaves a module's parameter empty but while it runs.
    weights = [*(getattr(p, "ds_tensor", p) for p in model.parameters()), *model.buffers()]
    states = [t for state in parts.states.values() for t in state.values() if isinstance(t, Tensor)]
    with _LiveAfterSending([*weights, *parts.buffers, *states]) as seen:
        _run(engine, task, batches, context)
        peak = seen.highest
        gradients = sum(g.numel() * g.element_size() for g in parts.gradients())
        engine.measure()
        engine.step(context.step)
    optimizer = bytes_of([*states, *parts.updated])
    return Measured(bytes_of(weights), gradients, optimizer, 0, peak + _inputs(batches))


def _inputs(batches: list[Any]) -> int:
    """Returns bytes of a batch: they were there before, and one at a time is the step's."""
    return max(bytes_of(v for v in batch.values() if isinstance(v, Tensor)) for batch in batches)


def _gradients(parameter: Any, seen: LiveBytes) -> Any:
    def hook(p: Any) -> None:
        if p.grad is not None:
            seen.is_gradient(local_tensor(p.grad))

    return parameter.register_post_accumulate_grad_hook(hook)


def _run(engine: Engine, task: Any, batches: list[Any], context: Any) -> None:
    for index, batch in enumerate(batches):
        batch = to_device(batch, engine.device, context.config.engine.precision)  # type: ignore[attr-defined]
        with engine.micro_step(last=index == len(batches) - 1):
            loss = task.loss(engine.model, batch, context)
            engine.backward(loss.total)
