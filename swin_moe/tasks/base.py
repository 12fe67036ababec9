"""What a training task gives the loop: a network, a loss from a batch, and an exact evaluation."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from swin_moe.config import Config
from swin_moe.data.batch import Batch
from swin_moe.layout import Chunk
from swin_moe.models import Network, SwinTransformer, build_model
from swin_moe.parallel.groups import Groups
from swin_moe.registry import lookup

TASKS = {
    "classify": "swin_moe.tasks.classify:Classify",
    "detect": "swin_moe.tasks.detect:Detect",
    "distill": "swin_moe.tasks.distill:Distill",
    "moby": "swin_moe.tasks.moby:MoBY",
    "segment": "swin_moe.tasks.segment:Segment",
    "simmim": "swin_moe.tasks.simmim:SimMIM",
    "soft_teacher": "swin_moe.tasks.soft_teacher:SemiSupervised",
}


@dataclass(frozen=True)
class StepContext:
    """What a loss needs to know about the step its micro-batch belongs to."""

    config: Config
    step: int  # optimizer step
    world_size: int
    num_samples: int  # images of the whole optimizer step: all ranks, all micro-batches
    autocast: Callable[[], AbstractContextManager]  # for the forward
    weight: float | None = None  # sum of Task.weigh over the whole optimizer step; None = the task does not weigh
    words: Tensor | None = None  # seed and step as a recorded loss reads them, see RandomContext; None = made anew


@dataclass(frozen=True)
class MicroLoss:
    """The loss of one micro-batch on one rank.

    total: what backward takes; its mean over ranks, summed over micro-batches, is the loss of the optimizer step.
    task, aux: this rank's contribution to the global means of the task's loss and the auxiliary loss (sum over ranks).
    kept: What `keep` of a task that has it (Keeps) is to get once the micro-batch has run.
    """

    total: Tensor
    task: Tensor
    aux: Tensor
    kept: tuple[Tensor, ...] = ()


def micro_loss(
    task: Tensor, aux: Tensor | None, num_images: int, context: StepContext, kept: tuple[Tensor, ...] = ()
) -> MicroLoss:
    """Returns the loss of a micro-batch.

    Args:
        task: Sum over this rank's images, divided by the images (and what else is averaged over) of the whole step.
        aux: Mean over this rank's images, times its weight; an image counts the same wherever it sits, so it is
            weighted by the rank's share of them.
        kept: See MicroLoss.
    """
    aux = torch.zeros_like(task) if aux is None else aux * (num_images / context.num_samples)
    return MicroLoss((task + aux) * context.world_size, task.detach(), aux.detach(), kept)


Parts = Mapping[str, tuple[Tensor, Chunk]]  # parameter -> (this rank's part of it, which box that is)


@dataclass(frozen=True)
class StepDone:
    """A step that updated the weights."""

    step: int  # optimizer steps before it
    total_steps: int  # of the run
    samples_before: int  # images seen before it, over all ranks


class Teacher(Protocol):
    """A frozen network whose features are targets."""

    num_features: int  # C

    def __call__(self, image: Tensor) -> Tensor:
        """Returns its last features (B, H, W, C), in at least float32, of images as the student sees them."""


class Task(Protocol):
    """One row of TASKS; constructed with the config. A task derives from it and overrides what differs: `loss` and
    `evaluate` in any case. One that does not derive has all of it (find_task)."""

    config: Config
    teacher: Teacher | None = None  # set from outside before build_network, where needs_teacher
    metric: str = "loss"  # the evaluation result that picks the best checkpoint
    higher_is_better: bool = False
    needs_partners: bool = False  # batches must hold every image's neighbour in global order, for mixing
    # Batches must hold a second augmentation of every image, as "view"; with needs_boxes of those without labels
    # alone, which are then mixed with those that have some.
    needs_views: bool = False
    needs_boxes: bool = False  # batches must hold boxes, labels and, where the data has them, masks
    needs_label_maps: bool = False  # batches must hold a class per pixel
    changes_weights: bool = False  # after_step does something
    needs_teacher: bool = False  # swin_moe/weights/teacher.py loads it

    def __init__(self, config: Config):
        self.config = config

    def build_network(self) -> Network:
        """Returns the network this task trains, without meaningful weights; works on meta."""
        return build_model(self.config.model, recompute=self.config.parallel.recompute)

    def connect(self, model: nn.Module, groups: Groups) -> None:
        """Sets what parts of the parallelized network talk to other ranks with, where they do."""

    def weigh(self, batch: Batch) -> float | None:
        """Returns what this micro-batch counts for in the step's mean, if not its images; host data, before a step.

        The sum over all ranks and micro-batches is StepContext.weight. None = images count, nothing is exchanged.
        """
        return None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> MicroLoss:
        """Returns the loss of a micro-batch, which may hold no image."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], context: StepContext) -> dict[str, float]:
        """Returns metrics over every image of `batches` on all ranks, weighted by true counts; `samples`: how many."""

    def after_step(self, parts: Parts, done: StepDone) -> None:
        """Changes, after an update, what no gradient moves. Every rank calls it; parts are this rank's, and views."""

    def pictures(self) -> dict[str, np.ndarray]:
        """Returns name -> (height, width, 3) uint8 that the last evaluation drew, alike on all ranks."""
        return {}


@runtime_checkable
class RecordableLoss(Protocol):
    """What a task offers beside Task whose loss can be recorded once and replayed (run/training_graphs.py)."""

    def inputs(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Returns all that differs from step to step, what the host draws for the step included, as tensors on the
        device; "sample" is the batch's."""

    def loss_of(self, model: nn.Module, inputs: Mapping[str, Tensor], context: StepContext) -> MicroLoss:
        """Returns the loss of a micro-batch from its `inputs`: of the context the number of images and the words
        alone, without a look at a value, and without a trace in the task: a replay runs no Python."""


class Keeps(Protocol):
    """What a task with a RecordableLoss offers beside it whose losses give something to keep."""

    def keep(self, kept: tuple[Tensor, ...]) -> None:
        """Takes MicroLoss.kept, whose memory the next micro-batch may overwrite."""


def build_encoder(config: Config, *, mask_token: bool = False) -> SwinTransformer:
    """Returns the backbone of a network with a head of its own (models/heads.py: EncoderModel), whatever
    model.num_classes says; without meaningful weights.

    mask_token: See SwinTransformer.
    """
    headless = replace(config.model, num_classes=0)
    return SwinTransformer(headless, recompute=config.parallel.recompute, mask_token=mask_token)


def find_task(config: Config) -> type[Task]:
    """Returns the class that task.name says, whose members are there: found at start, not at the first evaluation.

    Raises:
        ValueError: There is none of that name, or it lacks members of Task; names them.
    """
    name = config.task.name
    found = lookup(TASKS, name, key="task.name")
    missing = [key for key in vars(Task) if not key.startswith("_") and _is_missing(found, key)]
    if missing:
        lacks = f"{getattr(found, '__name__', found)} lacks {', '.join(missing)}"
        raise ValueError(f"task.name={name}: {lacks} (swin_moe/tasks/base.py: Task)")
    return found


def _is_missing(found: object, member: str) -> bool:
    return not hasattr(found, member) or getattr(getattr(found, member), "__isabstractmethod__", False)


def build_task(config: Config) -> Task:
    """Returns the task that task.name says; raises ValueError as find_task."""
    return find_task(config)(config)
