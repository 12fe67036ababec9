"""Everything after the proposals: stages of box heads and mask heads, one (Mask R-CNN), several (Cascade Mask R-CNN) or
several that share more (Hybrid Task Cascade).

Facts: arXiv:1703.06870, arXiv:1712.00726, arXiv:1901.07518; open-mmlab/mmdetection 2.11.0, mmdet/models/roi_heads
(standard_roi_head.py, cascade_roi_head.py, htc_roi_head.py, roi_extractors/single_level_roi_extractor.py); levels of
boxes are those of arXiv:1612.03144, equation 1.

Shape legend: B images, R boxes, C channels, S bins per side, K classes, M pixels per side of a mask.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.detection.boxes import areas, rois_of
from swin_moe.models.detection.detections import Detections, select
from swin_moe.models.detection.heads.box_head import BoxHead
from swin_moe.models.detection.heads.htc import SemanticHead
from swin_moe.models.detection.heads.mask_head import MaskHead, mask_targets
from swin_moe.models.detection.losses import mask_loss
from swin_moe.models.detection.sample import Sampled, sample_boxes
from swin_moe.models.detection.spec import DetectorSpec, MaskHeadSpec
from swin_moe.models.detection.targets import LossSums, Targets
from swin_moe.models.layers import ModuleList, widened
from swin_moe.ops.detection.roi_align import roi_align
from swin_moe.randomness import RandomContext

_BYTES_AT_A_TIME = 2 << 20  # of a mask head's largest tensor, on the CPU
_BOXES_AT_A_TIME = 1024  # elsewhere


class Features(NamedTuple):
    """What boxes look at."""

    maps: Sequence[Tensor]  # (B, C, H_i, W_i) of all levels
    semantic: Tensor | None  # (B, C, H, W)


def levels_of(rois_R5: Tensor, *, finest_scale: float, levels: int) -> Tensor:
    """Returns (R,) int64, the level of each box: 0 up to a side of 2 x finest_scale, then one more per doubling."""
    side = areas(rois_R5[:, 1:]).sqrt()
    return (side / finest_scale + 1e-6).log2().floor().clamp(0, levels - 1).to(torch.int64)


def region_features(
    maps: Sequence[Tensor], rois_R5: Tensor, size: int, strides: Sequence[int], *, finest_scale: float
) -> Tensor:
    """Returns (R, C, S, S) with gradients to the maps, of which every one takes part whatever the boxes are.

    maps: (B, C, H_i, W_i), one per stride; rois: image index and box in pixels.
    """
    level_R = levels_of(rois_R5, finest_scale=finest_scale, levels=len(maps))
    rows = [(level_R == level).nonzero().flatten() for level in range(len(maps))]
    parts = [roi_align(x, rois_R5[r], size, 1 / stride) for x, r, stride in zip(maps, rows, strides)]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def most_boxes(spec: MaskHeadSpec, device: torch.device) -> int:
    """Returns how many boxes' masks are computed at a time without gradients.

    On the CPU what is passed on between two layers stays in a cache then, and in memory that the process has: of 200
    boxes with 256 channels at once every layer's 160 MB is asked of the system anew, and takes 1.6 times as long.
    """
    bytes_of_box = 4 * spec.channels * (2 * spec.size) ** 2
    return max(4, _BYTES_AT_A_TIME // bytes_of_box) if device.type == "cpu" else _BOXES_AT_A_TIME


def _stages(heads: nn.Module) -> list[Any]:
    """Returns the heads of all stages, which are modules of one kind."""
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


class RoIHead(nn.Module):
    """The heads of all stages under the official names: numbered in a cascade, else by themselves."""

    def __init__(self, spec: DetectorSpec) -> None:
        super().__init__()
        self.spec = spec
        channels, classes = spec.channels, spec.num_classes
        boxes = [BoxHead(spec.box_head, stage, channels, classes) for stage in spec.stages]
        self.bbox_head: nn.Module = ModuleList(boxes) if spec.cascade else boxes[0]
        if spec.mask_head is not None:
            flows = [spec.mask_flow and number > 0 for number in range(len(boxes))]
            masks = [MaskHead(spec.mask_head, channels, classes, residual=flow) for flow in flows]
            self.mask_head: nn.Module = ModuleList(masks) if spec.cascade else masks[0]
        if spec.semantic is not None:
            self.semantic_head = SemanticHead(spec.semantic, channels, len(spec.proposals.strides))

    @property
    def box_heads(self) -> list[BoxHead]:
        """Returns the heads of all stages."""
        return _stages(self.bbox_head)

    @property
    def mask_heads(self) -> list[MaskHead]:
        """Returns the mask heads of all stages; none where the network has boxes only."""
        return [] if self.spec.mask_head is None else _stages(self.mask_head)

    def losses(
        self,
        maps: Sequence[Tensor],
        proposals: list[Tensor],
        targets: Targets,
        size_B2: Tensor,
        random: RandomContext,
    ) -> LossSums:
        """Returns the losses of all stages by their official names, times the stages' weights."""
        features, found = self._features(maps, targets.label_map)
        for number, (stage, head) in enumerate(zip(self.spec.stages, self.box_heads)):
            prefix = f"s{number}." if self.spec.cascade else ""
            sampled = self._sample(proposals, targets, number, 1, random, maps)
            logits, codes = head(self.box_features(features, sampled.rois))
            found |= head.losses(logits, codes, sampled).weighted(stage.weight, prefix)
            if number + 1 < len(self.spec.stages) or self.spec.interleaved:
                refined = head.refined(sampled.rois, logits.detach(), codes.detach(), size_B2, sampled.label)
                rows = [sampled.rows_of(image) & ~sampled.is_object for image in range(len(size_B2))]
                proposals = [refined[r] for r in rows]
            if self.mask_heads:
                assert targets.masks is not None, "a network with masks learns from masks"
                if self.spec.interleaved:
                    sampled = self._sample(proposals, targets, number, 2, random, maps)
                masks = self.mask_losses(features, sampled.positive(), targets.masks, number)
                found |= masks.weighted(stage.weight, prefix)
        return found

    @torch.no_grad()
    def detect(
        self, maps: Sequence[Tensor], proposals: list[Tensor], size_B2: Tensor, original_B2: Tensor
    ) -> list[Detections]:
        """Returns the detections of every image, in coordinates of the original images.

        Args:
            size: Height and width of every image in the batch.
            original: The same before it was resized.
        """
        features = self.features(maps)
        images = zip(self.scored(features, proposals, size_B2), size_B2, original_B2)
        results = [select(*found, size, original, self.spec.detections) for found, size, original in images]
        if not results or not self.mask_heads:
            return results
        scale = (size_B2 / original_B2).flip(1).repeat(1, 2)
        boxes = [found.boxes * own.to(found.boxes) for found, own in zip(results, scale)]
        masks = self.masks(features, boxes, [found.labels for found in results])
        return [found._replace(masks=own) for found, own in zip(results, masks)]

    def features(self, maps: Sequence[Tensor]) -> Features:
        """Returns what boxes look at in evaluation."""
        return self._features(maps, None)[0]

    @torch.no_grad()
    def scored(self, features: Features, proposals: list[Tensor], size_B2: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns for every image what all stages make of its proposals: boxes (P, 4 K), or (P, 4) for all classes, in
        the batch's image, and scores (P, K + 1), the last column of background."""
        if not len(size_B2):
            return []
        rois, total = rois_of(proposals), None
        for number, head in enumerate(self.box_heads):
            logits, codes = head(self.box_features(features, rois))
            total = logits if total is None else total + logits
            if number + 1 < len(self.box_heads):
                background = torch.full_like(rois[:, 0], self.spec.num_classes, dtype=torch.int64)
                boxes = head.refined(rois, logits, codes, size_B2, background)
                rois = torch.cat([rois[:, :1], boxes], dim=1)
        assert total is not None, "a network has stages"
        scores = (total / len(self.box_heads)).softmax(dim=1)
        rows = [rois[:, 0] == image for image in range(len(size_B2))]
        return [(head.decoded(rois[own, 1:], codes[own], size), scores[own]) for own, size in zip(rows, size_B2)]

    @torch.no_grad()
    def masks(self, features: Features, boxes: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
        """Returns (D, M, M) probabilities for every image: means of the stages' masks of the boxes' classes.

        boxes: (D, 4) of every image, in the batch's image.
        """
        label = torch.cat(labels)
        rows = torch.arange(len(label), device=label.device)
        logits = self.mask_logits(features, rois_of(boxes))
        masks = torch.stack([one[rows, label].sigmoid() for one in logits]).mean(dim=0)
        return list(masks.split([len(own) for own in labels]))

    def box_features(self, features: Features, rois_R5: Tensor) -> Tensor:
        """Returns (R, C, S, S), what box heads take."""
        return self._regions(features, rois_R5, self.spec.box_head.size)

    def mask_logits(self, features: Features, rois_R5: Tensor) -> list[Tensor]:
        """Returns the logits (R, K, M, M) of every stage's mask head, computed for a few boxes at a time."""
        assert self.spec.mask_head is not None, "a network with masks"
        most = most_boxes(self.spec.mask_head, rois_R5.device)
        parts = [self._mask_logits(features, rois) for rois in rois_R5.split(most)]
        return [torch.cat(stage) for stage in zip(*parts)]

    def _mask_logits(self, features: Features, rois_R5: Tensor) -> list[Tensor]:
        assert self.spec.mask_head is not None, "a network with masks"
        x = self._regions(features, rois_R5, self.spec.mask_head.size)
        return [head(hidden) for head, hidden in zip(self.mask_heads, self._mask_features(x, len(self.mask_heads)))]

    def _features(self, maps: Sequence[Tensor], label_map: Tensor | None) -> tuple[Features, LossSums]:
        if self.spec.semantic is None:
            return Features(maps, None), LossSums({}, {})
        logits, semantic = self.semantic_head(maps)
        found = LossSums({}, {}) if label_map is None else self.semantic_head.losses(logits, label_map)
        return Features(maps, semantic), found

    def _regions(self, features: Features, rois_R5: Tensor, size: int) -> Tensor:
        strides, scale = self.spec.proposals.strides, self.spec.finest_scale
        maps, strides = features.maps[: len(strides) - 1], strides[:-1]  # the coarsest level is for proposals alone
        x = region_features(maps, rois_R5, size, strides, finest_scale=scale)
        if features.semantic is not None and self.spec.semantic is not None:
            stride = strides[self.spec.semantic.level]
            seen = 14 if self.spec.mask_head is None else self.spec.mask_head.size
            semantic = region_features([features.semantic], rois_R5, seen, [stride], finest_scale=scale)
            x = x + (semantic if seen == size else F.adaptive_avg_pool2d(semantic, size))
        return x

    def _mask_features(self, x: Tensor, count: int) -> list[Tensor]:
        """Returns the hidden features (R, C, S, S) of the first `count` mask heads."""
        hidden: list[Tensor] = []
        for head in self.mask_heads[:count]:
            hidden.append(head.features(x, hidden[-1] if hidden else None))
        return hidden

    def mask_losses(self, features: Features, positive: Sampled, masks: list[Tensor], number: int) -> LossSums:
        """Returns loss_mask of a stage, unweighted.

        Args:
            positive: Boxes with an object. masks: (G, H, W) bool of every image. number: The stage's.
        """
        assert self.spec.mask_head is not None, "a network with masks"
        x = self._regions(features, positive.rois, self.spec.mask_head.size)
        if self.spec.mask_flow:
            hidden = self._mask_features(x, number + 1)[number]
        else:
            hidden = self.mask_heads[number].features(x)
        logits = self.mask_heads[number](hidden)
        wanted = mask_targets(positive, masks, logits.shape[2])
        own = logits[torch.arange(len(logits), device=logits.device), positive.label]
        return LossSums({"loss_mask": mask_loss(own, wanted)}, {"loss_mask": float(len(own))})

    def _sample(
        self,
        proposals: list[Tensor],
        targets: Targets,
        number: int,
        turn: int,
        random: RandomContext,
        maps: Sequence[Tensor],
    ) -> Sampled:
        spec = self.spec
        return sample_boxes(
            proposals,
            targets,
            spec.stages[number].assigner,
            number=spec.samples,
            positive_share=spec.positive_share,
            num_classes=spec.num_classes,
            stage=2 * number + turn,
            random=random,
            empty=widened(maps[0]).new_zeros(0, 4),
        )
