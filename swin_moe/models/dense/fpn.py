"""Feature pyramid network (arXiv:1612.03144) as the official detectors have it: no norm, no activation.

Facts: open-mmlab/mmdetection 2.11.0, mmdet/models/necks/fpn.py.

Shape legend: B images, C channels, H x W of a map.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import ConvModule
from swin_moe.models.layers import ModuleList


def _conv(in_channels: int, out_channels: int, kernel: int) -> ConvModule:
    return ConvModule(in_channels, out_channels, kernel, activation=False, initial="xavier")


class FPN(nn.Module):
    """Lateral 1 x 1 convolutions, sums from coarse to fine, and a 3 x 3 convolution of every sum."""

    def __init__(self, in_channels: Sequence[int], channels: int = 256, *, levels: int = 5) -> None:
        """levels: Maps given; those beyond the backbone's are every second pixel of the one before."""
        super().__init__()
        if levels < len(in_channels):
            raise ValueError(f"levels must be at least {len(in_channels)}, one per map of the backbone, got {levels}")
        self.levels = levels
        self.lateral_convs = ModuleList(_conv(n, channels, 1) for n in in_channels)
        self.fpn_convs = ModuleList(_conv(channels, channels, 3) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns `levels` maps (B, channels, H, W), finest first.

        maps: (B, in_channels[i], H_i, W_i), finest first.
        """
        sums = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[2:], mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, sums)]
        while len(outputs) < self.levels:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return outputs
