"""Which parameter on which rank had a gradient that is not finite.

After the reduction every rank sees a bad dense gradient alike, so gradients are looked at before it, as backward
makes them. Each is added up, and the sum stays on the device until somebody asks: nan and inf survive in it. (A sum is
the cheapest look: 0.14 ms per million float32 elements on a CPU core, the largest absolute value 2.8, isfinite 7.)

Works with engines that exchange parameters for whole ones in the forward (FSDP2): hooks are set on what a block holds
when it runs.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_moe.models.swin import Block
from swin_moe.moe.experts import GroupedExperts
from swin_moe.parallel.groups import Groups

_MOST_NAMED = 4  # ranks named in a message


class GradientWatch:
    """Remembers the sum over every parameter's gradients on this rank since `clear`."""

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._groups = groups
        self._total: dict[str, Tensor] = {}
        self._watched: set[int] = set()
        units = {name: m for name, m in model.named_modules() if m is model or isinstance(m, Block | GroupedExperts)}
        for prefix, unit in units.items():
            apart = {m for u in units.values() if u is not unit and u in set(unit.modules()) for m in u.modules()}
            owners = [(f"{prefix}.{name}".strip("."), m) for name, m in unit.named_modules() if m not in apart]
            unit.register_forward_pre_hook(partial(self._attach, owners))

    def _attach(self, owners: list[tuple[str, nn.Module]], module: nn.Module, arguments: tuple) -> None:
        if not torch.is_grad_enabled():
            return
        for prefix, owner in owners:
            for key, parameter in owner._parameters.items():
                if parameter is not None and parameter.requires_grad and id(parameter) not in self._watched:
                    self._watched.add(id(parameter))
                    parameter.register_hook(partial(self._see, f"{prefix}.{key}".strip(".")))

    def _see(self, name: str, gradient: Tensor) -> None:
        half = gradient.dtype in (torch.bfloat16, torch.float16)
        total = gradient.detach().sum(dtype=torch.float32 if half else None)
        self._total[name] = self._total[name] + total if name in self._total else total

    def clear(self) -> None:
        """Forgets what was seen; to be called at the start of a step."""
        self._total.clear()

    def first(self) -> int:
        """Returns the number of the first parameter, in the model's order, with a bad gradient here; -1 for none."""
        seen = [(i, self._total[name]) for i, name in enumerate(self._names) if name in self._total]
        if not seen:
            return -1
        finite = torch.isfinite(torch.stack([total for _, total in seen]))
        return -1 if finite.all() else seen[int((~finite).nonzero()[0])][0]

    def report(self) -> str:
        """Returns "head.bias on rank 3" for ranks with a bad gradient, "" for none. Collective; the same on all."""
        device = next(iter(self._total.values())).device if self._total else torch.device("cpu")
        mine = torch.tensor([self.first()], device=device)
        firsts = [torch.empty_like(mine) for _ in range(self._groups.world_size)]
        if self._groups.world_size > 1:
            dist.all_gather(firsts, mine, group=self._groups.world)
        else:
            firsts = [mine]
        bad = [f"{self._names[int(f)]} on rank {rank}" for rank, f in enumerate(firsts) if f >= 0]
        more = f" and {len(bad) - _MOST_NAMED} more ranks" if len(bad) > _MOST_NAMED else ""
        return ", ".join(bad[:_MOST_NAMED]) + more
