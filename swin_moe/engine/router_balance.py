"""Balancing without a loss: after every update a router's bias moves toward an even load (arXiv:2408.15664).

bias_e += rate * sign(mean load - load_e) (algorithm 1), where the load of an expert is how many pairs chose it, summed
over the ranks and micro-batches of the step. Loads are integers, so all ranks and layouts move alike, to the bit.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from swin_moe.checkpoint import Piece
from swin_moe.moe import MoELayer
from swin_moe.parallel.groups import Groups


class RouterBalance:
    """Counts loads during a step and moves the biases at its end; does nothing for a model without such a router.

    Args:
        model: Parallelized, and on its device.
        pieces_of: Parameter name -> this rank's pieces of it; views, so that filling them changes the model.
    """

    def __init__(self, model: nn.Module, groups: Groups, pieces_of: Callable[[str], list[Piece]]):
        self.groups = groups
        found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MoELayer)]
        found = [(name, layer) for name, layer in found if layer.config.bias_rate > 0 and _learns(layer)]
        self.layers = [layer for _, layer in found]
        self.pieces = [pieces_of(f"{name}.router.balance.bias") for name, _ in found]
        self.load_LE: torch.Tensor | None = None  # int64, pairs by layer and expert, since the last update

    def count(self) -> None:
        """Adds the loads of the last forward. After its backward, so that a recomputed forward is not counted twice."""
        if self.layers:
            load_LE = torch.stack([layer.stats.demand for layer in self.layers if layer.stats is not None])
            self.load_LE = load_LE if self.load_LE is None else self.load_LE + load_LE

    def clear(self) -> None:
        """Forgets what was counted: the step was skipped."""
        self.load_LE = None

    @torch.no_grad()
    def update(self) -> None:
        """Moves every bias. Collective, once per step."""
        if not self.layers:
            return
        load_LE, self.load_LE = self.load_LE, None
        assert load_LE is not None, "an update follows a forward"
        if self.groups.world_size > 1:
            dist.all_reduce(load_LE, group=self.groups.world)
        num_experts = load_LE.shape[1]
        direction_LE = (load_LE.sum(dim=1, keepdim=True) - num_experts * load_LE).sign()  # of the mean minus the load
        for layer, pieces, direction_E in zip(self.layers, self.pieces, direction_LE):
            for piece in pieces:
                start, size = piece.chunk.offset[0], piece.chunk.size[0]
                step = direction_E[start : start + size].to(piece.tensor.device, piece.tensor.dtype)
                piece.tensor.add_(step, alpha=layer.config.bias_rate)


def _learns(layer: MoELayer) -> bool:
    """Returns whether the layer's router is trained; the bias of a frozen one (optim.freeze) stays as it is."""
    return any(parameter.requires_grad for parameter in layer.router.parameters())
