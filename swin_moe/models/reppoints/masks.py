"""Masks of RepPoints V2: small convolutions over one map of the image, whose weights each cell says itself.

Facts: arXiv:2003.05664 (conditional convolutions); SwinTransformer/Swin-Transformer-Object-Detection,
mmdet/models/roi_heads/mask_heads/condconv_mask_head.py and mmdet/models/dense_heads/reppoints_v2_head.py; names are
those of its checkpoints.

Shape legend: B images, C channels, H x W of the first level's map, N cells of all levels, R cells that have an object,
S features of a mask, X numbers that a cell says, G objects of an image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import ConvModule, with_initial
from swin_moe.models.layers import ModuleList, widened
from swin_moe.models.reppoints.spec import FEATURES, PointMaskSpec

LEVELS = 3  # of the finest maps, which the branch looks at
LARGEST = 8  # strides of its level that an object is expected to have at most: what places are measured in
_SMALLEST_SUM = 1e-5  # that is added to areas
_MOST_PIXELS = 1 << 24  # of masks that are drawn in one go

# What a cell says, in this order: weights of three layers (out x in), their biases, and a weight and a bias each for a
# guess before the first layer and one before the second, which only training asks for.
_INPUTS = FEATURES + 2  # beside the features a pixel has its place
_SIZES = (FEATURES * _INPUTS, FEATURES * FEATURES, FEATURES, FEATURES, FEATURES, 1, _INPUTS, FEATURES, 1, 1)
SAID = sum(_SIZES)  # 189


class MaskBranch(nn.Module):
    """The features of the image's masks, from the finest maps."""

    def __init__(self, channels: int, spec: PointMaskSpec) -> None:
        super().__init__()
        self.refine = ModuleList(ConvModule(channels, spec.channels, 3, norm=True) for _ in range(LEVELS))
        tower: list[nn.Module] = [ConvModule(spec.channels, spec.channels, 3, norm=True) for _ in range(spec.convs)]
        self.tower = ModuleList([*tower, with_initial(nn.Conv2d(spec.channels, FEATURES, 1), "he")])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Returns (B, S, H, W) in at least float32; maps: (B, C, H_i, W_i) of every level, each half of the last."""
        total = self.refine[0](maps[0])
        height, width = total.shape[2:]
        for level in range(1, LEVELS):
            total = total + enlarged(self.refine[level](maps[level]), 2**level)[:, :, :height, :width]
        for layer in self.tower:
            total = layer(total)
        return widened(total)


class PointMasks(nn.Module):
    """The branch under its official name."""

    def __init__(self, channels: int, spec: PointMaskSpec) -> None:
        super().__init__()
        self.branch = MaskBranch(channels, spec)


def enlarged(x: Tensor, factor: int) -> Tensor:
    """Returns (B, C, factor H, factor W): pixel i lies at (i - factor // 2) / factor of the map, between its cells
    linearly, and before the first one as that."""
    height, width = x.shape[2:]
    if factor == 1:
        return x
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, size=(factor * height + 1, factor * width + 1), mode="bilinear", align_corners=True)
    x = F.pad(x, (factor // 2, 0, factor // 2, 0), mode="replicate")
    return x[:, :, : factor * height, : factor * width]


def guesses(features: Tensor, image_R: Tensor, said_RX: Tensor, place_R2: Tensor, reach_R: Tensor, stride: int) -> list:
    """Returns the logits (R, H, W) of each cell's mask: before the second layer, and after the last.

    The guess before the first layer has no weight in the official loss, so it is not made.

    Args:
        features: (B, S, H, W). image: (R,) int64, which image a cell is of.
        place: x and y that places are measured from, pixels. reach: What they are measured in, pixels.
        stride: Pixels between the features' columns.
    """
    height, width = features.shape[2:]
    first, second, last, *rest = said_RX.split(_SIZES, dim=1)
    first_bias, second_bias, last_bias, _, early, _, early_bias = rest
    with torch.autocast(features.device.type, enabled=False):
        rows = [torch.arange(n, device=features.device, dtype=features.dtype) * stride for n in (width, height)]
        grid = torch.stack(torch.meshgrid(*rows, indexing="xy")) + stride // 2
        places = (place_R2[:, :, None, None] - grid) / reach_R[:, None, None, None]
        x = torch.cat([places, features[image_R]], dim=1).flatten(2)
        hidden = F.relu(torch.baddbmm(first_bias[:, :, None], first.unflatten(1, (FEATURES, _INPUTS)), x))
        before = torch.baddbmm(early_bias[:, :, None], early[:, None], hidden)
        hidden = F.relu(torch.baddbmm(second_bias[:, :, None], second.unflatten(1, (FEATURES, FEATURES)), hidden))
        after = torch.baddbmm(last_bias[:, :, None], last[:, None], hidden)
    return [logits.view(len(logits), height, width) for logits in (before, after)]


def chances(logits_RHW: Tensor) -> Tensor:
    """Returns (R, 2 H, 2 W), how probably each pixel of twice the features' resolution is the object's."""
    return enlarged(logits_RHW[:, None], 2)[:, 0].sigmoid()


def seen_coarsely(masks: Tensor, stride: int) -> Tensor:
    """Returns masks (G, H, W) at one pixel in `stride` each way, from the middle of the first on."""
    return masks[:, stride // 2 :: stride, stride // 2 :: stride]


def dice_loss(found: Tensor, target: Tensor) -> Tensor:
    """Returns (R,): 1 - the Dice coefficient with squares (arXiv:1606.04797) of (R, height, width) each."""
    height, width = (min(a, b) for a, b in zip(found.shape[1:], target.shape[1:]))
    found, target = found[:, :height, :width].flatten(1), target[:, :height, :width].to(found).flatten(1)
    shared = (found * target).sum(dim=1)
    return 1 - 2 * shared / (found.square().sum(dim=1) + target.square().sum(dim=1) + _SMALLEST_SUM)


def middles(masks: Tensor) -> Tensor:
    """Returns (G, 2) float64, x and y of the middle of each mask's pixels; (0, 0) of an empty one."""
    area = masks.sum(dim=(1, 2)).double().clamp(min=1e-6)
    found = []
    for dim in (1, 2):  # what is left is x, then y
        count = masks.sum(dim=dim).double()
        found.append((count * torch.arange(count.shape[1], device=masks.device)).sum(dim=1) / area)
    return torch.stack(found, dim=1)


def in_original(
    chance_RHW: Tensor, stride: int, size: tuple[int, int], original: tuple[int, int], threshold: float
) -> Tensor:
    """Returns (R, height, width) bool, the masks of an image before it was resized.

    Args:
        chance: At one pixel in `stride`. size, original: (height, width) after and before.
    """
    step = max(_MOST_PIXELS // max(original[0] * original[1], size[0] * size[1], 1), 1)
    drawn = [torch.zeros((0, *original), dtype=torch.bool, device=chance_RHW.device)]
    for some in chance_RHW[:, None].split(step):
        whole = enlarged(some, stride)[:, :, : size[0], : size[1]]
        drawn.append(F.interpolate(whole, size=original, mode="bilinear", align_corners=False)[:, 0] > threshold)
    return torch.cat(drawn)
