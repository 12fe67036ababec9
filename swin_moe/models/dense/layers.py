"""Layers that the heads of dense networks share, under the official names, and how their weights begin.

Shape legend: B images, C channels, H x W of a map.
"""

import math
import zlib
from collections.abc import Collection
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.norms import BatchNorm2d
from swin_moe.models.initialize import initialize
from swin_moe.randomness import derive_key

Initial = float | Literal["xavier", "he"]  # a standard deviation; Xavier's uniform; He's normal over the outputs
L = TypeVar("L", bound=nn.Module)


def with_initial(layer: L, initial: Initial, *, bias: float = 0.0) -> L:
    """Returns the layer, marked with how init_weights fills its weight, and with what its bias begins."""
    layer.initial, layer.initial_bias = initial, bias  # type: ignore[assignment]  # torch says of no attribute what
    return layer


class ConvModule(nn.Module):
    """A convolution that keeps the size, as `conv`, then batch norm, as `bn`, or group norm, as `gn`, where there is
    one, and ReLU.

    Args:
        norm: With batch norm, in which case the convolution has no bias.
        group_norm: With group norm of so many groups, likewise; 0 = without.
        activation: With ReLU at the end.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        norm: bool = False,
        group_norm: int = 0,
        activation: bool = True,
        initial: Initial = "he",
    ) -> None:
        super().__init__()
        bias = not (norm or group_norm)
        convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
        self.conv = with_initial(convolution, initial)
        self.bn = BatchNorm2d(out_channels) if norm else None
        self.gn = nn.GroupNorm(group_norm, out_channels) if group_norm else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, out_channels, H, W)."""
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        x = x if self.gn is None else self.gn(x)
        return F.relu(x, inplace=True) if self.activation else x


def init_weights(part: nn.Module, key: int, *, std: float, only: Collection[nn.Module] | None = None) -> None:
    """Fills a part of a dense network as its layers are marked, and what is not as the backbone's rules say.

    A value depends on the key and on the parameter's name in `part`.

    Args:
        std: Of linear layers that are not marked.
        only: Modules whose own parameters are filled; None = all.
    """
    initialize(part, key, std=std, only=only)
    for name, module in part.named_modules():
        initial = getattr(module, "initial", None)
        if initial is None or (only is not None and module not in only):
            continue
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor), "only layers are marked"
        generator = torch.Generator().manual_seed(derive_key(key, zlib.crc32(name.encode())))
        value = torch.empty(weight.shape)
        if initial == "xavier":
            nn.init.xavier_uniform_(value, generator=generator)
        else:
            nn.init.normal_(value, std=_he(value) if initial == "he" else initial, generator=generator)
        with torch.no_grad():
            weight.copy_(value)
            if isinstance(bias, Tensor):
                bias.fill_(getattr(module, "initial_bias", 0.0))


def _he(weight: Tensor) -> float:
    return math.sqrt(2 / (weight.shape[0] * math.prod(weight.shape[2:])))
