"""GroupExchange (moe/routing_groups.py) over a process group: the ranks whose images compete for the same slots."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

# Renamed in torch 2.13; the old name warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _gather(value: Tensor, group: ProcessGroup) -> Tensor:
    """Returns (R, ...), the value of every rank, in rank order."""
    gathered = value.new_empty((dist.get_world_size(group), *value.shape))
    if gathered.numel():
        _all_gather(gathered.view(-1), value.contiguous().view(-1), group=group)
    return gathered


class _Sum(torch.autograd.Function):
    """Every rank's loss depends on every rank's value, so backward sums as well.

    Added up here, in rank order, and not by the collective: the same bits on every rank.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(value, group).sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _gather(grad, ctx.group).sum(dim=0), None


class RankExchange:
    """See GroupExchange. Tensors are small: counts and sums per expert, and at most a few numbers per token."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RankExchange":
        """Returns itself: a copied model talks to the same ranks, and process groups cannot be copied."""
        return self

    def gather(self, value: Tensor) -> Tensor:
        """See GroupExchange."""
        return _gather(value.detach(), self._group)

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """See GroupExchange. Padded to the longest: collectives on tensors of unequal size do not exist on gloo."""
        longest = max(counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows.detach()
        gathered = _gather(padded, self._group)
        if min(counts) == longest:
            return gathered.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(gathered, counts)])

    def sum(self, value: Tensor) -> Tensor:
        """See GroupExchange."""
        return _Sum.apply(value, self._group)
