"""An image looked at several times, at several sizes and mirrored, and what is found in all of them together.

Facts: open-mmlab/mmdetection 2.11.0, mmdet/core/post_processing/merge_augs.py and the test_mixins of its heads:
proposals of all views are suppressed together, then every view scores and refines the same ones; boxes, scores and
masks are means over the views.

Shape legend: N boxes, P proposals, K classes or 1, D detections, M pixels per side of a mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.models.detection.detections import Detections, select
from swin_moe.models.detection.heads.roi_head import RoIHead
from swin_moe.models.detection.heads.rpn import RegionProposals
from swin_moe.ops.detection.nms import nms


class View(NamedTuple):
    """One look at an image."""

    image: Tensor  # (1, 3, H, W), zero beyond the image; (0, 3, H, W) for a rank that only takes part
    size: Tensor  # (1, 2) int64, height and width in it
    mirrored: bool

    def seen(self, boxes: Tensor, original_2: Tensor) -> Tensor:
        """Returns boxes (N, 4) of the original image where they are in this view."""
        boxes = boxes * _scale(self.size[0], original_2, boxes)
        return _mirrored(boxes, self.size[0, 1]) if self.mirrored else boxes

    def back(self, boxes: Tensor, original_2: Tensor) -> Tensor:
        """Returns boxes (N, 4 K) of this view where they are in the original image."""
        boxes_NK4 = boxes.unflatten(1, (boxes.shape[1] // 4, 4))
        if self.mirrored:
            boxes_NK4 = _mirrored(boxes_NK4, self.size[0, 1])
        return (boxes_NK4 / _scale(self.size[0], original_2, boxes)).flatten(1)


def _scale(size_2: Tensor, original_2: Tensor, like: Tensor) -> Tensor:
    return (size_2 / original_2).flip(0).repeat(2).to(like)


def _mirrored(boxes: Tensor, width: Tensor) -> Tensor:
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack([width - right, top, width - left, bottom], dim=-1)


def views_of(image: Tensor, size: Tensor, *, scales: Sequence[float], mirror: bool, divisor: int) -> list[View]:
    """Returns the views of one image, or of none: at its size times each scale, halves rounded up, bilinear, and padded
    with zeros to multiples of `divisor`; with `mirror` also each mirrored.

    image, size: (B, 3, H, W) and (B, 2), B 0 or 1.
    """
    height, width = size[0].tolist() if len(size) else image.shape[2:]
    views = []
    for scale in scales:
        sides = (int(height * scale + 0.5), int(width * scale + 0.5))
        own = image[:, :, :height, :width]
        if len(image) and sides != (height, width):
            own = F.interpolate(own, size=sides, mode="bilinear", align_corners=False)
        elif not len(image):
            own = image.new_zeros(0, image.shape[1], *sides)
        for mirrored in (False, True) if mirror else (False,):
            looked = own.flip(3) if mirrored else own
            looked = F.pad(looked, (0, -sides[1] % divisor, 0, -sides[0] % divisor))
            views.append(View(looked, size.new_tensor([sides] * len(image)).view(-1, 2), mirrored))
    return views


@torch.no_grad()
def detect_over(
    rpn: RegionProposals, roi: RoIHead, views: Sequence[View], maps: Sequence[list[Tensor]], original_2: Tensor
) -> Detections:
    """Returns what is found in an image over its views.

    Args:
        maps: Of all levels, one list a view.
        original: (2,) int64, height and width before any resizing.
    """
    proposals, features = merged_proposals(rpn, views, maps, original_2), [roi.features(own) for own in maps]
    scored = []
    for view, own in zip(views, features):
        ((boxes, scores),) = roi.scored(own, [view.seen(proposals, original_2)], view.size)
        scored.append((view.back(boxes, original_2), scores))
    boxes, scores = (torch.stack(column).mean(dim=0) for column in zip(*scored))
    found = select(boxes, scores, original_2, original_2, roi.spec.detections)
    if not roi.mask_heads:
        return found
    drawn = []
    for view, own in zip(views, features):
        (masks,) = roi.masks(own, [view.seen(found.boxes, original_2)], [found.labels])
        drawn.append(masks.flip(2) if view.mirrored else masks)
    return found._replace(masks=torch.stack(drawn).mean(dim=0))


def merged_proposals(
    rpn: RegionProposals, views: Sequence[View], maps: Sequence[list[Tensor]], original_2: Tensor
) -> Tensor:
    """Returns (P, 4), the best proposals of all views after suppression, in the original image."""
    boxes, scores = [], []
    for view, own in zip(views, maps):
        ((found, score),) = rpn.proposals(rpn.scored(own), view.size, rpn.spec.testing)
        boxes.append(view.back(found, original_2))
        scores.append(score)
    together = torch.cat(boxes)
    return together[nms(together, torch.cat(scores), rpn.spec.suppression)[: rpn.spec.testing.per_image]]
