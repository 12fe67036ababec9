"""The neck: maps of all levels, mixed down and up again by learned shares (arXiv:1911.09070), under official names.

Facts: SwinTransformer/Swin-Transformer-Object-Detection, mmdet/models/necks/bifpn.py.

Shape legend: B images, C channels, H_i x W_i of level i.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import ConvModule
from swin_moe.models.layers import ModuleList

_SMALLEST_SUM = 1e-4  # that is added to the sum of shares


def coarser(x: Tensor) -> Tensor:
    """Returns (B, C, ceil(H / 2), ceil(W / 2)), the largest of 3 x 3 cells."""
    return F.max_pool2d(x, 3, stride=2, padding=1)


class Combination(nn.Module):
    """The sum of maps of one size, times shares that are learned, and SiLU."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(1, 1, 1, 1, count))

    def reset_parameters(self) -> None:
        """Fills the shares: equal ones."""
        nn.init.ones_(self.weights)

    def forward(self, *maps: Tensor) -> Tensor:
        """Returns (B, C, H, W)."""
        share = F.relu(self.weights).flatten()
        share = share / (share.sum() + _SMALLEST_SUM)
        total = maps[0] * share[0]
        for x, own in zip(maps[1:], share[1:]):
            total = total + x * own
        return F.silu(total)


class Pass(nn.Module):
    """Once down, from coarse to fine, and once up."""

    def __init__(self, in_channels: Sequence[int], channels: int, groups: int) -> None:
        super().__init__()
        count = len(in_channels)

        def conv(width: int, kernel: int) -> ConvModule:
            return ConvModule(width, channels, kernel, group_norm=groups, activation=False, initial="xavier")

        laterals = [nn.Identity() if width == channels else conv(width, 1) for width in in_channels]
        self.lateral_convs = ModuleList(laterals)
        self.lateral_combine = ModuleList(Combination(2) for _ in range(count - 1))
        self.lateral_combine_conv = ModuleList(conv(channels, 3) for _ in range(count - 1))
        self.out_combine = ModuleList(Combination(3 if i < count - 2 else 2) for i in range(count - 1))
        self.out_combine_conv = ModuleList(conv(channels, 3) for _ in range(count - 1))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns (B, C, H_i, W_i) of every level."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        found = list(laterals)
        for i in range(len(found) - 1, 0, -1):
            above = F.interpolate(found[i], size=found[i - 1].shape[2:], mode="nearest")
            found[i - 1] = self.lateral_combine_conv[i - 1](self.lateral_combine[i - 1](found[i - 1], above))
        for i in range(len(found) - 1):
            mixed = [coarser(found[i]), found[i + 1]]
            if i < len(found) - 2:  # of the coarsest level the lateral is what it is
                mixed.append(laterals[i + 1])
            found[i + 1] = self.out_combine_conv[i](self.out_combine[i](*mixed))
        return found


class BiFPN(nn.Module):
    """Passes over the backbone's maps and the coarser ones that are pooled from the last of them."""

    def __init__(self, in_channels: Sequence[int], channels: int, *, levels: int, repeats: int, groups: int) -> None:
        super().__init__()
        self.levels = levels
        widths = [*in_channels, *[in_channels[-1]] * (levels - len(in_channels))]
        self.bi_fpn = ModuleList(Pass([channels] * levels if i else widths, channels, groups) for i in range(repeats))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns (B, C, H_i, W_i) of every level."""
        found = list(maps)
        while len(found) < self.levels:
            found.append(coarser(found[-1]))
        for one in self.bi_fpn:
            found = one(found)
        return found
