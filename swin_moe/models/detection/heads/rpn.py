"""Region proposal network: which anchors hold an object, and where it ends (arXiv:1506.01497).

Facts: open-mmlab/mmdetection 2.11.0, mmdet/models/dense_heads (rpn_head.py, anchor_head.py).

Shape legend: B images, A shapes of anchors in a cell, L levels, N = sum of H W A anchors of all levels, P proposals.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import with_initial
from swin_moe.models.detection.anchors import base_anchors, grid_anchors, inside, valid_anchors
from swin_moe.models.detection.boxes import decode, encode
from swin_moe.models.detection.losses import box_loss
from swin_moe.models.detection.sample import draw, sample
from swin_moe.models.detection.spec import ProposalSpec, Selection
from swin_moe.models.detection.targets import LossSums, Targets
from swin_moe.models.layers import widened
from swin_moe.ops.detection.nms import nms
from swin_moe.randomness import RandomContext

UNIT = (1.0, 1.0, 1.0, 1.0)  # of its codes


class Scored(NamedTuple):
    """What the network says of every anchor; levels follow each other."""

    logits: Tensor  # (B, N)
    codes: Tensor  # (B, N, 4)
    anchors: Tensor  # (N, 4)
    level: Tensor  # (N,) int64
    sizes: list[tuple[int, int]]  # height and width of every level's map


class RegionProposals(nn.Module):
    """One convolution over every level and two outputs per anchor, under the official names."""

    def __init__(self, spec: ProposalSpec, channels: int) -> None:
        super().__init__()
        self.spec = spec
        shapes = len(spec.ratios)
        self.rpn_conv = with_initial(nn.Conv2d(channels, channels, 3, padding=1), 0.01)
        self.rpn_cls = with_initial(nn.Conv2d(channels, shapes, 1), 0.01)
        self.rpn_reg = with_initial(nn.Conv2d(channels, 4 * shapes, 1), 0.01)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns logits (B, A, H, W) and codes (B, 4 A, H, W) of every level."""
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        return [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]

    def scored(self, maps: Sequence[Tensor]) -> Scored:
        """Returns both outputs beside their anchors, in at least float32."""
        logits, codes = self(maps)
        sizes = [(x.shape[2], x.shape[3]) for x in logits]
        anchors = []
        for (height, width), stride in zip(sizes, self.spec.strides, strict=True):
            base = base_anchors(stride, scale=self.spec.scale, ratios=self.spec.ratios)
            anchors.append(grid_anchors(base.to(widened(logits[0])), height, width, stride))
        level = [torch.full((len(a),), i, device=a.device) for i, a in enumerate(anchors)]
        flat_logits = torch.cat([widened(x).permute(0, 2, 3, 1).flatten(1) for x in logits], dim=1)
        flat_codes = torch.cat([widened(x).permute(0, 2, 3, 1).flatten(1) for x in codes], dim=1)
        count = sum(map(len, anchors))  # of an empty batch no size can be inferred
        return Scored(flat_logits, flat_codes.view(-1, count, 4), torch.cat(anchors), torch.cat(level), sizes)

    @torch.no_grad()
    def proposals(self, scored: Scored, size_B2: Tensor, select: Selection) -> list[tuple[Tensor, Tensor]]:
        """Returns boxes (P, 4) within each image and their scores (P,), falling."""
        return [
            self._of_image(scored, logits, codes, size, select)
            for logits, codes, size in zip(scored.logits, scored.codes, size_B2)
        ]

    def _of_image(
        self, scored: Scored, logits_N: Tensor, codes_N4: Tensor, size_2: Tensor, select: Selection
    ) -> tuple[Tensor, Tensor]:
        score_N = logits_N.sigmoid()
        best, start = [], 0
        for height, width in scored.sizes:
            count = height * width * len(self.spec.ratios)
            order = score_N[start : start + count].argsort(descending=True, stable=True)[: select.per_level]
            best.append(order + start if count > select.per_level else torch.arange(start, start + count).to(order))
            start += count
        kept = torch.cat(best)
        boxes = decode(scored.anchors[kept], codes_N4[kept], UNIT, size_2)
        order = nms(boxes, score_N[kept], self.spec.suppression, scored.level[kept])[: select.per_image]
        return boxes[order], score_N[kept][order]

    def losses(
        self, scored: Scored, targets: Targets, size_B2: Tensor, divisor: int, random: RandomContext
    ) -> LossSums:
        """Returns loss_rpn_cls and loss_rpn_bbox, (L,) each, over sampled anchors.

        Both count what was sampled; an image without positive or negative anchors counts one of them all the same, as
        in the official code.
        """
        spec, levels, count = self.spec, len(scored.sizes), len(scored.anchors)
        positive, negative, wanted = [], [], [scored.anchors[:0]]
        number = 0
        for image, objects in enumerate(targets.boxes):
            usable = self._usable(scored, size_B2[image].tolist(), divisor).nonzero().flatten()
            assigned = spec.assigner(scored.anchors[usable], objects, targets.crowd[image])
            draws = draw(random, image, 0, count)[usable]
            taken = sample(assigned, draws, number=spec.samples, positive_share=spec.positive_share)
            number += max(len(taken.positive), 1) + max(len(taken.negative), 1)
            positive.append(usable[taken.positive] + image * count)
            negative.append(usable[taken.negative] + image * count)
            wanted.append(objects[assigned[taken.positive] - 1])
        none = scored.level[:0]
        found, empty = torch.cat([none, *positive]), torch.cat([none, *negative])
        rows = torch.cat([found, empty])
        label = torch.cat([torch.ones_like(found), torch.zeros_like(empty)])
        logits = scored.logits.reshape(-1)[rows]
        objectness = F.binary_cross_entropy_with_logits(logits, label.to(logits), reduction="none")
        anchors, target = scored.anchors[found % count], torch.cat(wanted)
        codes = scored.codes.reshape(-1, 4)[found]
        boxes = self._box_losses(anchors, codes, target)
        sums = {
            "loss_rpn_cls": logits.new_zeros(levels).index_add(0, scored.level[rows % count], objectness),
            "loss_rpn_bbox": logits.new_zeros(levels).index_add(0, scored.level[found % count], boxes),
        }
        return LossSums(sums, dict.fromkeys(sums, float(number)))

    def _box_losses(self, anchors_P4: Tensor, codes_P4: Tensor, target_P4: Tensor) -> Tensor:
        if self.spec.loss == "giou":
            return box_loss("giou", decode(anchors_P4, codes_P4, UNIT), target_P4)
        return box_loss(self.spec.loss, codes_P4, encode(anchors_P4, target_P4, UNIT), beta=self.spec.beta)

    def _usable(self, scored: Scored, size: list[int], divisor: int) -> Tensor:
        """Returns (N,) bool: the anchors that train on an image of this size, which is padded to a multiple of
        `divisor` when it is alone; what a batch adds to that is nobody's background."""
        padded = (-(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor)
        shapes = len(self.spec.ratios)
        maps = zip(scored.sizes, self.spec.strides)
        usable = torch.cat([valid_anchors(*grid, stride, padded, shapes) for grid, stride in maps])
        usable = usable.to(scored.anchors.device)
        if self.spec.border is not None:
            usable &= inside(scored.anchors, (size[0], size[1]), self.spec.border)
        return usable
