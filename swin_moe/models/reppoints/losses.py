"""The losses of RepPoints V2: sums over cells, and what they are means over.

Facts: arXiv:2007.08508, arXiv:2006.04388 (quality focal loss), arXiv:1808.01244 (bumps); SwinTransformer/
Swin-Transformer-Object-Detection, configs/_base_/models/reppointsv2_swin_bifpn.py and mmdet/models/losses.

Shape legend: B images, N cells of all levels, K classes, P positive cells of all images.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.models.detection.boxes import paired_iou
from swin_moe.models.detection.losses import smooth_l1
from swin_moe.models.detection.targets import LossSums

REFINED, BUMPS, STEPS, INSIDE = 2.0, 0.25, 1.0, 0.1  # weights; of classes and first sets 1
STEP_BETA = 1 / 9
_SMALLEST_AREA = 1e-6  # that is added to areas


class Wanted(NamedTuple):
    """What the cells of every image learn."""

    usable: Tensor  # (B, N) bool: the cell is of the image as padded by itself, and in no crowd region
    first: Tensor  # (B, N) int64, 1 + the object that the first set learns; 0 = none
    refined: Tensor  # (B, N) int64, 1 + the object of the refined set and of the class
    first_box: Tensor  # (B, N, 4)
    refined_box: Tensor  # (B, N, 4)
    label: Tensor  # (B, N) int64, of the refined set's object
    bump: Tensor  # (B, N, 2), of upper left and lower right corners
    step: Tensor  # (B, N, 4)
    inside: Tensor  # (B, N, K), weights; 0 = not inside


def quality_focal(logits: Tensor, quality: Tensor) -> Tensor:
    """Returns element by element the cross entropy to a quality in [0, 1], times the squared error."""
    error = quality - logits.sigmoid()
    return F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * error.square()


def bump_focal(logits: Tensor, bump: Tensor) -> Tensor:
    """Returns element by element the focal loss of a corner (1) and of what is not, the less the higher its bump."""
    chance = logits.sigmoid()
    corner = -F.logsigmoid(logits) * (1 - chance).square()
    other = -F.logsigmoid(-logits) * chance.square() * (1 - bump).pow(4)
    return torch.where(bump == 1, corner, other)


def set_loss(found_P4: Tensor, target_P4: Tensor) -> Tensor:
    """Returns (P,): 1 - generalized IoU (arXiv:1902.09630) of boxes whose sides are taken one unit longer, as the
    official code takes pixels for cells that a box holds, though its units are those of a level.

    Of a box that has no side left even so the side is 0, and the loss grows with what is missing. (The official loss
    takes a box both of whose sides are negative for one with area, and falls without bound as it grows.)

    Both (P, 4), in units of the smallest object of each cell's level.
    """
    low, high = found_P4[:, :2], found_P4[:, 2:] + 1
    target_low, target_high = target_P4[:, :2], target_P4[:, 2:] + 1
    missing = (low - high).clamp(min=0)
    high = torch.maximum(low, high)
    shared = (torch.minimum(high, target_high) - torch.maximum(low, target_low)).clamp(min=0).prod(dim=1)
    union = (high - low).prod(dim=1) + (target_high - target_low).prod(dim=1) - shared + _SMALLEST_AREA
    outer = (torch.maximum(high, target_high) - torch.minimum(low, target_low)).prod(dim=1) + _SMALLEST_AREA
    return 1 - shared / union + (outer - union) / outer + missing.sum(dim=1)


def _per_image(flags_BN: Tensor) -> float:
    """Returns how many there are, of an image at least one, as the official code counts."""
    return float(flags_BN.sum(dim=1).clamp(min=1).sum())


def losses_of(
    classes: Tensor,
    boxes: tuple[Tensor, Tensor],
    corners: Tensor,
    steps: Tensor,
    inside: Tensor,
    wanted: Wanted,
    unit_N: Tensor,
) -> LossSums:
    """Returns the losses, weighted; loss_heatmap, loss_offset and loss_sem in two parts that have counts of their own.

    Args:
        classes, corners, steps, inside: As Said has them.
        boxes: (B, N, 4) of the first and of the refined sets, pixels.
        unit: Pixels, the side of the smallest object of each cell's level.
    """
    sums, counts = {}, {}
    for name, weight, found, assigned, target in (
        ("loss_pts_init", 1.0, boxes[0], wanted.first, wanted.first_box),
        ("loss_pts_refine", REFINED, boxes[1], wanted.refined, wanted.refined_box),
    ):
        rows = assigned > 0
        unit_P1 = unit_N.expand(rows.shape)[rows][:, None]
        sums[name] = set_loss(found[rows] / unit_P1, target[rows] / unit_P1).sum() * weight
        counts[name] = _per_image(rows)
    quality = torch.zeros_like(classes)
    image, cell = (wanted.refined > 0).nonzero().unbind(1)
    overlap = paired_iou(boxes[1][image, cell].detach(), wanted.refined_box[image, cell])
    quality[image, cell, wanted.label[image, cell]] = overlap
    sums["loss_cls"] = quality_focal(classes[wanted.usable], quality[wanted.usable]).sum()
    counts["loss_cls"] = counts["loss_pts_refine"]
    for side, corner in enumerate(("tl", "br")):
        bump, place = wanted.bump[..., side], slice(2 * side, 2 * side + 2)
        own = bump == 1
        losses = smooth_l1(steps[..., place], wanted.step[..., place], STEP_BETA)
        heat = bump_focal(corners[..., side][wanted.usable], bump[wanted.usable])
        sums[f"loss_heatmap_{corner}"] = heat.sum() * BUMPS / 2
        sums[f"loss_offset_{corner}"] = losses[own].sum() * STEPS / 2
        counts[f"loss_heatmap_{corner}"] = counts[f"loss_offset_{corner}"] = _per_image(own)
    return LossSums(sums, counts) | _inside_losses(inside[wanted.usable], wanted.inside[wanted.usable])


def _inside_losses(logits: Tensor, weight: Tensor) -> LossSums:
    """Returns the focal losses (0.25 and 2) of cells in a box, means by their weights, and of others, means over the
    number of those inside."""
    chance, within = logits.sigmoid(), weight > 0
    hit = (-F.logsigmoid(logits) * (1 - chance).square() * weight * 0.25).sum()
    miss = (-F.logsigmoid(-logits) * chance.square() * 0.75).masked_fill(within, 0).sum()
    sums = {"loss_sem_inside": hit * INSIDE, "loss_sem_outside": miss * INSIDE}
    return LossSums(sums, {"loss_sem_inside": float(weight.sum()), "loss_sem_outside": float(within.sum())})
