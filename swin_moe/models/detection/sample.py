"""Which of the assigned candidates a step learns from, and what from each.

The draws are a function of (seed, step, sample, stage, candidate's index), so that no layout of ranks changes them.

Shape legend: N candidates of one image, P positive and M negative ones that are taken; G objects of an image, R sampled
boxes of all images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from swin_moe.models.detection.assign import BACKGROUND, Assigner
from swin_moe.models.detection.targets import Targets
from swin_moe.randomness import RandomContext, bits


class Taken(NamedTuple):
    """Indices of candidates, rising."""

    positive: Tensor  # (P,) int64
    negative: Tensor  # (M,) int64


def draw(random: RandomContext, image: int, stage: int, count: int) -> Tensor:
    """Returns (count,) int32, the draws of candidates of an image of the batch.

    stage: 0 for anchors; others number the samplings of a step.
    """
    return bits(random.key("box_sample", stage), random.sample[image : image + 1], count)[0]


def sample(assigned_N: Tensor, draws_N: Tensor, *, number: int, positive_share: float) -> Taken:
    """Returns at most `number` candidates, of them at most positive_share x number (rounded down) positive: where there
    are more, those with the smallest draws. Negative ones fill what positive ones leave."""
    positive = _choose(assigned_N > BACKGROUND, int(number * positive_share), draws_N)
    return Taken(positive, _choose(assigned_N == BACKGROUND, number - len(positive), draws_N))


def _choose(among_N: Tensor, count: int, draws_N: Tensor) -> Tensor:
    candidates = among_N.nonzero().flatten()
    if len(candidates) <= count:
        return candidates
    order = draws_N[candidates].argsort(stable=True)
    return candidates[order[:count]].sort().values


class Sampled(NamedTuple):
    """Rows of all images, those of an image together: first positive ones."""

    rois: Tensor  # (R, 5): image index and box
    label: Tensor  # (R,) int64; the number of classes = background
    target: Tensor  # (R, 4), the object's box; of background its own
    object: Tensor  # (R,) int64, index among the image's objects; -1 = background
    is_object: Tensor  # (R,) bool: the row is an object's own box, which was added to the proposals

    def rows_of(self, image: int) -> Tensor:
        """Returns (R,) bool: which rows are of an image of the batch."""
        return self.rois[:, 0] == image

    def positive(self) -> "Sampled":
        """Returns the rows that have an object."""
        rows = (self.object >= 0).nonzero().flatten()
        return Sampled(*(value[rows] for value in self))


def sample_boxes(
    proposals: list[Tensor],
    targets: Targets,
    assigner: Assigner,
    *,
    number: int,
    positive_share: float,
    num_classes: int,
    stage: int,
    random: RandomContext,
    empty: Tensor,
) -> Sampled:
    """Returns at most `number` boxes of every image: proposals by overlap, and the objects' own boxes.

    Args:
        proposals: (P, 4) of every image.
        stage: Which sampling of the step this is, from 1; keys the draws.
        empty: (0, 4), whose kind the rows of a batch without images have.
    """
    found: list[tuple[Tensor, ...]] = []
    for image, (boxes, objects, labels) in enumerate(zip(proposals, targets.boxes, targets.labels)):
        assigned = assigner(boxes, objects, targets.crowd[image])
        own = torch.arange(1, len(objects) + 1, device=assigned.device)
        candidates, assigned = torch.cat([objects, boxes]), torch.cat([own, assigned])
        draws = draw(random, image, stage, len(candidates))
        rows = torch.cat(sample(assigned, draws, number=number, positive_share=positive_share))
        chosen, which = candidates[rows], assigned[rows] - 1
        background = which < 0
        label, target = torch.full_like(which, num_classes), chosen.clone()
        label[~background] = labels[which[~background]]
        target[~background] = objects[which[~background]]
        rois = torch.cat([chosen.new_full((len(chosen), 1), image), chosen], dim=1)
        found.append((rois, label, target, which, rows < len(objects)))
    none = torch.zeros(0, dtype=torch.int64, device=empty.device)  # of a batch without images
    start = (empty.new_zeros(0, 5), none, empty, none, none.bool())
    return Sampled(*(torch.cat(values) for values in zip(start, *found)))
