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
    view: NotRequired[Tensor]  # (B, 3, H, W), a second augmentation, with Task.needs_views
    # With Task.needs_partners: the row of each image's partner in image + extra_image, and what that takes of others.
    partner: NotRequired[Tensor]  # (B,) int64
    extra_image: NotRequired[Tensor]  # (X, 3, H, W)
    extra_target: NotRequired[Tensor]  # (X,) int64


def to_device(batch: Batch, device: torch.device, precision: str) -> Batch:
    """Returns the batch with its tensors on `device`, floating-point ones in float64 for precision fp64."""
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            dtype = torch.float64 if precision == "fp64" and value.is_floating_point() else None
            value = value.to(device, dtype, non_blocking=True)
        moved[key] = value
    return cast(Batch, moved)
