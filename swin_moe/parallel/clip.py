"""One gradient norm for the whole model, although every rank holds other experts."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_moe.parallel.apply import dense_parameters, expert_parameters
from swin_moe.parallel.groups import Groups

_NORM_RUN = 1 << 22  # elements: torch makes a float64 copy of what it takes a norm of, 32 MiB at a time


@torch.no_grad()
def global_grad_norm(model: nn.Module, groups: Groups) -> Tensor:
    """Returns the L2 norm of all gradients, a float64 scalar, the same bits on every rank. Collective.

    Every element counts once: dense gradients are equal on all ranks after their reduction and cost no communication;
    expert squares are summed over the expert group, which holds every expert element exactly once, replicas having
    equal ones. To be called after reduce_expert_gradients. A norm per rank (official loop) would scale replicas
    differently, and they drift.

    Bits: the squares travel in a table with one entry per rank, so that the collective only adds zeros, and the sum
    over ranks is taken here in rank order, whatever order the collective adds in.
    """
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    dense = sum_of_squares([p.grad for _, p in dense_parameters(model) if p.grad is not None], device)
    table = torch.zeros(groups.expert_size, dtype=torch.float64, device=device)
    experts = [p.grad for _, p in expert_parameters(model) if p.grad is not None]
    table[groups.expert_rank] = sum_of_squares(experts, device)
    if groups.expert is not None:
        dist.all_reduce(table, group=groups.expert)
    return (dense + table.sum()).sqrt()


def clip_by_norm(parameters: Iterable[nn.Parameter], norm: Tensor | float, max_norm: float) -> None:
    """Scales gradients by max_norm / (norm + 1e-6) where that is below 1, as torch.nn.utils.clip_grad_norm_."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        factor = torch.as_tensor(max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].dtype)
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))


@torch.no_grad()
def norm_over_world(square: Tensor, groups: Groups) -> Tensor:
    """Returns the L2 norm where no gradient element is on two ranks: the root of the sum of every rank's square.

    The same bits on every rank, for the reason given at global_grad_norm. Collective.
    """
    table = torch.zeros(groups.world_size, dtype=torch.float64, device=square.device)
    table[groups.rank] = square
    if groups.world is not None:
        dist.all_reduce(table, group=groups.world)
    return table.sum().sqrt()


def sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Returns the sum of squares, a float64 scalar; norms are taken per run of elements in float64, in order."""
    runs = [run for gradient in gradients for run in gradient.reshape(-1).split(_NORM_RUN) if len(run)]
    if not runs:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(runs, 2, torch.float64)).square().sum()
