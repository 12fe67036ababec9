"""One gradient norm for the whole model, although every rank holds other experts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_moe.parallel.apply import dense_parameters, expert_parameters
from swin_moe.parallel.groups import Groups

# Elements: torch makes a float64 copy of what it takes a norm of. 2 MiB of it stay in a processor's cache, which takes
# half the time of 32 MiB; a device would have more kernels to start.
_NORM_RUN_CPU, _NORM_RUN = 1 << 18, 1 << 22


@dataclass(frozen=True)
class SquareSums:
    """Sums of squares of gradient elements, float64 scalars; every element counts once over `common` and the `own` of
    the ranks `holders`.
    """

    common: Tensor  # of what all ranks hold alike
    own: Tensor  # of what else this rank holds
    holders: range


@torch.no_grad()
def replicated_squares(
    model: nn.Module,
    groups: Groups,
    gradient_of: Callable[[str, nn.Parameter], Tensor | None] = lambda name, parameter: parameter.grad,
) -> SquareSums:
    """Returns the sums where dense gradients are equal on all ranks and only experts differ.

    To be called after the reduction of expert gradients: the expert group holds every expert element exactly once, and
    replicas have equal ones. A norm per rank (official loop) would scale replicas differently, and they drift.

    gradient_of: (name, parameter) -> its gradient, where that is not the parameter's own.
    """
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    dense, experts = (
        sum_of_squares([g for name, p in named if (g := gradient_of(name, p)) is not None], device)
        for named in (dense_parameters(model), expert_parameters(model))
    )
    first = groups.rank - groups.expert_rank
    return SquareSums(dense, experts, range(first, first + groups.expert_size))


def sharded_squares(square: Tensor, groups: Groups) -> SquareSums:
    """Returns the sums where no gradient element is on two ranks. square: Of this rank's elements."""
    return SquareSums(torch.zeros_like(square), square, range(groups.world_size))


@torch.no_grad()
def norm_and_numbers(
    squares: SquareSums, groups: Groups, numbers: Tensor | None = None
) -> tuple[float, list[list[float]]]:
    """Returns (L2 norm of all gradients, every rank's numbers in rank order), the same bits on every rank.

    Collective: one all-reduce, and one wait for the device.

    Bits: everything travels in a table with one column per rank, so that the collective only adds zeros; the sum over
    ranks is taken here in rank order, whatever order the collective adds in.

    Args:
        numbers: (S,) float64 of this rank, on the device of the squares; None = none.
    """
    rows = [squares.own.view(1)] if numbers is None else [squares.own.view(1), numbers]
    own = torch.cat(rows)
    if groups.world is None:
        norm, table = (squares.common + squares.own).sqrt(), own[:, None]
    else:
        table = own.new_zeros((len(own), groups.world_size))
        table[:, groups.rank] = own
        dist.all_reduce(table, group=groups.world)
        norm = (squares.common + table[0, squares.holders.start : squares.holders.stop].sum()).sqrt()
    first, *rest = torch.cat([norm.view(1), table[1:].t().reshape(-1)]).tolist()
    size = len(own) - 1
    return first, [rest[rank * size : (rank + 1) * size] for rank in range(groups.world_size)]


def global_grad_norm(model: nn.Module, groups: Groups) -> Tensor:
    """Returns the L2 norm of all gradients of a model with replicated dense parameters, a float64 scalar. Collective.

    To be called after the reduction of expert gradients.
    """
    return torch.tensor(norm_and_numbers(replicated_squares(model, groups), groups)[0], dtype=torch.float64)


def clip_by_norm(parameters: Iterable[nn.Parameter], norm: Tensor | float, max_norm: float) -> None:
    """Scales gradients by max_norm / (norm + 1e-6) where that is below 1, as torch.nn.utils.clip_grad_norm_."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        factor = torch.as_tensor(max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].dtype)
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))


def sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Returns the sum of squares, a float64 scalar; norms are taken per run of elements in float64, in order."""
    size = _NORM_RUN_CPU if device.type == "cpu" else _NORM_RUN
    runs = [run for gradient in gradients for run in gradient.reshape(-1).split(size) if len(run)]
    if not runs:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(runs, 2, torch.float64)).square().sum()
