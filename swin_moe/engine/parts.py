"""What an engine of torch's own optimizers holds: a plain tensor per parameter, whole or this rank's cut of it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swin_moe.checkpoint import Piece
from swin_moe.config import Config
from swin_moe.engine.weight_copies import Copies
from swin_moe.layout import Chunk
from swin_moe.models.network import Network
from swin_moe.optim import parameter_groups


@dataclass
class Part:
    """This rank's part of one parameter: what is updated, averaged and saved."""

    name: str
    parameter: nn.Parameter  # the model's; may be a DTensor
    leaf: nn.Parameter  # what the optimizer updates, plain: of the same memory, on the CPU (engine.offload) or a master
    shape: tuple[int, ...]  # global
    chunk: Chunk  # the box of it that local and leaf hold

    @property
    def local(self) -> Tensor:
        """This rank's part of the model's parameter; asked anew, as libraries move parameters to their own buffers."""
        return local_tensor(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of `local`, or of its master."""
        found = self.leaf.grad if self.leaf.grad is not None else self.parameter.grad
        return None if found is None else local_tensor(found)

    @property
    def offloaded(self) -> bool:
        """True where the optimizer's copy is not the model's memory."""
        return self.leaf.data_ptr() != self.local.data_ptr() and self.local.numel() > 0

    def piece(self, saved: str, tensor: Tensor | None) -> Piece:
        """Returns the piece for this part; an empty one where the tensor is another rank's."""
        if tensor is None:
            empty = (0,) * len(self.shape)
            return Piece(saved, self.shape, self.leaf.dtype, Chunk(empty, empty), self.leaf.new_empty(empty))
        return Piece(saved, self.shape, tensor.dtype, self.chunk, tensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a parameter or gradient, a plain tensor of the same memory."""
    plain: Any = tensor if type(tensor) is Tensor else tensor.detach()
    return plain if type(plain) is Tensor else plain.to_local()  # FSDP2 cuts into DTensors


class Parts(dict[str, Part]):
    """All parts by parameter name, which is the label; see common.py:Held.

    Args:
        model: Materialized and, where parameters are cut, cut.
        layout: Parameter -> (global shape, the box this rank holds).
        copies: Of weights that the network computes with in half precision.
    """

    def __init__(
        self,
        model: Network,
        layout: Mapping[str, tuple[tuple[int, ...], Chunk]],
        config: Config,
        *,
        copies: Copies | None = None,
    ):
        self._offload, self.copies = config.engine.offload == "optimizer", copies
        super().__init__((name, self._part(name, p, *layout[name])) for name, p in model.named_parameters())
        self.param_groups = parameter_groups(model, config.optim, config.model.depths)
        for group in self.param_groups:
            group["params"] = [self[name].leaf for name in group["names"]]
        self.trainable = [name for group in self.param_groups for name in group["names"]]
        self.states: dict[str, dict] = {}

    def _part(self, name: str, parameter: nn.Parameter, shape: tuple[int, ...], chunk: Chunk) -> Part:
        local = local_tensor(parameter)
        leaf = parameter if self.copies is None else self.copies.masters.get(name, parameter)
        assert tuple(local.shape) == chunk.size, f"{name}: {tuple(local.shape)} held, {chunk} expected"
        if self._offload:
            leaf = nn.Parameter(local.to("cpu", copy=True), requires_grad=parameter.requires_grad)
        elif type(parameter.detach()) is not Tensor:
            leaf = nn.Parameter(local, requires_grad=parameter.requires_grad)
        return Part(name, parameter, leaf, shape, chunk)

    def follow(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Finds the optimizer state of every part that this rank updates."""
        names = {self[name].leaf: name for name in self.trainable}
        for optimizer in optimizers:
            own = getattr(optimizer, "optim", optimizer)  # of a wrapper: the optimizer of this rank's share
            self.states |= {names[leaf]: own.state[leaf] for group in own.param_groups for leaf in group["params"]}

    @property
    def weights(self) -> dict[str, Tensor]:
        """See Held."""
        return {name: part.leaf.detach() for name, part in self.items()}

    def gradients(self) -> list[Tensor]:
        """See Held."""
        found = [self[name].gradient for name in self.trainable]
        return [gradient for gradient in found if gradient is not None]

    def apply(self, optimizers: list[torch.optim.Optimizer]) -> bool:
        """See Held."""
        for part in map(self.__getitem__, self.trainable):
            if part.leaf is not part.parameter:
                gradient = part.gradient
                part.leaf.grad = gradient if gradient is None else gradient.to(part.leaf.device)
        for optimizer in optimizers:
            optimizer.step()
        return True

    def settle(self) -> None:
        """See Held."""
        self.publish()
        self.discard()

    def first_not_finite(self) -> str | None:
        """See Held."""
        for name in self.trainable:
            gradient = self[name].gradient
            if gradient is not None and not torch.isfinite(gradient).all():
                return name
        return None

    def discard(self) -> None:
        """See Held."""
        for name in self.trainable:
            self[name].parameter.grad = self[name].leaf.grad = None

    def publish(self) -> None:
        """See Held."""
        if self._offload:
            for part in self.values():
                part.local.copy_(part.leaf)
        if self.copies is not None:
            self.copies.refresh()

    def collect(self) -> None:
        """Brings gradients of a backward to what the optimizer updates, where the network holds copies."""
        if self.copies is not None:
            self.copies.collect()

    def copies_used(self) -> AbstractContextManager:
        """Returns a context in which the network computes with its copies, where it has any."""
        return nullcontext() if self.copies is None else self.copies.used()

    def pieces_of(self, saved: str, name: str, tensors: Mapping[str, Tensor]) -> list[Piece]:
        """See Held."""
        return [self[name].piece(saved, tensors.get(name))]
