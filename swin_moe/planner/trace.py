"""One micro-step of a network on tensors without memory: bytes that are alive after every operator, and its work.

The network itself runs, forward and backward, on fake tensors, so what is counted is what it does. The same counter
follows real steps (benchmarks/planner/planner_memory.py), and both see tensors that PyTorch's operators return, not
what a kernel keeps for itself while it runs.

Blocks of one kind do the same: a network is traced with as many blocks of each stage as have all kinds in them, and
the others are repeated. Bytes grow evenly with the images of a micro-batch, so two traces give all sizes.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from swin_moe.planner.operators import BYTES, PRODUCTS, starts_kernel, tensors_of, work_of

_CAPACITIES = (11, 12)  # places of arguments of moe_layer
_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class Segment:
    """A stretch of a step, in order of time; plain numbers, of one micro-batch.

    live[i], gradients[i]: Bytes of activations and of parameters' gradients alive after its i-th operator, over those
        at its start; the last is after all that dies in it.
    """

    name: str  # of the block, with "+" for what follows it in forward and "-" in backward; "" before the first
    backward: bool
    live: np.ndarray
    gradients: np.ndarray
    launches: float  # operators that start a kernel, or more than one
    moved: float  # bytes that these read and write, but for matrix products
    moved_by_products: float
    # (index of an operator, segment of forward) -> bytes from there, not handed on, that died before it
    deaths: Mapping[tuple[int, str], float]
    operators: tuple[tuple[str, str], ...] = ()  # (name, precision) of those that start a kernel, in order
    work: np.ndarray = field(default_factory=lambda: np.zeros((0, 5)))  # (operators, 5), see operators.py


def over_time(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (bytes of activations, bytes of gradients) alive after every operator of segments in order of time."""
    live, gradients, at = [], [], np.zeros(2)
    for segment in segments:
        live.append(at[0] + segment.live)
        gradients.append(at[1] + segment.gradients)
        at = at + (segment.live[-1], segment.gradients[-1])
    return np.concatenate(live), np.concatenate(gradients)


class LiveBytes(TorchDispatchMode):
    """Within it, storages that operators make are counted while they live, and operators that start kernels.

    Args:
        known: Tensors that are there before and are not counted, such as parameters.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.gradients = 0  # bytes
        self.segments: list[Segment] = []
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that no other takes their place
        # Storage -> (weak reference to it, bytes, what it counts as; "" = it was there before).
        self._alive: dict[int, tuple[Any, int, str]] = {storage._cdata: (None, 0, "") for storage in self._known}
        self.peak = 0  # bytes of activations, at most
        self._outputs: set[int] = set()
        self._begin("", backward=False)

    def _begin(self, name: str, *, backward: bool) -> None:
        self.name, self.backward = name, backward
        self._at = self.live, self.gradients
        self._lives: list[float] = []
        self._gradients: list[float] = []
        self._deaths: dict[tuple[int, str], float] = {}
        self._operators: list[tuple[str, str]] = []
        self._work: list[list[float]] = []

    def mark(self, name: str, *, backward: bool) -> None:
        """Ends a segment and begins the next."""
        self.end()
        self._begin(name, backward=backward)

    def end(self) -> None:
        """Ends a segment: what has died since its last operator belongs to it."""
        lives = np.array([*self._lives, self.live], dtype=np.float64) - self._at[0]
        gradients = np.array([*self._gradients, self.gradients], dtype=np.float64) - self._at[1]
        work = np.array(self._work).reshape(-1, 5)
        multiplies = np.array([name in PRODUCTS for name, _ in self._operators], dtype=bool)
        moved, by_products = float(work[~multiplies, BYTES].sum()), float(work[multiplies, BYTES].sum())
        counts = len(work), moved, by_products, self._deaths, tuple(self._operators), work
        self.segments.append(Segment(self.name, self.backward, lives, gradients, *counts))

    def is_output(self, tensor: Tensor) -> None:
        """Says that a tensor is what a block hands on: it dies with the next block, not at the end of the forward."""
        self._outputs.add(tensor.untyped_storage()._cdata)

    def is_gradient(self, gradient: Tensor) -> None:
        """Counts a tensor as a parameter's gradient from now on, until it dies."""
        storage = gradient.untyped_storage()
        _, size, kind = self._alive.get(storage._cdata, (None, 0, "live"))
        if kind == "live":
            self.live -= size
            self._alive.pop(storage._cdata, None)
            self._add(storage, "gradients")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it made."""
        if function is _DEVICE and isinstance(args[0], FakeTensor):  # autograd asks at every node
            return args[0].fake_device
        name = function.overloadpacket.__name__
        for tensor in tensors_of([*args, *(kwargs or {}).values()]):
            if tensor.untyped_storage()._cdata not in self._alive:  # made before, or below operators
                self._add(tensor.untyped_storage(), "")
        if name == "moe_layer" and isinstance(args[0], FakeTensor):
            args = _without_capacity(args)
        result = function(*args, **(kwargs or {}))
        outputs = list(tensors_of(result))
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive:
                self._add(storage, "live")
        if starts_kernel(function, name):
            precision, work = work_of(name, args, outputs)
            self._operators.append((name, precision))
            self._work.append(work)
        self.peak = max(self.peak, self.live)
        self._lives.append(self.live)
        self._gradients.append(self.gradients)
        return result

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size, alive, born = storage._cdata, storage.nbytes(), self._alive, self.name
        born_in_forward = not self.backward and kind == "live"
        if kind:
            setattr(self, kind, getattr(self, kind) + size)

        def gone(_: Any) -> None:
            del alive[key]
            if not kind:
                return
            setattr(self, kind, getattr(self, kind) - size)
            handed_on = key in self._outputs
            self._outputs.discard(key)
            if born_in_forward and born != self.name and not handed_on:
                place = len(self._lives), born
                self._deaths[place] = self._deaths.get(place, 0.0) + size

        alive[key] = (weakref.ref(storage, gone), size, kind)


def _without_capacity(args: Sequence[Any]) -> tuple:
    """Returns the arguments of an operator of a layer for which no routing says which pairs are dropped: none is."""
    return (*args[: _CAPACITIES[0]], -1, -1, *args[_CAPACITIES[1] + 1 :])
