"""Masked image modelling on a Swin encoder (SimMIM, arXiv:2111.09886; microsoft/Swin-Transformer, models/simmim.py).

Shape legend: B images, S channels of an image, height x width pixels, H x W patches.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.initialize import initialize
from swin_moe.models.swin import SwinTransformer
from swin_moe.randomness import RandomContext


class MaskedImageModel(nn.Module):
    """An encoder with a mask token and one convolution that predicts the pixels of every encoder token."""

    def __init__(self, encoder: SwinTransformer, *, encoder_stride: int = 32) -> None:
        """Builds the decoder. encoder_stride: pixels per side that one token of the last stage stands for.

        Raises:
            ValueError: The encoder has no mask token, or has a classification head.
        """
        super().__init__()
        if not hasattr(encoder, "mask_token") or encoder.num_classes != 0:
            raise ValueError("a masked image model needs an encoder with mask_token=True and model.num_classes=0")
        self.encoder = encoder
        pixels = encoder_stride**2 * encoder.config.in_chans
        self.decoder = nn.Sequential(nn.Conv2d(encoder.num_features, pixels, 1), nn.PixelShuffle(encoder_stride))

    def forward(self, image: Tensor, mask: Tensor, random: RandomContext | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns (reconstruction (B, S, height, width), auxiliary loss or None). mask: (B, H, W), 1 = hidden patch."""
        encoded = self.encoder.encode(image, random=random, mask=mask)
        return self.decoder(encoded.tokens.permute(0, 3, 1, 2)), encoded.aux

    def init_weights(self, seed: int, only: Collection[nn.Module] | None = None) -> None:
        """Fills every parameter as a function of the seed and its name in the encoder or decoder.

        only: Modules whose own parameters are filled; None = all.
        """
        self.encoder.init_weights(seed, only)
        initialize(self.decoder, seed, std=self.encoder.config.init_std, only=only)

    def no_weight_decay(self) -> set[str]:
        """Returns full names of parameters without weight decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def no_weight_decay_keywords(self) -> set[str]:
        """Returns strings; a parameter whose name contains one has no weight decay."""
        return self.encoder.no_weight_decay_keywords()


def masked_l1(image: Tensor, reconstruction: Tensor, mask: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Returns the mean absolute error over hidden pixels, a scalar: sum / (hidden pixels + 1e-5) / S."""
    pixels = mask.repeat_interleave(patch_size[0], 1).repeat_interleave(patch_size[1], 2)[:, None].to(image.dtype)
    error = (image - reconstruction).abs() * pixels
    return error.sum() / (pixels.sum() + 1e-5) / image.shape[1]


def normalize_targets(image: Tensor, window: int) -> Tensor:
    """Returns the image with mean 0 and variance 1 over an odd window around each pixel; padding counts for nothing.

    The variance is the unbiased one, clamped at 0, plus 1e-6.

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
    return (image - mean) / (variance + 1e-6).sqrt()
