"""Which parameter on which rank had a gradient that is not finite: found by repeating the step that was skipped.

After the reduction every rank sees a bad dense gradient alike, so gradients have to be looked at before it, as backward
makes them. A look at every parameter in every backward costs as much host time as backward's own launches (425
parameters in SwinV2-B). Draws are functions of the step, so a skipped step can be run again to the bit, and only then
are gradients looked at: each is added up, and nan and inf survive in the sum.

Works with engines that exchange parameters for whole ones in the forward (FSDP2): hooks are set on what a block holds
when it runs.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swin_moe.models.swin import Block
from swin_moe.moe.experts import GroupedExperts
from swin_moe.parallel.compile import run_eager
from swin_moe.parallel.groups import Groups

_MOST_NAMED = 4  # ranks named in a message


class GradientWatch:
    """Looks at every parameter's gradients on this rank during a repeated step. Costs nothing otherwise."""

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        self._model, self._groups = model, groups
        self._names = [name for name, _ in model.named_parameters()]

    def find(self, repeat: Callable[[], object]) -> str:
        """Returns "head.bias on rank 3" for ranks with a bad gradient, "" for none. Collective; the same on all.

        repeat: Runs forward and backward of the step again; the engine's gradients were discarded before.
        """
        total: dict[str, Tensor] = {}
        watched: set[int] = set()
        handles: list[RemovableHandle] = []

        def see(name: str, gradient: Tensor) -> None:
            half = gradient.dtype in (torch.bfloat16, torch.float16)
            summed = gradient.detach().sum(dtype=torch.float32 if half else None)
            total[name] = total[name] + summed if name in total else summed

        def attach(owners: list[tuple[str, nn.Module]], module: nn.Module, arguments: tuple) -> None:
            for prefix, owner in owners:
                for key, parameter in owner._parameters.items():
                    if parameter is not None and parameter.requires_grad and id(parameter) not in watched:
                        watched.add(id(parameter))
                        handles.append(parameter.register_hook(partial(see, f"{prefix}.{key}".strip("."))))

        try:
            for unit, owners in self._units():
                handles.append(unit.register_forward_pre_hook(partial(attach, owners)))
            with run_eager():  # hooks look inside of compiled blocks
                repeat()
        finally:
            for handle in handles:
                handle.remove()
        return self._report(self._first(total))

    def _units(self) -> list[tuple[nn.Module, list[tuple[str, nn.Module]]]]:
        """Returns what holds its parameters whole while it runs, with the (path, module) that own them."""
        model = self._model
        units = {name: m for name, m in model.named_modules() if m is model or isinstance(m, Block | GroupedExperts)}
        result = []
        for prefix, unit in units.items():
            apart = {m for u in units.values() if u is not unit and u in set(unit.modules()) for m in u.modules()}
            owners = [(f"{prefix}.{name}".strip("."), m) for name, m in unit.named_modules() if m not in apart]
            result.append((unit, owners))
        return result

    def _first(self, total: dict[str, Tensor]) -> Tensor:
        """Returns (1,), the number of the first parameter, in the model's order, with a bad gradient; -1 for none."""
        device = next(iter(total.values())).device if total else torch.device("cpu")
        seen = [i for i, name in enumerate(self._names) if name in total]
        sums = [float(total[self._names[i]]) for i in seen]
        bad = [i for i, value in zip(seen, sums) if not math.isfinite(value)]
        return torch.tensor([min(bad, default=-1)], device=device)

    def _report(self, mine: Tensor) -> str:
        firsts = [torch.empty_like(mine) for _ in range(self._groups.world_size)]
        if self._groups.world_size > 1:
            dist.all_gather(firsts, mine, group=self._groups.world)
        else:
            firsts = [mine]
        bad = [f"{self._names[int(f)]} on rank {rank}" for rank, f in enumerate(firsts) if f >= 0]
        more = f" and {len(bad) - _MOST_NAMED} more ranks" if len(bad) > _MOST_NAMED else ""
        return ", ".join(bad[:_MOST_NAMED]) + more
