"""What a batch holds, and moving it to a device.

Shape legend: B images of this micro-batch (0 is legal), X extra partner images (at most 2), H height, W width.
"""

from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor


class Batch(TypedDict):
    """A micro-batch of one rank, as loaders yield it and tasks get it."""

    image: Tensor  # (B, 3, H, W) float32, or float64 on the device with engine.precision=fp64
    target: Tensor  # (B,) int64, labels
    sample: Tensor  # (B,) int64, place in the global batch (training) or in the data set (evaluation): keys of draws
    epoch: int
    step: int  # optimizer step
    view: NotRequired[Tensor]  # (B, 3, H, W), a second augmentation, with Task.needs_views; see below with needs_boxes
    # With Task.needs_partners: the row of each image's partner in image + extra_image, and what that takes of others.
    partner: NotRequired[Tensor]  # (B,) int64
    extra_image: NotRequired[Tensor]  # (X, 3, H, W)
    extra_target: NotRequired[Tensor]  # (X,) int64
    # With Task.needs_boxes or Task.needs_label_maps; (H, W) is the padded size, lists have an item per image.
    size: NotRequired[Tensor]  # (B, 2) int64, height and width of each image inside (H, W)
    original_size: NotRequired[Tensor]  # (B, 2) int64, as stored
    image_id: NotRequired[Tensor]  # (B,) int64, the data's own number
    matrix: NotRequired[Tensor]  # (B, 3, 3) float64: stored pixel coordinates (x, y, 1) -> those of the batch
    labelled: NotRequired[Tensor]  # (B,) bool; False: what follows is empty, as no labels are given
    # With Task.needs_views beside needs_boxes: `view` is the teacher's, of the U images that are not labelled alone, in
    # their order, (U, 3, H, W) of its own padded size.
    view_size: NotRequired[Tensor]  # (U, 2) int64
    view_matrix: NotRequired[Tensor]  # (U, 3, 3) float64: stored pixel coordinates -> those of the view
    boxes: NotRequired[list[Tensor]]  # (n, 4) float32: x1 y1 x2 y2 in pixels of the batch, x2 and y2 exclusive
    labels: NotRequired[list[Tensor]]  # (n,) int64, 0-based
    crowd: NotRequired[list[Tensor]]  # (n,) bool: the box is round several objects
    masks: NotRequired[list[Tensor]]  # (n, H, W) bool; training only
    # int64, 255 = ignored: (B, H, W); in evaluation of the images as stored, each in the upper left corner.
    label_map: NotRequired[Tensor]
    truth: NotRequired[list[list[dict]]]  # evaluation only: rows of data/dense/sample.py: Annotation


def to_device(batch: Batch, device: torch.device, precision: str) -> Batch:
    """Returns the batch with its tensors on `device`, floating-point ones in float64 for precision fp64."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            dtype = torch.float64 if precision == "fp64" and value.is_floating_point() else None
            return value.to(device, dtype, non_blocking=True)
        return [move(item) for item in value] if isinstance(value, list) else value

    return cast(Batch, {key: move(value) for key, value in batch.items()})
