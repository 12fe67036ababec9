"""Semi-supervised detection: Soft Teacher (arXiv:2106.09018), a detector that learns from its own moving average.

Images with labels and without are mixed in every batch by data.dense.sample_ratio. The teacher sees a weak view of
those without; what it finds, moved into the student's strong view, is what the student learns there. Losses are means
over what all ranks count, as a detector's, so a rank may have images of one kind alone.

Shape legend: B images of this micro-batch, U of them without labels.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from swin_moe.config import Config
from swin_moe.data.batch import Batch
from swin_moe.models.detection.detector import Detector
from swin_moe.models.network import Network
from swin_moe.models.soft_teacher.network import SoftTeacher
from swin_moe.models.soft_teacher.pseudo import Rules, View
from swin_moe.names.official import TEACHER
from swin_moe.parallel.groups import Groups
from swin_moe.randomness import RandomContext
from swin_moe.tasks.base import MicroLoss, Parts, StepContext, StepDone
from swin_moe.tasks.detect import Detect
from swin_moe.tasks.detectors import build_backbone, image_size_of, spec_of


class SemiSupervised(Detect):
    """The losses of a student from labels and from its teacher; evaluation is of the teacher, and of the student."""

    needs_views = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.changes_weights, self.metric = True, "box_AP"  # masks learn from labels alone

    def build_network(self) -> Network:
        """See Task. The teacher drops no path and keeps no graph."""
        config, soft = self.config, self.config.task.soft_teacher
        spec, size = spec_of(config), image_size_of(config)
        rules = Rules(
            found=soft.found_score,
            proposals=soft.proposal_score,
            classes=soft.class_score,
            spread=soft.box_spread,
            jitters=soft.jitters,
            jitter=soft.jitter,
            weight=soft.weight,
        )
        return SoftTeacher(
            build_backbone(config),
            Detector(build_backbone(config, learns=False), spec, image_size=size),
            spec,
            rules,
            image_size=size,
            official_groups=config.compat.official,
        )

    def connect(self, model: nn.Module, groups: Groups) -> None:
        """See Task."""
        super().connect(model, groups)
        assert isinstance(model, Network), "as build_network gave it"
        self._norms = {name: norm for name, norm in self._norms.items() if not name.startswith(TEACHER)}
        self._followed = model.momentum_pairs()

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> MicroLoss:
        """See Task. With compat.official every rank divides by what it counts itself."""
        image = batch["image"]
        random = RandomContext(self.config.run.seed, context.step, batch["sample"])
        with context.autocast():
            learned = model(
                image,
                batch["size"],
                self.targets_of(batch),
                random=random,
                labelled=batch["labelled"],
                matrix=batch["matrix"],
                view=View(batch["view"], batch["view_size"], batch["view_matrix"]),
            )
        return self.divided(learned, len(image), image.device, context)

    def after_step(self, parts: Parts, done: StepDone) -> None:
        """See Task. Moves the running statistics of the student's batch norms, then the teacher, theirs included."""
        super().after_step(parts, done)
        momentum = momentum_at(self.config.task.soft_teacher.momentum, done.step + 1)
        for name, student in self._followed.items():
            parts[name][0].lerp_(parts[student][0], 1 - momentum)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], context: StepContext) -> dict[str, float]:
        """See Task: of the teacher, which pictures are of; and student_<name>, the student's average precision."""
        teacher, student = self.measured([model, partial(model, student=True)], batches, context)
        return teacher | {f"student_{name}": student[name] for name in ("box_AP", "mask_AP") if name in student}


def momentum_at(most: float, step: int) -> float:
    """Returns the momentum that the teacher moves by before a step (from 0): first it is what the student is."""
    return min(most, 1 - 1 / (step + 1))
