"""What a training task gives the loop: a loss from a batch, and an exact evaluation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from swin_moe.config import Config

TASKS = {"classify": "swin_moe.tasks.classify:Classify"}


@dataclass(frozen=True)
class StepContext:
    """What a loss needs to know about the step its micro-batch belongs to."""

    config: Config
    step: int  # optimizer step
    world_size: int
    num_samples: int  # images of the whole optimizer step: all ranks, all micro-batches
    autocast: object  # () -> context manager for the forward


@dataclass(frozen=True)
class MicroLoss:
    """The loss of one micro-batch on one rank.

    total: what backward takes; its mean over ranks, summed over micro-batches, is the loss of the optimizer step.
    task, aux: this rank's contribution to the global means of the task's loss and the auxiliary loss (sum over ranks).
    """

    total: Tensor
    task: Tensor
    aux: Tensor


class Task(Protocol):
    """One row of TASKS; constructed with the config."""

    metric: str  # the evaluation result that picks the best checkpoint
    higher_is_better: bool
    needs_partners: bool  # batches must hold every image's neighbour in global order, for mixing

    def loss(self, model: nn.Module, batch: dict, context: StepContext) -> MicroLoss:
        """Returns the loss of a micro-batch, which may hold no image."""

    def evaluate(self, model: nn.Module, batches: Iterable[dict], context: StepContext) -> dict[str, float]:
        """Returns metrics over every sample of `batches` on all ranks, weighted by true counts."""
