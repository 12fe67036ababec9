"""What a network offers to be trained: tasks build it, engines spread and fill it, the optimizer and the log ask it."""

from collections.abc import Collection
from typing import NoReturn

from torch import nn


class Network(nn.Module):
    """A module whose parameters can be filled, grouped for decay and counted. It builds on meta, on one process."""

    vectors_decay = False  # biases and other vectors have weight decay too, unless a name or keyword excludes them

    def init_weights(self, seed: int, only: Collection[nn.Module] | None = None) -> None:
        """Fills every parameter as a function of the seed and its name, never of the order or the layout.

        only: Modules whose own parameters are filled (a MoE layer: with all it contains); None = all.
        """
        _lacks(self, "init_weights")

    def no_weight_decay(self) -> set[str]:
        """Returns full names of parameters without weight decay."""
        _lacks(self, "no_weight_decay")

    def no_weight_decay_keywords(self) -> set[str]:
        """Returns strings; a parameter whose name contains one has no weight decay."""
        _lacks(self, "no_weight_decay_keywords")

    def flops(self) -> float:
        """Returns the official count of multiply-accumulates of one image."""
        _lacks(self, "flops")

    def active_flops(self) -> float:
        """Returns the multiply-accumulates one image really costs."""
        _lacks(self, "active_flops")

    def head_parameters(self) -> set[str]:
        """Returns full names of the class head's parameters: what optim.freeze=backbone leaves to learn."""
        return set()

    def momentum_pairs(self) -> dict[str, str]:
        """Returns name of every parameter of a momentum network -> name of the one that it follows. A new run's begin
        where those do, whatever is loaded."""
        return {}


def _lacks(network: nn.Module, name: str) -> NoReturn:
    raise NotImplementedError(f"{type(network).__name__} has no {name} (swin_moe/models/network.py: Network)")
