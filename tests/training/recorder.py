"""A recorder in the place of a CUDA device."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from swin_moe.engine.graphs import Recording
from tests.waits import counted_waits


class HostRecorder:
    """Records as a device does: recording runs nothing, a replay writes where the recording's results lie.

    holders: Parameters whose gradients a call may add to.
    apart: Gives a context in which numbers of the host, which a replay does not see, are others, and after which what
        Python keeps, which a replay does not touch, is as before.
    """

    def __init__(self, device: torch.device) -> None:
        self.ran = self.recorded = self.replayed = 0
        self.holders: list[torch.nn.Parameter] = []
        self.waits: list[dict] = []
        self.apart: Callable[[], AbstractContextManager] = nullcontext

    def eager(self, call: Callable[[], Tensor]) -> Tensor:
        """See Recorder."""
        self.ran += 1
        return call()

    def record(self, call: Callable[[], Any]) -> Recording:
        """See Recorder."""
        self.recorded += 1
        held = {id(p.grad): (p.grad, p.grad.clone()) for p in self.holders if p.grad is not None}
        outputs = call()
        for tensor in outputs:
            if id(tensor) not in held:
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        for tensor, kept in held.values():
            tensor.copy_(kept)

        def replay() -> None:
            self.replayed += 1
            with self.apart(), counted_waits() as waits:
                again = call()
            self.waits.append(dict(waits))
            for old, new in zip(outputs, again, strict=True):
                old.copy_(new)

        return Recording(replay, outputs)
