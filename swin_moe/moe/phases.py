"""How long the phases of a MoE layer take, forward and backward, without changing what it computes."""

import time
from collections import defaultdict
from typing import Any, overload

import torch
from torch import Tensor

PHASES = ("route", "dispatch", "experts", "combine")


class PhaseClock:
    """Seconds per phase of one layer; on CUDA they are the device's, and only reading them waits for it.

    Everything between two stamps counts for the phase that the second one ends. What a phase of the forward did is
    undone by the same phase of the backward, which counts for it too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stamps: list[tuple[str, Any]] = []  # phase, seconds or torch.cuda.Event

    def end(self, phase: str) -> None:
        """A phase ends now; "" = what happened since the last stamp belongs to none."""
        if self.device.type != "cuda":
            self._stamps.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._stamps.append((phase, event))

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of every phase since the clock was made, 0 for those that did not occur."""
        if self.device.type == "cuda" and self._stamps:
            self._stamps[-1][1].synchronize()
        total: dict[str, float] = defaultdict(float, dict.fromkeys(PHASES, 0.0))
        for (_, before), (phase, after) in zip(self._stamps, self._stamps[1:]):
            total[phase] += after - before if isinstance(after, float) else before.elapsed_time(after) * 1e-3
        total.pop("", None)
        return dict(total)


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clock: PhaseClock, backward: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.phase = clock, backward
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        ctx.clock.end(ctx.phase)
        return None, None, *grads


@overload
def mark(x: Tensor, clock: PhaseClock | None, *, forward: str, backward: str) -> Tensor: ...
@overload
def mark(
    x: Tensor | list[Tensor], clock: PhaseClock | None, *, forward: str, backward: str
) -> Tensor | list[Tensor]: ...
def mark(x: Tensor | list[Tensor], clock: PhaseClock | None, *, forward: str, backward: str) -> Tensor | list[Tensor]:
    """Returns x, having ended a phase of the forward; `backward` ends when the gradient of x is there. "" = none.

    Of a list, when all gradients are there. Without a clock nothing happens at all.
    """
    if clock is None:
        return x
    clock.end(forward)
    if isinstance(x, list):
        return list(_Mark.apply(clock, backward, *x))
    return _Mark.apply(clock, backward, x)[0]
