"""UPerNet (arXiv:1807.10221) on a Swin pyramid, with the auxiliary head of the official segmentation code.

Facts: SwinTransformer/Swin-Transformer-Semantic-Segmentation, mmseg/models/decode_heads: uper_head, psp_head, fcn_head.
Parameter names are the official ones.

Shape legend: B images (0 is legal), C channels, H x W of a map, K classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense import counting
from swin_moe.models.dense.layers import ConvModule, with_initial
from swin_moe.models.dense.network import DenseNetwork
from swin_moe.models.dense.pyramid import PyramidBackbone
from swin_moe.models.layers import ModuleList, dropout_factor, widened
from swin_moe.ops.random_draws import with_words
from swin_moe.randomness import RandomContext

CLASS_STD = 0.01  # of the initial weights of the last layer


class Segmented(NamedTuple):
    """What one forward gives."""

    logits: Tensor  # (B, K, H, W) at the resolution of the first map, in at least float32
    auxiliary: Tensor | None  # (B, K, H, W) of the auxiliary head; None in evaluation, and without that head
    aux: Tensor | None  # the backbone's auxiliary loss, weighted


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Returns the map at another size, bilinear by pixel centres; itself at its own."""
    height, width = size
    if tuple(x.shape[2:]) == (height, width):
        return x
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def _conv(in_channels: int, out_channels: int, kernel: int) -> ConvModule:
    return ConvModule(in_channels, out_channels, kernel, norm=True)


class Head(nn.Module):
    """What both heads end with: channels of an image are dropped, then a class layer.

    layer: Number that draws of this head depend on.
    """

    def __init__(self, channels: int, num_classes: int, *, dropout: float, layer: int) -> None:
        super().__init__()
        self.dropout, self.layer = dropout, layer
        self.conv_seg = with_initial(nn.Conv2d(channels, num_classes, 1), CLASS_STD)

    def classify(self, x: Tensor, random: RandomContext | None) -> Tensor:
        """Returns (B, K, H, W), in at least float32. random: None in evaluation."""
        if random is not None and self.dropout > 0:
            factor = dropout_factor(self.dropout, random.sample, x.shape[1], random, layer=self.layer, site=0)
            x = x * factor[:, :, None, None].to(x.dtype)
        return widened(self.conv_seg(x))


class Pooling(nn.Sequential):
    """Averages a map over a grid of scale x scale cells, then a 1 x 1 convolution, whose official index is 1."""

    def __init__(self, scale: int, in_channels: int, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(scale), _conv(in_channels, channels, 1))
        self.scale, self.in_channels = scale, in_channels

    @property
    def conv(self) -> ConvModule:
        """The convolution."""
        layer = self[1]
        assert isinstance(layer, ConvModule), "as it was built"
        return layer


class UPerHead(Head):
    """Pyramid pooling of the last map, sums from coarse to fine, and all levels fused at the finest."""

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        *,
        pool_scales: Sequence[int],
        dropout: float,
        layer: int,
    ) -> None:
        super().__init__(channels, num_classes, dropout=dropout, layer=layer)
        last = in_channels[-1]
        self.psp_modules = ModuleList(Pooling(scale, last, channels) for scale in pool_scales)
        self.bottleneck = _conv(last + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = ModuleList(_conv(n, channels, 1) for n in in_channels[:-1])
        self.fpn_convs = ModuleList(_conv(channels, channels, 3) for _ in in_channels[:-1])
        self.fpn_bottleneck = _conv(len(in_channels) * channels, channels, 3)

    def pooled(self, x: Tensor) -> Tensor:
        """Returns the last map with what it is as a whole, (B, channels, H, W)."""
        return self.bottleneck(torch.cat([x, *(resized(pool(x), x.shape[2:]) for pool in self.psp_modules)], dim=1))

    def forward(self, maps: Sequence[Tensor], random: RandomContext | None) -> Tensor:
        """Returns logits (B, K, H, W) at the resolution of the first map."""
        sums = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1])] + [self.pooled(maps[-1])]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + resized(sums[i], sums[i - 1].shape[2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, sums[:-1])] + [sums[-1]]
        fused = self.fpn_bottleneck(torch.cat([resized(x, outs[0].shape[2:]) for x in outs], dim=1))
        return self.classify(fused, random)


class FCNHead(Head):
    """One 3 x 3 convolution of one map, then classes."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, *, dropout: float, layer: int) -> None:
        super().__init__(channels, num_classes, dropout=dropout, layer=layer)
        self.convs = ModuleList([_conv(in_channels, channels, 3)])

    def forward(self, x: Tensor, random: RandomContext | None) -> Tensor:
        """Returns logits (B, K, H, W) at the resolution of x."""
        return self.classify(self.convs[0](x), random)


class UPerNet(DenseNetwork):
    """A pyramid backbone, the decode head, and in training an auxiliary head on one map."""

    def __init__(
        self,
        backbone: PyramidBackbone,
        *,
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        auxiliary_channels: int = 256,
        auxiliary_index: int = 2,
        image_size: tuple[int, int] = (512, 512),
        official_groups: bool = False,
    ) -> None:
        """Builds the modules; weights come from init_weights. Works on meta and without a process group.

        Args:
            channels: Of everything in the decode head.
            pool_scales: Sides of the grids the last map is pooled to.
            dropout: Probability that a channel of an image is dropped before the class layer.
            auxiliary_channels: Of the auxiliary head; 0 = there is none.
            auxiliary_index: Which of the backbone's maps that head reads.
            image_size, official_groups: See DenseNetwork.
        """
        super().__init__(backbone, image_size=image_size, official_groups=official_groups)
        self.auxiliary_index = auxiliary_index
        layer = sum(backbone.config.depths) + 1  # after all that draws in the backbone
        self.decode_head = UPerHead(
            backbone.channels, channels, num_classes, pool_scales=pool_scales, dropout=dropout, layer=layer
        )
        self.auxiliary_head = None
        if auxiliary_channels:
            source = backbone.channels[auxiliary_index]
            self.auxiliary_head = FCNHead(source, auxiliary_channels, num_classes, dropout=dropout, layer=layer + 1)

    def forward(self, image: Tensor, random: RandomContext | None = None, size: Tensor | None = None) -> Segmented:
        """Returns the logits of images (B, channels, height, width) of any size; B may be 0.

        Args:
            random: What training draws from; None = a fresh context from torch's generator. Unused in evaluation.
            size: (B, 2) int64, see PyramidBackbone.forward.
        """
        if not self.training:
            random = None
        elif random is None:
            random = RandomContext.fresh(len(image), image.device)
        random = None if random is None else with_words(random)
        maps, aux = self.backbone(image, random=random, size=size)
        auxiliary = None
        if self.auxiliary_head is not None and self.training:
            auxiliary = self.auxiliary_head(maps[self.auxiliary_index], random)
        return Segmented(self.decode_head(maps, random), auxiliary, aux)

    def counted_beside(self, maps: list[tuple[int, int]]) -> int:
        """See DenseNetwork: of the decode head, which is all that evaluation needs."""
        head, last = self.decode_head, maps[-1]
        total = counting.convolution(head.conv_seg, maps[0])
        for pool in head.psp_modules:
            total += math.prod(last) * pool.in_channels + counting.conv_module(pool.conv, (pool.scale, pool.scale))
        for lateral, smooth, size in zip(head.lateral_convs, head.fpn_convs, maps):
            total += counting.conv_module(lateral, size) + counting.conv_module(smooth, size)
        fused = ((head.bottleneck, last), (head.fpn_bottleneck, maps[0]))
        return total + sum(counting.conv_module(module, size) for module, size in fused)
