"""A detector that learns from images without labels what its own moving average finds in them.

Facts: arXiv:2106.09018; microsoft/SoftTeacher, ssod/models. The student is the network itself, under the names of a
detector, so that whatever begins a detector begins both; the teacher has its names below `teacher.`.

Shape legend: B images, U of them without labels, H x W pixels of the padded batch.
"""

from typing import Any, Self

import torch
from torch import Tensor

from swin_moe.models.dense import PyramidBackbone
from swin_moe.models.detection.detections import Detections
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.network import Learned, drawn
from swin_moe.models.detection.spec import DetectorSpec
from swin_moe.models.detection.targets import Targets
from swin_moe.models.soft_teacher.losses import Part, Teaching, box_losses, part_of, proposal_losses
from swin_moe.models.soft_teacher.pseudo import Rules, View, found_in, moved
from swin_moe.names.official import TEACHER
from swin_moe.randomness import RandomContext


class SoftTeacher(Detector):
    """A student with one stage of boxes, and its teacher, which never trains: neither drops nor moves a statistic."""

    def __init__(
        self, backbone: PyramidBackbone, teacher: Detector, spec: DetectorSpec, rules: Rules, **given: Any
    ) -> None:
        """See ObjectNetwork.

        teacher: A detector of the same spec; its weights begin, and follow, as momentum_pairs says.
        """
        super().__init__(backbone, spec, **given)
        assert len(spec.stages) == 1 and spec.semantic is None and not spec.mask_flow and not spec.interleaved
        self.rules = rules
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Returns self. The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def momentum_pairs(self) -> dict[str, str]:
        """See Network. Running statistics of batch norms are among them."""
        names = [name for name, _ in self.named_parameters() if name.startswith(TEACHER)]
        return {name: name.removeprefix(TEACHER) for name in names}

    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        size: Tensor,
        targets: Targets | None = None,
        original: Tensor | None = None,
        random: RandomContext | None = None,
        *,
        labelled: Tensor | None = None,
        matrix: Tensor | None = None,
        view: View | None = None,
        student: bool = False,
    ) -> Learned | list[Detections]:
        """Returns losses where there are targets, else what the teacher detects, or the student.

        Args:
            image, size, original, random: See ObjectNetwork.
            targets: The objects of all images; those of images without labels are not looked at.
            labelled: (B,) bool. matrix: (B, 3, 3) float64, pixels of the stored image -> of this one.
            view: The teacher's view of the images without labels.
            student: In evaluation: who detects.
        """
        if targets is None:
            network = super().forward if student else self.teacher
            return network(image, size, original=original)
        assert labelled is not None and matrix is not None and view is not None, "training has both views"
        random = drawn(image, random)
        own = part_of(labelled.nonzero().flatten().tolist(), size, random)
        bare = part_of((~labelled).nonzero().flatten().tolist(), size, random)
        taught = self._taught(view, bare, matrix[bare.rows])
        maps, aux = self.maps(image, random, size)
        scored = self.rpn_head.scored(maps)
        objects = _objects(targets, own.rows)
        losses = proposal_losses(self, scored, own, objects, bare, taught, self.rules)
        found = self.rpn_head.proposals(scored, size, self.spec.proposals.training)
        proposals = [boxes for boxes, _ in found]
        losses |= box_losses(self, maps, proposals, own, objects, bare, taught, self.rules)
        return Learned(losses, aux)

    @torch.no_grad()
    def _taught(self, view: View, bare: Part, matrix_U33: Tensor) -> Teaching:
        """Returns what the teacher says; every rank asks it, also about no image, as its experts may be elsewhere."""
        maps, _ = self.teacher.maps(view.image, None, view.size)
        pseudo = found_in(self.teacher, maps, view.size, self.rules, bare.random)
        across = matrix_U33.double() @ torch.linalg.inv(view.matrix.double())
        boxes = [moved(*one) for one in zip(pseudo.boxes, across, bare.size)]
        return Teaching(self.teacher, maps, view, pseudo, across, boxes)


def _objects(targets: Targets, rows: list[int]) -> Targets:
    """Returns the objects of some images."""
    masks = None if targets.masks is None else [targets.masks[row] for row in rows]
    boxes, labels, crowd = ([values[row] for row in rows] for values in (targets.boxes, targets.labels, targets.crowd))
    return Targets(boxes, labels, crowd, masks)
