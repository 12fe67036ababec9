"""Weights of linear layers in the dtype of autocast, made once per update instead of cast in every forward.

On one rank the network holds the copies, the optimizer the float32 weights (masters), which are what is averaged and
saved; after a backward the copies' gradients are brought to the masters', in which micro-batches add up. On several
ranks the network keeps the masters, whose gradients are reduced by hooks while backward runs, and computes with views
of the copies: a node of autograd a block stands between. A copy is the cast, and a gradient the cast back, that
autocast would have made, so losses and weights are the same to the bit; what is saved is launches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swin_moe.config import Config
from swin_moe.engine.precision import DTYPES
from swin_moe.models.swin import Block
from swin_moe.ops.bias_gelu import is_fused
from swin_moe.ops.linear import Linear
from swin_moe.registry import is_outside


class Copies:
    """Copies of weights in half precision, by parameter, and their masters."""

    def __init__(self) -> None:
        self.masters: dict[str, nn.Parameter] = {}
        self.copies: dict[str, Tensor] = {}
        self._versions: list[int] = []

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

    def collect(self) -> None:
        """Brings gradients of a backward to the masters, where autograd has not."""

    @contextmanager
    def used(self) -> Iterator[None]:
        """Returns a context for forward and backward, in which the network computes with the copies."""
        yield

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            raise ValueError(
                f"{changed[0]} was changed in the network, whose weights are copies in half precision: change them by "
                f"Engine.change_weights, or by filling Engine.pieces before Engine.load_state"
            )

    def _note(self) -> None:
        self._versions = [copy._version for copy in self.copies.values()]


class WeightCopies(Copies):
    """The copies of a network, in its modules, and their masters.

    Args:
        model: Materialized. Its layers' parameters are replaced by copies.
        dtype: Of autocast; the network is to be called in its context only.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        for name, module, key, master in _cast_weights(model):
            copy = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
            setattr(module, key, copy)
            self.masters[name], self.copies[name] = master, copy
        self._note()

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


class LinkedCopies(Copies):
    """Copies beside a network that keeps its parameters, as hooks on these reduce their gradients.

    Args:
        model: Materialized; its layers' attributes are others in the context of `used`.
        dtype: Of autocast; the network is to be called in its context only.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        blocks = {m: block for block in model.modules() if isinstance(block, Block) for m in block.modules()}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._groups: dict[nn.Module, list[str]] = {}  # block, or a layer outside of blocks -> its weights
        for name, module, key, master in _cast_weights(model):
            self.masters[name], self.copies[name] = master, master.detach().to(dtype)
            self._places[name] = module, key
            self._groups.setdefault(blocks.get(module, module), []).append(name)
        self._linked: set[nn.Module] = set()  # groups whose copies autograd knows
        self._note()

    def verify(self) -> None:
        """See Copies. What was written in place counts up a version, and is cast before it is used."""
        self._catch_up()
        super().verify()

    @contextmanager
    def used(self) -> Iterator[None]:
        """See Copies. For one forward that is differentiated, in which a weight's gradient is cast once, as autocast
        keeps its casts, or for any number of others."""
        self._catch_up()
        # As a block begins: autograd goes back by the order in which nodes were made, and gradients are to be reduced
        # while backward runs.
        handles = [unit.register_forward_pre_hook(self._enter) for unit in self._groups]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, key in self._places.values():
                module.__dict__.pop(key, None)
            self._linked.clear()

    def _enter(self, unit: nn.Module, inputs: tuple) -> None:
        """Lets a block, or a layer, compute with its copies."""
        if unit in self._linked:
            return
        names = self._groups[unit]
        trained = [name for name in names if self.masters[name].requires_grad] if torch.is_grad_enabled() else []
        values = {name: self.copies[name] for name in names}
        if trained:
            linked = _Link.apply([self.copies[name] for name in trained], *(self.masters[name] for name in trained))
            values |= zip(trained, linked)
            self._linked.add(unit)
        for name in names:
            module, key = self._places[name]
            module.__dict__[key] = values[name]  # found before what Module keeps as a parameter of this name

    def _catch_up(self) -> None:
        if self._seen != [master._version for master in self.masters.values()]:
            self.refresh()

    def _note(self) -> None:
        super()._note()
        self._seen = [master._version for master in self.masters.values()]


class _Link(torch.autograd.Function):
    """Gives copies for masters; of the copies' gradients, all of which arrive or none, makes the masters'."""

    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [grad for grad in grads if grad is not None]
        cast = [torch.empty_like(grad, dtype=torch.float32) for grad in found]
        torch._foreach_copy_(cast, found)
        following = iter(cast)
        return None, *(None if grad is None else next(following) for grad in grads)


def _cast_weights(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """Returns (name, module, key in it, parameter) of every parameter that autocast casts in every forward."""
    return [
        (f"{path}.{key}", module, key, parameter)
        for path, module in model.named_modules()
        if _is_cast(path, module)
        for key, parameter in module.named_parameters(recurse=False)
        if not _is_wide(f"{path}.{key}", parameter)
    ]


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


def are_kept(config: Config, world_size: int) -> bool:
    """Returns whether weights are cast once per update, not by autocast in every forward.

    Not beside offloaded weights, which are to take little memory between steps; not in compiled blocks, where casts
    share kernels; not where weights are gathered block by block, or an engine casts by itself; and not under a task of
    another place, which may call layers outside of autocast.
    """
    dtype, parallel = DTYPES[config.engine.precision], config.parallel
    left = config.engine.offload != "none" or parallel.compile != "none" or is_outside(config.task.name)
    if dtype not in (torch.bfloat16, torch.float16) or left:
        return False
    whole = config.engine.name == "fairscale" or (config.engine.name == "torch" and parallel.zero <= 1)
    return world_size == 1 or whole


def copies_of(model: nn.Module, config: Config, *, world_size: int) -> Copies | None:
    """Returns the copies of a network that is about to be trained; None where they are not kept (are_kept)."""
    if not are_kept(config, world_size):
        return None
    return (WeightCopies if world_size == 1 else LinkedCopies)(model, DTYPES[config.engine.precision])
