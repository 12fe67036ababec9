"""RepPoints V2 over any Swin backbone: neck, head, what its cells learn and what they find.

Facts: arXiv:2007.08508; SwinTransformer/Swin-Transformer-Object-Detection, mmdet/models/dense_heads/
reppoints_v2_head.py.

Shape legend: B images, N cells of all levels, K classes, G objects of an image, H x W the padded batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.models.dense.pyramid import PyramidBackbone
from swin_moe.models.detection.anchors import valid_anchors
from swin_moe.models.detection.detections import Detections, selected
from swin_moe.models.detection.network import Learned, ObjectNetwork
from swin_moe.models.detection.sample import draw
from swin_moe.models.detection.targets import LossSums, Targets
from swin_moe.models.reppoints import counting
from swin_moe.models.reppoints.assign import bump_radius, by_middle, by_overlap, corners_of, weights_inside
from swin_moe.models.reppoints.bifpn import BiFPN
from swin_moe.models.reppoints.head import PointHead, Said
from swin_moe.models.reppoints.losses import Wanted, losses_of
from swin_moe.models.reppoints.masks import (
    LARGEST,
    chances,
    dice_loss,
    guesses,
    in_original,
    middles,
    seen_coarsely,
)
from swin_moe.models.reppoints.spec import PointMaskSpec, PointSpec
from swin_moe.models.reppoints.verify import verified
from swin_moe.randomness import RandomContext


class RepPoints(ObjectNetwork[PointSpec]):
    """The network under the official names: backbone, neck, bbox_head. Its first map is of stride 8: a backbone gives
    all stages but the first."""

    def __init__(self, backbone: PyramidBackbone, spec: PointSpec, **given: Any) -> None:
        """See ObjectNetwork."""
        super().__init__(backbone, spec, **given)
        levels, repeats = len(spec.strides), spec.neck_repeats
        self.neck = BiFPN(backbone.channels, spec.channels, levels=levels, repeats=repeats, groups=spec.groups)
        self.bbox_head = PointHead(spec)

    def learn(self, image: Tensor, size: Tensor, targets: Targets, random: RandomContext) -> Learned:
        """See ObjectNetwork."""
        pyramid = self.backbone(image, random, size)
        return Learned(self.losses(self.bbox_head(self.neck(pyramid.maps)), targets, size, random), pyramid.aux)

    def detect(self, image: Tensor, size: Tensor, original: Tensor) -> list[Detections]:
        """See ObjectNetwork."""
        pyramid = self.backbone(image, None, size)
        return self.found(self.bbox_head(self.neck(pyramid.maps)), size, original)

    def losses(self, said: Said, targets: Targets, size_B2: Tensor, random: RandomContext) -> LossSums:
        """Returns the losses of a batch by their official names."""
        boxes = said.boxes(said.first), said.boxes(said.refined)
        wanted = self.wanted(said, boxes[0].detach(), targets, size_B2)
        unit = said.stride * self.spec.base_scale
        losses = losses_of(said.classes, boxes, said.corners, said.steps, said.inside, wanted, unit)
        if self.spec.masks is None:
            return losses
        return losses | self._mask_losses(self.spec.masks, said, targets, wanted.refined, random)

    def _mask_losses(
        self, spec: PointMaskSpec, said: Said, targets: Targets, refined_BN: Tensor, random: RandomContext
    ) -> LossSums:
        """Returns the losses of the masks of cells that have an object; refined: as in Wanted."""
        assert targets.masks is not None and said.features is not None, "a batch with masks"
        taken = [_among(own > 0, random, image, spec.most) for image, own in enumerate(refined_BN)]
        counts = torch.tensor([len(cells) for cells in taken], dtype=torch.int64, device=refined_BN.device)
        image = torch.arange(len(taken), device=refined_BN.device).repeat_interleave(counts)
        cell = torch.cat([refined_BN.new_zeros(0), *taken])
        height, width = (2 * side for side in said.sizes[0])
        shown = [said.features.new_zeros(0, height, width)]
        for masks, own, cells in zip(targets.masks, refined_BN, taken):
            seen = seen_coarsely(masks, self.spec.strides[0] // 2)[own[cells] - 1].to(shown[0])
            shown.append(F.pad(seen, (0, width - seen.shape[2], 0, height - seen.shape[1])))
        target, sums = torch.cat(shown), {}
        for number, (weight, logits) in enumerate(zip(spec.weights, self._guesses(said, image, cell)), start=1):
            sums[f"loss_mask_{number}"] = dice_loss(chances(logits), target).sum() * weight
        return LossSums(sums, dict.fromkeys(sums, float(len(cell))))

    def _guesses(self, said: Said, image_R: Tensor, cell_R: Tensor) -> list[Tensor]:
        """Returns the logits (R, H, W) of cells' masks, twice; see masks.guesses."""
        assert said.features is not None and said.masks is not None, "a network with masks"
        stride_R = said.stride[cell_R]
        place_R2 = said.middles()[image_R, cell_R] + (stride_R // 2)[:, None]
        own = said.masks[image_R, cell_R]
        return guesses(said.features, image_R, own, place_R2, LARGEST * stride_R, self.spec.strides[0])

    @torch.no_grad()
    def wanted(self, said: Said, first_BN4: Tensor, targets: Targets, size_B2: Tensor) -> Wanted:
        """Returns what every cell learns; first: the boxes of the first sets."""
        images = range(len(first_BN4))
        rows = [self._of_image(said, first_BN4[i], targets, i, size_B2[i].tolist()) for i in images]
        if rows:
            return Wanted(*map(torch.stack, zip(*rows)))
        none = first_BN4[..., 0].to(torch.int64)
        both = said.corners, said.steps, said.inside
        return Wanted(none.bool(), none, none, first_BN4, first_BN4, none, *(torch.zeros_like(x) for x in both))

    def _of_image(
        self, said: Said, first_N4: Tensor, targets: Targets, image: int, size: list[int]
    ) -> tuple[Tensor, ...]:
        """Returns the fields of Wanted of an image of this (height, width)."""
        spec, levels = self.spec, len(said.sizes)
        boxes_G4, label_G = targets.boxes[image].to(first_N4), targets.labels[image]
        on_image = self._usable(said, size)
        usable = on_image
        if spec.ignores_crowd and len(targets.crowd[image]):
            crowd_C4 = targets.crowd[image].to(first_N4)
            low, high = said.cells[:, None] - crowd_C4[:, :2], crowd_C4[:, 2:] - said.cells[:, None]
            usable = usable & ~(torch.cat([low, high], dim=2) >= 0).all(dim=2).any(dim=1)
        places, middle = (said.cells, said.level), None
        if spec.masks is not None and targets.masks is not None:
            middle = middles(targets.masks[image]).to(boxes_G4)
        smallest = spec.base_scale * spec.strides[0]
        first = by_middle(*places, on_image, boxes_G4, smallest=smallest, levels=levels, middle_G2=middle)
        refined = by_overlap(
            first_N4, said.level, on_image, boxes_G4, nearest=spec.nearest, levels=levels, middle_G2=middle
        )
        radius = bump_radius(boxes_G4, spec.corner_overlap)
        corners = [
            corners_of(*places, said.stride, on_image, boxes_G4[:, place], radius, levels=levels)
            for place in (slice(0, 2), slice(2, 4))
        ]
        bump, step = (torch.cat(x, dim=1) for x in zip(*((c.bump[:, None], c.step) for c in corners)))
        taken = (first > 0) | (refined > 0) | (bump == 1).any(dim=1)
        with_none = torch.cat([boxes_G4.new_zeros(1, 4), boxes_G4])
        label = torch.cat([label_G.new_zeros(1), label_G])[refined]
        inside = weights_inside(boxes_G4, label_G, spec.num_classes, said.sizes, spec.strides[0])
        usable = usable | (taken & on_image)
        return usable, first, refined, with_none[first], with_none[refined], label, bump, step, inside

    def _usable(self, said: Said, size: list[int]) -> Tensor:
        """Returns (N,) bool: the cells of an image of this size as padded when it is alone."""
        divisor = self.spec.size_divisor
        padded = (-(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor)
        maps = zip(said.sizes, self.spec.strides)
        return torch.cat([valid_anchors(*grid, stride, padded, 1) for grid, stride in maps]).to(said.cells.device)

    @torch.no_grad()
    def found(self, said: Said, size_B2: Tensor, original_B2: Tensor) -> list[Detections]:
        """Returns the detections of every image, in coordinates of the original images: boxes of the refined sets,
        their corners moved to verified ones."""
        boxes, scores = said.boxes(said.refined), said.classes.sigmoid()
        results = []
        for image, (size, original) in enumerate(zip(size_B2, original_B2)):
            rows = self._best(said, scores[image])
            limits = size.flip(0).repeat(2).to(boxes)
            own = torch.minimum(boxes[image, rows].clamp(min=0), limits)
            own = torch.minimum(verified(said, image, rows, own).clamp(min=0), limits)
            own = torch.cat([own[:, :2], torch.maximum(own[:, :2], own[:, 2:])], dim=1)
            own_scores = F.pad(scores[image, rows], (0, 1))  # of background nothing is said
            found, kept = selected(own, own_scores, size, original, self.spec.detections)
            if self.spec.masks is not None:
                found = found._replace(drawn=self._drawn(said, image, rows[kept], size.tolist(), original.tolist()))
            results.append(found)
        return results

    def _drawn(self, said: Said, image: int, cell_R: Tensor, size: list[int], original: list[int]) -> Tensor:
        """Returns (R, height, width) bool, the masks of cells' objects in the original image."""
        _, logits = self._guesses(said, torch.full_like(cell_R, image), cell_R)
        sizes, step = ((size[0], size[1]), (original[0], original[1])), self.spec.strides[0] // 2
        return in_original(chances(logits), step, *sizes, self.spec.detections.mask_threshold)

    def _best(self, said: Said, scores_NK: Tensor) -> Tensor:
        """Returns the cells of every level with the largest scores, level by level."""
        most_N, rows, start = scores_NK.amax(dim=1), [], 0
        for height, width in said.sizes:
            own = most_N[start : start + height * width]
            rows.append(own.argsort(descending=True, stable=True)[: self.spec.per_level] + start)
            start += height * width
        return torch.cat(rows)

    def counted_beside(self, maps: Sequence[tuple[int, int]]) -> int:
        """See DenseNetwork."""
        sizes = list(maps)
        while len(sizes) < len(self.spec.strides):
            sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
        return counting.neck(self.neck, sizes) + counting.head(self.bbox_head, sizes)


def _among(candidate_N: Tensor, random: RandomContext, image: int, most: int) -> Tensor:
    """Returns the cells that are candidates, rising; of more than `most` those with the smallest draws."""
    cells = candidate_N.nonzero().flatten()
    if len(cells) <= most:
        return cells
    order = draw(random, image, 0, len(candidate_N))[cells].argsort(stable=True)
    return cells[order[:most]].sort().values
