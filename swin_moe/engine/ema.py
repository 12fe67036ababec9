"""Exponential moving average of the weights, sharded as the weights are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of all parameters: average = decay * average + (1 - decay) * weight, once per update.

    Frozen parameters are averaged too, so that the average is a complete set of weights.

    Args:
        weights: This rank's part of every parameter, by name, plain tensors that are updated in place.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.average: dict[str, Tensor] = {name: weight.clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves every average toward its weight."""
        torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the averages in the place of the weights.

        In place, one tensor at a time: engines keep views of the weights' memory, so memory cannot be exchanged.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self.weights.items():
            kept = weight.clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(kept)


@contextmanager
def evaluating(model: nn.Module, average: WeightAverage | None, publish: Callable[[], None]) -> Iterator[None]:
    """Returns a context in which a network is in eval mode with its averaged weights, where there are any.

    Args:
        publish: Brings weights that were exchanged to the network, where it does not share their memory.
    """
    model.eval()
    try:
        if average is None:
            yield
            return
        try:
            with average.swapped():
                publish()
                yield
        finally:
            publish()
    finally:
        model.train()
