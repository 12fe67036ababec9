"""Mixup and CutMix whose result does not depend on how the global batch is cut into ranks and micro-batches.

Image g of the global batch is mixed with its neighbour in global order, g XOR 1: the pairs are (0, 1), (2, 3), ...; an
image without one (the last of an odd batch, or a neighbour that was broken and skipped) is mixed with itself, which
leaves it as it is. Kind, lambda and box are drawn once per optimizer step from (seed, step), as timm's mode "batch"
does, the official setting (H. Zhang et al., arXiv:1710.09412; S. Yun et al., arXiv:1905.04899). timm's own Mixup pairs
images within the local batch.

Shape legend: B images of a micro-batch, H height, W width, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swin_moe.config import ClassifyOptions
from swin_moe.data.batch import Batch
from swin_moe.randomness import PURPOSES, derive_key


@dataclass(frozen=True)
class Mix:
    """How the images of one step are mixed.

    weight: lambda, the share of an image's own label.
    box: (top, bottom, left, right) in pixels that CutMix takes from the partner; None for mixup.
    """

    weight: float
    box: tuple[int, int, int, int] | None = None


def mixing_enabled(config: ClassifyOptions) -> bool:
    """Returns whether any image can be mixed, and the loader therefore has to supply partners."""
    return config.mix_prob > 0 and (config.mixup > 0 or config.cutmix > 0)


def draw_mix(config: ClassifyOptions, *, seed: int, step: int, size: tuple[int, int], official: bool = False) -> Mix:
    """Returns the mix of an optimizer step, a pure function of (seed, step); `size` is (H, W) in pixels.

    official: Boxes as timm 0.4.12 cuts them, which the official code pins; newer timm cuts as the default.
    All numbers are drawn whether used or not, so that one option does not move the draws of another.
    """
    generator = np.random.Generator(np.random.Philox(derive_key(seed, step, PURPOSES.index("mixup"))))
    apply, switch, centre_y, centre_x = generator.random(4)
    if not mixing_enabled(config) or apply >= config.mix_prob:
        return Mix(1.0)
    use_cutmix = config.cutmix > 0 and (config.mixup == 0 or switch < config.mix_switch_prob)
    alpha = config.cutmix if use_cutmix else config.mixup
    weight = float(generator.beta(alpha, alpha))
    if not use_cutmix:
        return Mix(weight)
    height, width = size
    side = (1 - weight) ** 0.5
    top, bottom = _interval(int(centre_y * height), int(height * side), height, official=official)
    left, right = _interval(int(centre_x * width), int(width * side), width, official=official)
    # The border cuts boxes off, so lambda is what is left of the image, as with timm's correct_lam.
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def _interval(centre: int, length: int, limit: int, *, official: bool = False) -> tuple[int, int]:
    """Returns [low, high) of `length` around `centre`, cut to [0, limit); official: an odd length is one less."""
    return max(0, centre - length // 2), min(limit, centre + (length + (not official)) // 2)


def partners(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns (images (B, 3, H, W), targets (B,)), the partners in a batch of TrainLoader(partners=True)."""
    images = torch.cat([batch["image"], batch["extra_image"]]) if len(batch["extra_image"]) else batch["image"]
    targets = torch.cat([batch["target"], batch["extra_target"]])
    return images[batch["partner"]], targets[batch["partner"]]


def soft_targets(targets: Tensor, *, num_classes: int, smoothing: float) -> Tensor:
    """Returns (B, K) float32 for targets (B,) int64: 1 - s + s / K at the label, s / K elsewhere."""
    off = smoothing / num_classes
    soft = torch.full((len(targets), num_classes), off, device=targets.device)
    return soft.scatter_(1, targets[:, None], 1 - smoothing + off)


def mix(
    images: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    config: ClassifyOptions,
    seed: int,
    step: int,
    partner_images: Tensor | None = None,
    partner_targets: Tensor | None = None,
    official: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns (images (B, 3, H, W), soft targets (B, K) float32); new tensors where anything is mixed.

    The label of a mixed image is lambda x its own smoothed one-hot + (1 - lambda) x that of its partner. Without mixing
    the images come back as they are, with the smoothed one-hot; then no partners are needed.

    Args:
        images: (B, 3, H, W); B may be 0.
        targets: (B,) int64.
        step: Optimizer step; all micro-batches of a step and all ranks share its mix.
        partner_images: (B, 3, H, W), see partners().
        partner_targets: (B,) int64.
        official: See draw_mix.
    """
    size = (images.shape[-2], images.shape[-1])
    drawn = draw_mix(config, seed=seed, step=step, size=size, official=official)
    labels = soft_targets(targets, num_classes=num_classes, smoothing=config.label_smoothing)
    if drawn.weight == 1:
        return images, labels
    assert partner_images is not None and partner_targets is not None, "TrainLoader(partners=True) supplies partners"
    other = soft_targets(partner_targets, num_classes=num_classes, smoothing=config.label_smoothing)
    labels = labels * drawn.weight + other * (1 - drawn.weight)
    if drawn.box is None:
        # Not lerp or addcmul: those may fuse the product and the sum, and then differ with the place in the batch.
        return images * drawn.weight + partner_images * (1 - drawn.weight), labels
    top, bottom, left, right = drawn.box
    images = images.clone()
    images[..., top:bottom, left:right] = partner_images[..., top:bottom, left:right]
    return images, labels
