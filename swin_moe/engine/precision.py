"""Mixed precision: the autocast context and one loss scale common to all ranks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Returns the context a forward runs in; weights stay float32 (float64 for fp64)."""
    if precision in ("fp32", "fp64"):
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


class LossScale:
    """The dynamic loss scale of fp16 (Micikevicius et al., arXiv:1710.03740); constant 1 in other precisions.

    The decision to skip comes from the global gradient norm, so every rank scales and skips alike. The official loop
    keeps one scaler per rank, which an overflow in one rank's experts drives apart.
    """

    def __init__(self, enabled: bool, *, initial: float = 2.0**16, growth_interval: int = 2000):
        self.enabled = enabled
        self.value = initial if enabled else 1.0
        self.growth_interval = growth_interval
        self.good_steps = 0

    @contextmanager
    def at(self, value: float) -> Iterator[None]:
        """Returns a context in which the scale is another: a step is repeated with its own."""
        kept, self.value = self.value, value
        try:
            yield
        finally:
            self.value = kept

    def update(self, *, finite: bool) -> None:
        """Halves the scale after an overflow, doubles it after growth_interval good steps."""
        if not self.enabled:
            return
        if not finite:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict:
        """Returns the scale as JSON types."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state(self, state: dict) -> None:
        """Takes back `state`; a run that changed its precision starts afresh."""
        if self.enabled and state["value"] > 1.0:
            self.value, self.good_steps = state["value"], state["good_steps"]
