"""What a teacher finds in images without labels, how sure it is of each box, and boxes moved between two views.

Facts: arXiv:2106.09018, sections 3.2 and 3.3; microsoft/SoftTeacher, ssod/models/soft_teacher.py.

Shape legend: U images, D boxes of an image, K classes, T jitters of a box, R boxes of all images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from swin_moe.models.detection.boxes import clip, rois_of
from swin_moe.models.detection.detections import select
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.heads.roi_head import Features
from swin_moe.randomness import RandomContext, normal


@dataclass(frozen=True)
class Rules:
    """How a student listens to its teacher; the defaults are the official ones."""

    found: float = 0.5  # score above which the teacher's boxes are kept at all
    proposals: float = 0.9  # above which the proposal network learns them
    classes: float = 0.9  # above which they have their class
    spread: float = 0.02  # mean of Pseudo.spread below which their sides are believed
    jitters: int = 10
    jitter: float = 0.06  # standard deviation of a jitter, in sides of the box
    weight: float = 4.0  # of all losses of images without labels


class View(NamedTuple):
    """The teacher's view of the images of a batch that have no labels, in the batch's order."""

    image: Tensor  # (U, 3, H, W), zero beyond each image
    size: Tensor  # (U, 2) int64, height and width of each image in it
    matrix: Tensor  # (U, 3, 3) float64, pixels of the stored image -> of this view


class Pseudo(NamedTuple):
    """The teacher's boxes, in its own view; lists have an entry an image."""

    boxes: list[Tensor]  # (D, 4)
    scores: list[Tensor]  # (D,)
    labels: list[Tensor]  # (D,) int64
    # (D, 4): how far the box head's answers to jittered copies of a box lie apart, the standard deviation of each
    # coordinate, in sides of the box.
    spread: list[Tensor]


def moved(boxes_N4: Tensor, matrix: Tensor, size: Tensor) -> Tensor:
    """Returns (N, 4): the bounds of the boxes' four corners after a matrix (3, 3), within an image of this (height,
    width), (2,). The arithmetic is in float64, so that there and back loses nothing that float32 tells."""
    x1, y1, x2, y2 = boxes_N4.double().unbind(1)
    corners = torch.stack([torch.stack([x, y, torch.ones_like(x)]) for x in (x1, x2) for y in (y1, y2)])  # (4, 3, N)
    points = matrix.double() @ corners
    points = points[:, :2] / points[:, 2:]
    bounds = torch.cat([points.amin(dim=0), points.amax(dim=0)]).T
    return clip(bounds, size).to(boxes_N4.dtype)


def with_area(boxes_N4: Tensor) -> Tensor:
    """Returns (N,) bool: which boxes have one."""
    return (boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1])


def judged(network: Detector, maps: Sequence[Tensor], rois_R5: Tensor) -> tuple[Tensor, Tensor]:
    """Returns class probabilities (R, K + 1), the last one of background, and codes, of boxes on a network's maps."""
    (head,) = network.roi_head.box_heads
    logits, codes = head(network.roi_head.box_features(Features(maps, None), rois_R5))
    return logits.softmax(dim=1), codes


def found_in(
    teacher: Detector, maps: Sequence[Tensor], size_U2: Tensor, rules: Rules, noise: Sequence[Tensor] | RandomContext
) -> Pseudo:
    """Returns what a teacher finds in images, of which it has these maps: as in an evaluation, but from as many
    proposals as in training.

    noise: What boxes are jittered by, (T, D, 4) standard normal of every image; or what it is drawn from.
    """
    if not len(size_U2):
        return Pseudo([], [], [], [])
    (head,) = teacher.roi_head.box_heads
    scored = teacher.rpn_head.scored(maps)
    proposals = teacher.rpn_head.proposals(scored, size_U2, teacher.spec.proposals.training)
    rois = rois_of([boxes for boxes, _ in proposals])
    scores, codes = judged(teacher, maps, rois)
    pseudo = Pseudo([], [], [], [])
    for image, size in enumerate(size_U2):
        rows = rois[:, 0] == image
        decoded = head.decoded(rois[rows, 1:], codes[rows], size)
        found = select(decoded, scores[rows], size, size, teacher.spec.detections)
        kept = (found.scores > rules.found) & with_area(found.boxes)
        pseudo.boxes.append(found.boxes[kept])
        pseudo.scores.append(found.scores[kept])
        pseudo.labels.append(found.labels[kept])
    if isinstance(noise, RandomContext):
        noise = [drawn(noise, image, rules.jitters, len(own)) for image, own in enumerate(pseudo.boxes)]
    return pseudo._replace(spread=spread_of(teacher, maps, pseudo.boxes, pseudo.labels, size_U2, rules, noise))


def drawn(random: RandomContext, image: int, jitters: int, boxes: int) -> Tensor:
    """Returns (T, D, 4) standard normal for an image of the batch: a function of (seed, step, sample)."""
    key = random.key("box_jitter")
    return normal(key, random.sample[image : image + 1], jitters * boxes * 4).view(jitters, boxes, 4)


def spread_of(
    teacher: Detector,
    maps: Sequence[Tensor],
    boxes: list[Tensor],
    labels: list[Tensor],
    size_U2: Tensor,
    rules: Rules,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    """Returns (D, 4) of every image; see Pseudo.

    Args:
        boxes, labels: (D, 4) and (D,) of every image.
        noise: (T, D, 4) standard normal, by which the coordinates move in units of rules.jitter x the box's side.
    """
    (head,) = teacher.roi_head.box_heads
    jittered = []
    for own, draws in zip(boxes, noise):
        side = (own[:, 2:] - own[:, :2]).clamp(min=1).repeat(1, 2)
        jittered.append((own + draws.to(own) * side * rules.jitter).flatten(0, 1))
    rois = rois_of(jittered)
    _, codes = judged(teacher, maps, rois)
    label = torch.cat([own.repeat(rules.jitters) for own in labels])
    image = rois[:, 0].to(torch.int64)
    answers = head.decoded(rois[:, 1:], head.codes_of(codes, label), size_U2[image])
    results = []
    for own in answers.split([len(one) for one in jittered]):
        own_TD4 = own.view(rules.jitters, -1, 4)
        mean = own_TD4.mean(dim=0)
        side = (mean[:, 2:] - mean[:, :2]).clamp(min=1).repeat(1, 2)
        variance = (own_TD4 - mean).square().sum(dim=0) / (rules.jitters - 1)  # torch's own warns where there is no box
        results.append(variance.sqrt() / side)
    return results
