"""What tasks that look at pixels tell about an image, for those who draw or store it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_moe.data.batch import Batch
from swin_moe.tasks.base import StepContext


@dataclass(frozen=True)
class Found:
    """What was found in one image, in pixels of the image as stored, (height, width) = (h, w)."""

    boxes: Tensor | None = None  # (D, 4), x1 y1 x2 y2, best first; None = the task finds no objects
    scores: Tensor | None = None  # (D,)
    labels: Tensor | None = None  # (D,) int64
    masks: Tensor | None = None  # (D, h, w) bool
    label_map: Tensor | None = None  # (h, w) int64; None = the task classifies no pixels


@runtime_checkable
class LooksAtImages(Protocol):
    """What a task offers beside Task that `swin-moe predict` can draw and store."""

    def look(self, model: nn.Module, batch: Batch, context: StepContext) -> list[Found]:
        """Returns what is found in every image of a batch of evaluation, which need not hold the truth."""


def most_forwards(own: int, device: torch.device, world_size: int) -> int:
    """Returns the most forwards that a rank needs for its batch: as many as every rank has to take part in."""
    if world_size == 1:
        return own
    most = torch.tensor([own], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
