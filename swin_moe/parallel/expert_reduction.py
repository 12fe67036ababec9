"""Expert gradients are summed over the replicas of the experts while backward still runs.

Parameters are dealt into the buckets of apply.py, in the model's order; backward fills them from the last to the
first, and a bucket sets out as soon as it and all behind it are full. So the order of collectives is the same on all
ranks, and so are the bits: every bucket holds what reduce_expert_gradients sums together.
"""

import weakref
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from swin_moe.parallel.apply import buckets, expert_parameters
from swin_moe.parallel.groups import Groups


class ExpertReduction:
    """Starts the sums in the last backward of a step, and finishes them; see apply.py for the rule."""

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        self._group = groups.expert_data
        self._parameters = [p for _, p in expert_parameters(model) if p.requires_grad]
        self._buckets = [] if self._group is None else list(buckets(self._parameters))
        self._pending: list[Any] = []
        self._missing: list[int] | None = None  # per bucket, gradients to come; None = not in a last backward
        self._next = len(self._buckets) - 1
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(_arrived, weakref.ref(self), number))

    def begin(self, *, last: bool) -> None:
        """Says whether the next backward is the last of a step; only then gradients are whole."""
        self._missing = [len(bucket) for bucket in self._buckets] if last else None

    @property
    def under_way(self) -> int:
        """How many buckets are being summed."""
        return len(self._pending)

    @torch.no_grad()
    def _arrived(self, number: int, parameter: nn.Parameter) -> None:
        if self._missing is None:
            return
        self._missing[number] -= 1
        while self._next >= 0 and self._missing[self._next] == 0:
            self._start()

    def _start(self) -> None:
        """Starts the sum of the next bucket; its gradients become views of what is summed, so they are held once."""
        parameters = [p for p in self._buckets[self._next] if p.grad is not None]
        self._next -= 1
        if not parameters:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = part.view(parameter.shape)
        self._pending.append(dist.all_reduce(flat, group=self._group, async_op=True))

    @torch.no_grad()
    def finish(self, divisor: float) -> None:
        """Waits for the sums and divides them, as reduce_expert_gradients; starts what has not been started."""
        while self._next >= 0:
            self._start()
        self._wait()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if divisor != 1 and gradients:
            torch._foreach_mul_(gradients, 1.0 / divisor)

    def discard(self) -> None:
        """Waits for what was started, for a step whose gradients are thrown away."""
        self._wait()

    def _wait(self) -> None:
        for work in self._pending:
            work.wait()
        self._pending, self._missing, self._next = [], None, len(self._buckets) - 1


def _arrived(reduction: "weakref.ref[ExpertReduction]", number: int, parameter: nn.Parameter) -> None:
    """A hook of a parameter. It must not hold the reduction, or both would hold each other beyond the sight of Python's
    collector, and with them the process group, whose threads then outlive destroy_process_group."""
    alive = reduction()
    if alive is not None:
        alive._arrived(number, parameter)
