"""Weights of linear layers in the dtype of autocast, made once per update instead of cast in every forward.

The network holds the copies, the optimizer the float32 weights (masters), which are what is averaged and saved. After
a backward the copies' gradients are brought to the masters', in which micro-batches add up. A copy is the cast, and a
gradient the cast back, that autocast would have made, so losses and weights are the same to the bit; what is saved is
the launches: one operator for all weights where autocast starts two per weight and micro-batch.
"""

import torch
from torch import Tensor, nn

from swin_moe.config import Config
from swin_moe.engine.precision import DTYPES
from swin_moe.ops.bias_gelu import is_fused
from swin_moe.ops.linear import Linear
from swin_moe.registry import is_outside


class WeightCopies:
    """The copies of a network, in its modules, and their masters.

    Args:
        model: Materialized. Its layers' parameters are replaced by copies.
        dtype: Of autocast; the network is to be called in its context only.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.masters: dict[str, nn.Parameter] = {}
        self.copies: dict[str, nn.Parameter] = {}
        for path, module in model.named_modules():
            for key, master in list(module.named_parameters(recurse=False)) if _is_cast(path, module) else ():
                name = f"{path}.{key}"
                if _is_wide(name, master):
                    continue
                copy = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
                setattr(module, key, copy)
                self.masters[name], self.copies[name] = master, copy
        self._versions: list[int] = []
        self._note()

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the copies anew, after an update of the masters.

        Raises:
            ValueError: A copy was written to by something else, which would be lost here.
        """
        self._refuse([n for n, version in zip(self.copies, self._versions) if self.copies[n]._version != version])
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.masters.values()))
        self._note()

    @torch.no_grad()
    def verify(self) -> None:
        """Raises ValueError where a copy is not its master's cast: writes to .data count up no version."""
        cast = {name: self.masters[name].to(copy.dtype) for name, copy in self.copies.items()}
        bits = torch.int16  # what is not a number is equal, too
        self._refuse([n for n, copy in self.copies.items() if not torch.equal(copy.view(bits), cast[n].view(bits))])

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            raise ValueError(
                f"{changed[0]} was changed in the network, whose weights are copies in half precision: change them by "
                f"Engine.change_weights, or by filling Engine.pieces before Engine.load_state"
            )

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the copies' gradients to the masters', and clears them."""
        found = [(self.masters[name], copy) for name, copy in self.copies.items() if copy.grad is not None]
        if not found:
            return
        cast = [torch.empty_like(master) for master, _ in found]
        torch._foreach_copy_(cast, [copy.grad for _, copy in found if copy.grad is not None])
        held = [(master.grad, grad) for (master, _), grad in zip(found, cast) if master.grad is not None]
        if held:
            torch._foreach_add_([total for total, _ in held], [grad for _, grad in held])
        for (master, copy), grad in zip(found, cast):
            master.grad = grad if master.grad is None else master.grad
            copy.grad = None

    def _note(self) -> None:
        self._versions = [copy._version for copy in self.copies.values()]


def _is_cast(path: str, module: nn.Module) -> bool:
    """Returns whether autocast casts the weights of a module in every forward, all of them and once: no routers, bias
    networks or experts, which compute in float32 or cast by themselves."""
    return type(module) is Linear or (type(module) is nn.Conv2d and path.endswith("patch_embed.proj"))


def _is_wide(name: str, bias: Tensor) -> bool:
    """Returns whether a bias is needed in float32.

    That of queries, keys and values is used twice where windows are padded, as a padded token's values too: two casts,
    whose gradients add up in float32. That of a hidden layer is added in float32 by the kernel of bias and GELU, where
    there is one.
    """
    return name.endswith("qkv.bias") or (name.endswith("fc1.bias") and is_fused(bias))


def copies_of(model: nn.Module, config: Config, *, world_size: int) -> WeightCopies | None:
    """Returns the copies of a network that is about to be trained; None where autocast is left to cast.

    Not on several ranks, whose gradients are reduced in float32 as they come; not beside offloaded weights, which have
    copies already; not in compiled blocks, where casts share kernels; and not under a task of another place, which may
    call layers outside of autocast.
    """
    dtype = DTYPES[config.engine.precision]
    alone = world_size == 1 and config.engine.offload == "none" and config.parallel.compile == "none"
    if dtype not in (torch.bfloat16, torch.float16) or not alone or is_outside(config.task.name):
        return None
    return WeightCopies(model, dtype)
