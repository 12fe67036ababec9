"""Corner pooling (arXiv:1808.01244): what lies from a cell on towards the other side of a box whose corner it is.

Facts: SwinTransformer/Swin-Transformer-Object-Detection; names are those of its checkpoints.

Shape legend: B images, C channels, H x W cells.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import ConvModule, with_initial


def pooled_from(x: Tensor, dim: int, *, forward: bool) -> Tensor:
    """Returns the map in which each cell is the largest of those from it on, downwards or to the right.

    Args:
        dim: 2 = along a column, 3 = along a row.
        forward: Of those up to it instead: upwards, to the left.
    """
    if not x.shape[0]:
        return x  # cummax has no gradient of nothing
    return x.cummax(dim).values if forward else x.flip(dim).cummax(dim).values.flip(dim)


class CornerPool(nn.Module):
    """Features of upper left corners, which see what is below and to the right of them, or of lower right ones."""

    def __init__(self, channels: int, pooled: int, groups: int, *, lower: bool) -> None:
        super().__init__()
        self.lower = lower
        self.p1_conv1 = ConvModule(channels, pooled, 3, group_norm=groups)
        self.p2_conv1 = ConvModule(channels, pooled, 3, group_norm=groups)
        self.p_conv1 = with_initial(nn.Conv2d(pooled, channels, 3, padding=1, bias=False), "he")
        self.p_gn1 = nn.GroupNorm(groups, channels)
        self.conv1 = with_initial(nn.Conv2d(channels, channels, 1, bias=False), "he")
        self.gn1 = nn.GroupNorm(groups, channels)
        self.conv2 = ConvModule(channels, channels, 1, group_norm=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, H, W)."""
        column = pooled_from(self.p1_conv1(x), 2, forward=self.lower)
        row = pooled_from(self.p2_conv1(x), 3, forward=self.lower)
        return self.conv2(F.relu(self.p_gn1(self.p_conv1(column + row)) + self.gn1(self.conv1(x))))
