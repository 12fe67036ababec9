"""What a student learns from images with labels, and from its teacher in those without.

Facts: arXiv:2106.09018, equations 3 to 8; microsoft/SoftTeacher, ssod/models/soft_teacher.py. All boxes of a step go
through the box head at once, so that batch norm in it has one statistic.

Shape legend: B images of the batch, of which U have no labels; R boxes, K classes.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.heads.box_head import BoxHead
from swin_moe.models.detection.heads.roi_head import Features
from swin_moe.models.detection.heads.rpn import Scored
from swin_moe.models.detection.sample import Sampled, sample_boxes
from swin_moe.models.detection.targets import LossSums, Targets
from swin_moe.models.layers import widened
from swin_moe.models.soft_teacher.pseudo import Pseudo, Rules, View, judged, moved, with_area
from swin_moe.randomness import RandomContext

LABELLED, CLASSES, SIDES = 1, 3, 4  # which sampling of boxes of a step; keys the draws


class Part(NamedTuple):
    """Some images of a batch."""

    rows: list[int]  # of the batch, rising
    size: Tensor  # (n, 2) int64, height and width of each
    random: RandomContext


class Teaching(NamedTuple):
    """What a teacher says about a batch."""

    teacher: Detector
    maps: list[Tensor]  # of its view, all levels
    view: View
    pseudo: Pseudo  # in the view
    to_student: Tensor  # (U, 3, 3) float64, pixels of the view -> of the batch
    boxes: list[Tensor]  # (D, 4), those of `pseudo` in the student's view; some have no area there

    def objects(self, kept: list[Tensor]) -> Targets:
        """Returns the boxes that an image keeps ((D,) bool each) and that have an area, as objects without crowds."""
        rows = [with_area(box) & own for box, own in zip(self.boxes, kept)]
        boxes = [box[own] for box, own in zip(self.boxes, rows)]
        return Targets(boxes, [label[own] for label, own in zip(self.pseudo.labels, rows)], [b[:0] for b in boxes])


def part_of(rows: list[int], size_B2: Tensor, random: RandomContext) -> Part:
    """Returns some images of a batch, whose draws stay their own."""
    return Part(rows, size_B2[rows], replace(random, sample=random.sample[rows]))


def proposal_losses(
    student: Detector, scored: Scored, labelled: Part, targets: Targets, bare: Part, teaching: Teaching, rules: Rules
) -> LossSums:
    """Returns the proposal network's losses from both kinds of images, apart; those of the teacher times the weight."""
    divisor = student.spec.size_divisor
    own = student.rpn_head.losses(_of(scored, labelled), targets, labelled.size, divisor, labelled.random)
    found = teaching.objects([score > rules.proposals for score in teaching.pseudo.scores])
    other = student.rpn_head.losses(_of(scored, bare), found, bare.size, divisor, bare.random)
    return own.weighted(1.0, "sup_") | other.weighted(rules.weight, "unsup_")


def box_losses(
    student: Detector,
    maps: list[Tensor],
    proposals: list[Tensor],
    labelled: Part,
    targets: Targets,
    bare: Part,
    teaching: Teaching,
    rules: Rules,
) -> LossSums:
    """Returns the losses of the heads.

    Args:
        maps: Of the whole batch. proposals: (P, 4) of every image of it.
        targets: The objects of the labelled images.
    """
    believed = {
        CLASSES: teaching.objects([score > rules.classes for score in teaching.pseudo.scores]),
        SIDES: teaching.objects([spread.mean(dim=1) < rules.spread for spread in teaching.pseudo.spread]),
    }
    empty = widened(maps[0]).new_zeros(0, 4)
    sampled = {LABELLED: _sampled(student, proposals, targets, labelled, LABELLED, empty)}
    for stage, objects in believed.items():
        sampled[stage] = _sampled(student, proposals, objects, bare, stage, empty)
    (head,) = student.roi_head.box_heads
    features = Features(maps, None)
    rois = torch.cat([one.rois for one in sampled.values()])
    logits, codes = head(student.roi_head.box_features(features, rois))
    counts = [len(one.rois) for one in sampled.values()]
    parts = dict(zip(sampled, zip(logits.split(counts), codes.split(counts))))
    found = head.losses(*parts[LABELLED], sampled[LABELLED]).weighted(1.0, "sup_")
    classes = _class_losses(head, parts[CLASSES][0], sampled[CLASSES], bare, teaching)
    sides = head.losses(*parts[SIDES], sampled[SIDES])
    sides = LossSums({"loss_bbox": sides.sums["loss_bbox"]}, {"loss_bbox": sides.counts["loss_bbox"]})
    found |= (classes | sides).weighted(rules.weight, "unsup_")
    if student.roi_head.mask_heads:
        positive = sampled[LABELLED].positive()
        masks = student.roi_head.mask_losses(features, positive, _masks(targets, labelled, len(proposals)), 0)
        found |= masks.weighted(1.0, "sup_")
    return found


def _class_losses(head: BoxHead, logits: Tensor, sampled: Sampled, bare: Part, teaching: Teaching) -> LossSums:
    """Returns loss_cls, a mean weighted by how far a background box may be trusted to be background: by the teacher's
    probability of it at the same place."""
    weight = torch.ones_like(logits[:, 0])
    background = sampled.label == head.num_classes
    weight[background] = background_scores(sampled.rois, bare, teaching)[background].to(weight)
    losses = F.cross_entropy(logits, sampled.label, reduction="none")
    return LossSums({"loss_cls": (losses * weight).sum()}, {"loss_cls": float(weight.sum())})


@torch.no_grad()
def background_scores(rois_R5: Tensor, bare: Part, teaching: Teaching) -> Tensor:
    """Returns (R,): the teacher's probability of background at boxes of the student's view.

    rois: Of the images of `bare`, by their row in the batch.
    """
    back, view = torch.linalg.inv(teaching.to_student), teaching.view
    own = [rois_R5.new_zeros(0, 5)]
    for place, row in enumerate(bare.rows):
        boxes = moved(rois_R5[rois_R5[:, 0] == row, 1:], back[place], view.size[place])
        own.append(torch.cat([boxes.new_full((len(boxes), 1), place), boxes], dim=1))
    return judged(teaching.teacher, teaching.maps, torch.cat(own))[0][:, -1]


def _sampled(
    student: Detector, proposals: list[Tensor], targets: Targets, part: Part, stage: int, empty: Tensor
) -> Sampled:
    """Returns the boxes that a part's images learn from, by their row in the batch."""
    spec = student.spec
    found = sample_boxes(
        [proposals[row] for row in part.rows],
        targets,
        spec.stages[0].assigner,
        number=spec.samples,
        positive_share=spec.positive_share,
        num_classes=spec.num_classes,
        stage=stage,
        random=part.random,
        empty=empty,
    )
    rows = torch.tensor(part.rows, dtype=empty.dtype, device=empty.device)
    image = rows[found.rois[:, 0].to(torch.int64)]
    return found._replace(rois=torch.cat([image[:, None], found.rois[:, 1:]], dim=1))


def _masks(targets: Targets, labelled: Part, images: int) -> list[Tensor]:
    """Returns the objects' masks of every image of the batch; of those without labels none."""
    assert targets.masks is not None, "a network with masks learns from masks"
    if not targets.masks:
        return []
    masks = [targets.masks[0][:0]] * images
    for row, own in zip(labelled.rows, targets.masks):
        masks[row] = own
    return masks


def _of(scored: Scored, part: Part) -> Scored:
    return scored._replace(logits=scored.logits[part.rows], codes=scored.codes[part.rows])
