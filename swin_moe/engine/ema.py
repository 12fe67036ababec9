"""Exponential moving average of the weights, sharded as the weights are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of all parameters: average = decay * average + (1 - decay) * weight, once per update.

    Frozen parameters are averaged too, so that the average is a complete set of weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.average: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves every average toward its weight."""
        for name, average in self.average.items():
            average.lerp_(self.parameters[name].detach(), 1 - self.decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Sets every average to its weight, as at the start of a run."""
        for name, average in self.average.items():
            average.copy_(self.parameters[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the averages in the place of the weights; storage is exchanged, nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data
