"""Patch embedding, patch merging, the feed-forward network, and the two kinds of dropout.

Shape legend: B images, H x W tokens of a feature map, L = H * W, C channels. Maps are channels-last: (B, H, W, C).
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.ops.bias_gelu import hidden_layer
from swin_moe.ops.layer_norm import LayerNorm
from swin_moe.ops.linear import Linear, is_untouched, patch_projection
from swin_moe.ops.random_draws import UnitDraw
from swin_moe.ops.residual_norm import add_branch, is_fused, norm_residual, residual_norm
from swin_moe.randomness import RandomContext

if TYPE_CHECKING:
    M = TypeVar("M", bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[M]):
        """torch's list, which does not say modules of which type it holds."""

        def __init__(self, modules: Iterable[M]) -> None: ...
        def __iter__(self) -> Iterator[M]: ...
        def __getitem__(self, index: int) -> M: ...  # type: ignore[override]  # of one place; torch's takes slices too

else:
    ModuleList = nn.ModuleList

# Sites of one block that draw from the purpose "dropout"; each has its own key.
ATTENTION_WEIGHTS, MIXER_OUT, FFN_HIDDEN, FFN_OUT = range(4)


def widened(x: Tensor) -> Tensor:
    """Returns x in at least float32, in which losses are computed."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def pad_to_multiple(x_BHWC: Tensor, height: int, width: int) -> Tensor:
    """Returns the map padded with zeros at the bottom and right to multiples of (height, width) tokens."""
    bottom, right = -x_BHWC.shape[1] % height, -x_BHWC.shape[2] % width
    return F.pad(x_BHWC, (0, 0, 0, right, 0, bottom)) if bottom or right else x_BHWC


def add_and_norm(x: Tensor, branch: Tensor, factor_B: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns (x + factor * branch, the norm of that), in one kernel where there is one; see add_branch."""
    if is_fused(norm, x, branch):
        return residual_norm(x, branch, factor_B, norm.weight, norm.bias, norm.eps)
    x = add_branch(x, branch, factor_B)
    return x, norm(x)


def norm_and_add(x: Tensor, branch: Tensor, factor_B: Tensor | None, norm: nn.Module) -> Tensor:
    """Returns x + factor * the norm of branch, in one kernel where there is one; see add_branch."""
    if is_fused(norm, x, branch):
        return norm_residual(x, branch, factor_B, norm.weight, norm.bias, norm.eps)
    return add_branch(x, norm(branch), factor_B)


def token_rows(sample_B: Tensor, num_tokens: int) -> Tensor:
    """Returns (B * L,) int64, the global index of every token: sample * L + position."""
    position = torch.arange(num_tokens, device=sample_B.device)
    return (sample_B[:, None] * num_tokens + position).flatten()


def dropout_factor(rate: float, rows: Tensor, units: int, random: RandomContext, *, layer: int, site: int) -> Tensor:
    """Returns (N, U) float32: 0 with probability `rate`, else 1 / (1 - rate); a function of the global rows."""
    ones = torch.ones((len(rows), units), device=rows.device)
    return _draw(rate, rows, random, layer, site).apply(ones)


def dropout(x_BHWC: Tensor, rate: float, random: RandomContext | None, *, layer: int, site: int) -> Tensor:
    """Returns x with elements dropped by global token index and channel; x itself in evaluation or at rate 0."""
    draw = token_draw(x_BHWC, rate, random, layer=layer, site=site)
    return x_BHWC if draw is None else draw.apply(x_BHWC)


def token_draw(x_BHWC: Tensor, rate: float, random: RandomContext | None, *, layer: int, site: int) -> UnitDraw | None:
    """Returns which channels are dropped of the tokens of a map; None in evaluation or at rate 0."""
    if random is None or rate == 0.0:
        return None
    rows = token_rows(random.sample, x_BHWC.shape[1] * x_BHWC.shape[2])
    return _draw(rate, rows, random, layer, site)


def _draw(rate: float, rows: Tensor, random: RandomContext, layer: int, site: int) -> UnitDraw:
    # Divided in float32, as ever: it must give the bits that it gave.
    scale = float(np.float32(1.0) / np.float32(1.0 - rate))
    return UnitDraw(random, rows, purpose="dropout", layer=layer, site=site, drop=rate, scale=scale)


def check_image(image: Tensor, projection: nn.Module) -> None:
    """Raises ValueError where a network cannot take what it is given for a batch of images, TypeError for no tensor.

    projection: Of patches, which a user may have replaced, and of whose weight an engine may have cut the shape.
    """
    channels = getattr(
        projection, "in_channels", "C"
    )  # C: another module than a convolution, which takes what it takes
    if not isinstance(image, Tensor):
        raise TypeError(f"the model takes a tensor (B, {channels}, H, W), got a {type(image).__name__}")
    if image.ndim != 4 or channels not in ("C", image.shape[1]) or not image.shape[2] or not image.shape[3]:
        raise ValueError(
            f"the model takes images of shape (B, {channels}, H, W), got {tuple(image.shape)}"
            f"{'; one image needs a batch of one: image[None]' if image.ndim == 3 else ''}"
        )
    weight = getattr(projection, "weight", None)
    if weight is None:
        return
    # Under autocast both are converted, so torch is asked about it only where they differ.
    if image.dtype != weight.dtype and not (image.is_floating_point() and torch.is_autocast_enabled(image.device.type)):
        raise ValueError(f"the model takes images of its own type, {weight.dtype}, got {image.dtype}")


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: (B, channels, height, width) -> (B, H, W, C)."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int, *, norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = LayerNorm(dim) if norm else None

    def forward(self, image: Tensor, *, pad: bool = True) -> Tensor:
        """Returns the map of patches. An image that is no multiple of the patch is padded at the bottom and right.

        pad: False leaves out what does not fill a patch instead, as the official classification code does.
        """
        (height, width), (ph, pw) = image.shape[-2:], self.patch_size
        if pad and (height % ph or width % pw):
            image = F.pad(image, (0, -width % pw, 0, -height % ph))
        plain = type(self.proj) is nn.Conv2d and is_untouched(self.proj) and _is_of_patches(self.proj)
        x = patch_projection(image, self.proj.weight, self.proj.bias) if plain else self.proj(image)
        x_BHWC = x.permute(0, 2, 3, 1)
        return x_BHWC.contiguous() if self.norm is None else self.norm(x_BHWC)


def _is_of_patches(conv: nn.Conv2d) -> bool:
    """Returns whether a convolution's places do not overlap and leave nothing out."""
    return conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1


class PatchMerging(nn.Module):
    """Joins 2 x 2 neighbours into one token of twice the width: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C)."""

    def __init__(self, dim: int, *, norm_after: bool) -> None:
        super().__init__()
        self.norm_after = norm_after
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = LayerNorm(2 * dim if norm_after else 4 * dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Returns the merged map; odd sizes are padded at the bottom and right."""
        x = pad_to_multiple(x_BHWC, 2, 2)
        batch, height, width, channels = x.shape
        # Channel order of the official cat: (row, column) = (0, 0), (1, 0), (0, 1), (1, 1).
        x = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        return self.norm(self.reduction(x)) if self.norm_after else self.reduction(self.norm(x))


class Mlp(nn.Module):
    """The dense feed-forward network: fc1, exact GELU, fc2."""

    def __init__(self, dim: int, hidden_dim: int, *, fc2_bias: bool, drop: float, layer: int) -> None:
        super().__init__()
        self.drop, self.layer = drop, layer
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim, bias=fc2_bias)

    def forward(self, x_BHWC: Tensor, random: RandomContext | None = None) -> Tensor:
        """Returns (B, H, W, C)."""
        draw = token_draw(x_BHWC, self.drop, random, layer=self.layer, site=FFN_HIDDEN)
        hidden = hidden_layer(self.fc1, x_BHWC, draw)
        return dropout(self.fc2(hidden), self.drop, random, layer=self.layer, site=FFN_OUT)
