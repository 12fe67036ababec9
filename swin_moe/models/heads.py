"""Networks of pre-training tasks around a Swin encoder, and the arithmetic of their targets.

Masked image modelling: SimMIM, arXiv:2111.09886; microsoft/Swin-Transformer, models/simmim.py. Feature distillation:
arXiv:2205.14141; SwinTransformer/Feature-Distillation.

Shape legend: B images, S channels of an image, height x width pixels, H x W patches, U mask units of an image.
"""

import math
from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.attention import stage_geometry
from swin_moe.models.initialize import initialize
from swin_moe.models.network import Network
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


class EncoderModel(Network):
    """An encoder and what a pre-training task puts on it; subclasses add that in other children.

    official_groups: Weight decay where the official SimMIM code has it: also on bias tables, bias networks and logit
        scales, because it looks for words that begin with "encoder." inside names.
    """

    def __init__(self, encoder: SwinTransformer, *, official_groups: bool = False) -> None:
        super().__init__()
        if encoder.num_classes != 0:
            raise ValueError("an encoder has no class head: build it with model.num_classes=0")
        self.encoder, self.official_groups = encoder, official_groups

    def init_weights(self, seed: int, only: Collection[nn.Module] | None = None) -> None:
        """Fills every parameter as a function of the seed and its name in the encoder or in another child.

        only: Modules whose own parameters are filled; None = all.
        """
        self.encoder.init_weights(seed, only)
        for name, child in self.named_children():
            if name != "encoder":
                initialize(child, seed, std=self.encoder.config.init_std, only=only)

    def flops(self) -> float:
        """Returns the official count of multiply-accumulates of one image, which leaves the other children out."""
        return self.encoder.flops()

    def active_flops(self) -> float:
        """Returns the multiply-accumulates one image really costs."""
        return self.encoder.active_flops()

    def no_weight_decay(self) -> set[str]:
        """Returns full names of parameters without weight decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def no_weight_decay_keywords(self) -> set[str]:
        """Returns strings; a parameter whose name contains one has no weight decay."""
        keywords = self.encoder.no_weight_decay_keywords()
        return {f"encoder.{word}" for word in keywords} if self.official_groups else keywords

    def head_parameters(self) -> set[str]:
        """Returns full names of all that stands beside the encoder."""
        return {name for name, _ in self.named_parameters() if not name.startswith("encoder.")}

    def num_tokens(self) -> int:
        """Returns the tokens of the last stage, of an image of nominal size."""
        config = self.encoder.config
        return math.prod(stage_geometry(config, len(config.depths) - 1).resolution)


class MaskedImageModel(EncoderModel):
    """An encoder with a mask token and one convolution that predicts the pixels of every encoder token."""

    def __init__(self, encoder: SwinTransformer, *, encoder_stride: int = 0, official_groups: bool = False) -> None:
        """Builds the decoder.

        encoder_stride: Pixels per side that one token of the last stage stands for; 0 = as the encoder's sizes say.

        Raises:
            ValueError: The encoder has no mask token, or has a class head, or patches that are not square.
        """
        super().__init__(encoder, official_groups=official_groups)
        config = encoder.config
        if not hasattr(encoder, "mask_token"):
            raise ValueError("a masked image model needs an encoder with mask_token=True")
        if config.patch_size[0] != config.patch_size[1]:
            raise ValueError(f"a masked image model needs square patches, got model.patch_size={config.patch_size}")
        stride = encoder_stride or config.patch_size[0] * 2 ** (len(config.depths) - 1)
        pixels = stride**2 * config.in_chans
        self.decoder = nn.Sequential(nn.Conv2d(encoder.num_features, pixels, 1), PixelShuffle(stride))
        self.weights_of_decoder = encoder.num_features * pixels

    def forward(self, image: Tensor, mask: Tensor, random: RandomContext | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns (reconstruction (B, S, height, width), auxiliary loss or None). mask: (B, H, W), 1 = hidden patch."""
        encoded = self.encoder.encode(image, random=random, mask=mask)
        # Contiguous, or the gradient of the weights would have other strides than the weights.
        return self.decoder(encoded.tokens.permute(0, 3, 1, 2).contiguous()), encoded.aux

    def active_flops(self) -> float:
        """See EncoderModel; the decoder's are counted too."""
        return self.encoder.active_flops() + self.num_tokens() * self.weights_of_decoder


class FeatureModel(EncoderModel):
    """An encoder and one linear layer that predicts the features of another network, token by token."""

    def __init__(self, encoder: SwinTransformer, num_features: int) -> None:
        """num_features: Channels of what is predicted."""
        super().__init__(encoder)
        self.projector = nn.Linear(encoder.num_features, num_features)

    def forward(self, image: Tensor, random: RandomContext | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns (features (B, H, W, num_features), auxiliary loss or None)."""
        encoded = self.encoder.encode(image, random=random)
        return self.projector(encoded.tokens), encoded.aux

    def active_flops(self) -> float:
        """See EncoderModel; the linear layer's are counted too."""
        return self.encoder.active_flops() + self.num_tokens() * self.projector.weight.numel()


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
    pooled = partial(F.avg_pool2d, kernel_size=window, stride=1, padding=window // 2)
    mean = pooled(image, count_include_pad=False)
    mean_square = pooled(image.square(), count_include_pad=False)
    count = pooled(torch.ones_like(image), count_include_pad=True) * window**2
    variance = ((mean_square - mean.square()) * (count / (count - 1))).clamp_min(0.0)
    return mean, (variance + 1e-6).sqrt()


def normalize_targets(image: Tensor, window: int) -> Tensor:
    """Returns the image with mean 0 and variance 1 over the window around each pixel; see local_statistics."""
    mean, deviation = local_statistics(image, window)
    return (image - mean) / deviation
