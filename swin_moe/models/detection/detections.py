"""What a detector finds in an image.

Shape legend: R candidates of one image, D detections, K classes, M pixels per side of a mask.
"""

from typing import NamedTuple

from torch import Tensor

from swin_moe.models.detection.spec import DetectionSpec
from swin_moe.ops.detection.nms import nms
from swin_moe.ops.detection.soft_nms import soft_nms


class Detections(NamedTuple):
    """Objects of one image, best first."""

    boxes: Tensor  # (D, 4), pixels of the original image
    scores: Tensor  # (D,)
    labels: Tensor  # (D,) int64, from 0
    masks: Tensor | None = None  # (D, M, M), probabilities in the box (mask_head.py: paste_masks)
    drawn: Tensor | None = None  # (D, height, width) bool, masks that are of the whole original image already


def select(boxes: Tensor, scores: Tensor, size: Tensor, original: Tensor, spec: DetectionSpec) -> Detections:
    """Returns the best boxes of every class after suppression, in coordinates of the original image."""
    return selected(boxes, scores, size, original, spec)[0]


def selected(
    boxes: Tensor, scores: Tensor, size: Tensor, original: Tensor, spec: DetectionSpec
) -> tuple[Detections, Tensor]:
    """Returns (what `select` does, (D,) int64 which candidate each is).

    Args:
        boxes: (R, 4 K), or (R, 4) for all classes, in the batch's image.
        scores: (R, K + 1); the last column is of background.
        size, original: (2,) height and width in the batch, and before the image was resized.
    """
    classes = scores.shape[1] - 1
    scale = (size / original).flip(0).repeat(2).to(boxes)
    boxes = boxes.unflatten(1, (boxes.shape[1] // 4, 4)) / scale
    rows, labels = (scores[:, :classes] > spec.score).nonzero().unbind(1)
    boxes, scores = boxes[rows, labels if boxes.shape[1] > 1 else 0], scores[rows, labels]
    if spec.soft:
        kept, scores = soft_nms(boxes, scores, spec.suppression, labels)
    else:
        kept = nms(boxes, scores, spec.suppression, labels)
        scores = scores[kept]
    kept, scores = kept[: spec.per_image], scores[: spec.per_image]
    return Detections(boxes[kept], scores, labels[kept]), rows[kept]
