"""Masked image modelling on a Swin encoder (SimMIM, arXiv:2111.09886; microsoft/Swin-Transformer, models/simmim.py).

Shape legend: B images, S channels of an image, height x width pixels, H x W patches, U mask units of an image.
"""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.initialize import initialize
from swin_moe.models.swin import SwinTransformer
from swin_moe.randomness import RandomContext


class PixelShuffle(nn.PixelShuffle):
    """torch.nn.PixelShuffle for a batch that may have no image, which torch's backward refuses."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, S, H * r, W * r) of (B, S * r ** 2, H, W), r the upscale factor."""
        if len(x):
            return super().forward(x)
        _, channels, height, width = x.shape
        r = self.upscale_factor
        return x.reshape(0, channels // r**2, height * r, width * r)


class MaskedImageModel(nn.Module):
    """An encoder with a mask token and one convolution that predicts the pixels of every encoder token."""

    def __init__(self, encoder: SwinTransformer, *, encoder_stride: int = 0, official_groups: bool = False) -> None:
        """Builds the decoder.

        Args:
            encoder_stride: Pixels per side that one token of the last stage stands for; 0 = as the encoder's sizes say.
            official_groups: Weight decay where the official code has it: also on bias tables, bias networks and
                logit scales, because it asks for names that begin with "encoder." within names.

        Raises:
            ValueError: The encoder has no mask token, or has a classification head, or patches that are not square.
        """
        super().__init__()
        if not hasattr(encoder, "mask_token") or encoder.num_classes != 0:
            raise ValueError("a masked image model needs an encoder with mask_token=True and model.num_classes=0")
        config = encoder.config
        if config.patch_size[0] != config.patch_size[1]:
            raise ValueError(f"a masked image model needs square patches, got model.patch_size={config.patch_size}")
        stride = encoder_stride or config.patch_size[0] * 2 ** (len(config.depths) - 1)
        self.encoder, self.official_groups = encoder, official_groups
        pixels = stride**2 * config.in_chans
        self.decoder = nn.Sequential(nn.Conv2d(encoder.num_features, pixels, 1), PixelShuffle(stride))

    def forward(self, image: Tensor, mask: Tensor, random: RandomContext | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns (reconstruction (B, S, height, width), auxiliary loss or None). mask: (B, H, W), 1 = hidden patch."""
        encoded = self.encoder.encode(image, random=random, mask=mask)
        # Contiguous, or the gradient of the weights would have other strides than the weights.
        return self.decoder(encoded.tokens.permute(0, 3, 1, 2).contiguous()), encoded.aux

    def init_weights(self, seed: int, only: Collection[nn.Module] | None = None) -> None:
        """Fills every parameter as a function of the seed and its name in the encoder or decoder.

        only: Modules whose own parameters are filled; None = all.
        """
        self.encoder.init_weights(seed, only)
        initialize(self.decoder, seed, std=self.encoder.config.init_std, only=only)

    def flops(self) -> float:
        """Returns the official count of multiply-accumulates of one image, which leaves the decoder out."""
        return self.encoder.flops()

    def active_flops(self) -> float:
        """Returns the multiply-accumulates one image really costs, the decoder's among them."""
        convolution = self.decoder[0]
        stride = self.decoder[1].upscale_factor
        tokens = math.prod(-(-side // stride) for side in self.encoder.img_size)
        return self.encoder.active_flops() + tokens * convolution.in_channels * convolution.out_channels

    def no_weight_decay(self) -> set[str]:
        """Returns full names of parameters without weight decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def no_weight_decay_keywords(self) -> set[str]:
        """Returns strings; a parameter whose name contains one has no weight decay."""
        keywords = self.encoder.no_weight_decay_keywords()
        return {f"encoder.{word}" for word in keywords} if self.official_groups else keywords


def num_masked(num_units: int, ratio: float) -> int:
    """Returns how many of an image's mask units are hidden, rounded up as in the official MaskGenerator."""
    return math.ceil(num_units * ratio)


def mask_of_order(order_BU: Tensor, grid: tuple[int, int], hidden: int, patches: int) -> Tensor:
    """Returns the mask (B, H, W) bool, True = hidden: the first `hidden` mask units of every row's order.

    Args:
        order_BU: (B, U) int64, a permutation of the units of each image, row by row.
        grid: Units per column and row, U = grid[0] * grid[1].
        patches: Patches per side of a unit.
    """
    units = torch.zeros(order_BU.shape, dtype=torch.bool, device=order_BU.device)
    units.scatter_(1, order_BU[:, :hidden], True)
    return units.view(-1, *grid).repeat_interleave(patches, 1).repeat_interleave(patches, 2)


def masked_l1_sum(image: Tensor, reconstruction: Tensor, mask: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Returns the sum of absolute errors over hidden pixels and channels, a scalar; 0 for no images."""
    pixels = mask.repeat_interleave(patch_size[0], 1).repeat_interleave(patch_size[1], 2)[:, None].to(image.dtype)
    return ((image - reconstruction).abs() * pixels).sum()


def masked_l1(image: Tensor, reconstruction: Tensor, mask: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Returns the mean absolute error over hidden pixels, a scalar: sum / (hidden pixels + 1e-5) / S."""
    hidden = mask.to(image.dtype).sum() * math.prod(patch_size)
    return masked_l1_sum(image, reconstruction, mask, patch_size) / (hidden + 1e-5) / image.shape[1]


def local_statistics(image: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Returns (mean, standard deviation), as large as the image, over an odd window of pixels around each pixel.

    Padding counts for nothing. The variance is the unbiased one, clamped at 0, plus 1e-6.

    Raises:
        ValueError: An even window.
    """
    if window % 2 == 0:
        raise ValueError(f"the window of normalized targets must be odd, got {window}")
    options = {"kernel_size": window, "stride": 1, "padding": window // 2}
    mean = F.avg_pool2d(image, **options, count_include_pad=False)
    mean_square = F.avg_pool2d(image.square(), **options, count_include_pad=False)
    count = F.avg_pool2d(torch.ones_like(image), **options, count_include_pad=True) * window**2
    variance = ((mean_square - mean.square()) * (count / (count - 1))).clamp_min(0.0)
    return mean, (variance + 1e-6).sqrt()


def normalize_targets(image: Tensor, window: int) -> Tensor:
    """Returns the image with mean 0 and variance 1 over the window around each pixel; see local_statistics."""
    mean, deviation = local_statistics(image, window)
    return (image - mean) / deviation
