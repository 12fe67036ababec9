"""The networks that task.detect describes: two-stage detectors, and RepPoints V2."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

from swin_moe.config import Config
from swin_moe.config.options.detect_options import DetectOptions
from swin_moe.models.dense.network import DenseNetwork
from swin_moe.models.dense.pyramid import PyramidBackbone
from swin_moe.models.detection.assign import Assigner
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.spec import (
    BoxHeadSpec,
    DetectionSpec,
    DetectorSpec,
    MaskHeadSpec,
    ProposalSpec,
    Selection,
    SemanticSpec,
    Stage,
)
from swin_moe.models.reppoints.network import RepPoints
from swin_moe.models.reppoints.spec import PointMaskSpec, PointSpec

S = TypeVar("S")


def build_detector(config: Config) -> DenseNetwork:
    """Returns the detector, without meaningful weights."""
    size, official = image_size_of(config), config.compat.official
    if config.task.detect.network == "reppoints_v2":
        backbone = build_backbone(config, out_indices=range(1, len(config.model.depths)))
        return RepPoints(backbone, point_spec_of(config), image_size=size, official_groups=official)
    return Detector(build_backbone(config), spec_of(config), image_size=size, official_groups=official)


def build_backbone(config: Config, *, out_indices: Sequence[int] | None = None, learns: bool = True) -> PyramidBackbone:
    """Returns the backbone of a detector. learns: Whether it ever keeps a graph, and so recomputes as the run does."""
    return PyramidBackbone(
        config.model,
        out_indices=out_indices,
        frozen_stages=config.task.detect.frozen_stages,
        recompute=config.parallel.recompute if learns else "none",
    )


def image_size_of(config: Config) -> tuple[int, int]:
    """Returns the (height, width) that operations are counted for: of the smallest images, where they are resized."""
    dense = config.data.dense
    return (min(dense.short), dense.long) if dense.short else config.model.img_size


def point_spec_of(config: Config) -> PointSpec:
    """Returns the RepPoints V2 that task.detect describes: a level a stage from the second on, and two coarser ones."""
    options, patch = config.task.detect, config.model.patch_size[0]
    return PointSpec(
        num_classes=config.model.num_classes,
        channels=options.channels,
        strides=tuple(patch * 2**level for level in range(1, len(config.model.depths) + 2)),
        neck_repeats=options.neck_repeats,
        groups=options.norm_groups,
        convs=options.point_convs,
        shared_convs=options.point_shared_convs,
        corner_channels=options.corner_channels,
        base_scale=options.point_scale,
        ignores_crowd=options.crowd_overlap > 0 and not config.compat.official,
        per_level=options.proposals_per_level[1],
        detections=_detections(options),
        masks=PointMaskSpec(options.mask_convs, options.mask_channels) if options.masks else None,
        size_divisor=config.data.dense.divisor,
    )


def spec_of(config: Config) -> DetectorSpec:
    """Returns the two-stage detector that task.detect describes."""
    options = config.task.detect
    stages = zip(options.stage_overlaps, options.stage_stds, options.stage_weights, strict=True)
    crowd = None if config.compat.official or options.crowd_overlap <= 0 else options.crowd_overlap
    levels, patch = len(config.model.depths) + 1, config.model.patch_size[0]
    return DetectorSpec(
        num_classes=config.model.num_classes,
        channels=options.channels,
        proposals=_proposals(options, tuple(patch * 2**level for level in range(levels)), crowd),
        stages=tuple(
            Stage(Assigner(overlap, overlap, overlap if options.low_quality else None, crowd), stds, weight)
            for overlap, stds, weight in stages
        ),
        cascade=len(options.stage_overlaps) > 1,
        box_head=_of_prefix(BoxHeadSpec, "box_", options),
        mask_head=_of_prefix(MaskHeadSpec, "mask_", options) if options.masks else None,
        samples=options.boxes,
        finest_scale=options.finest_scale,
        interleaved=options.interleaved,
        mask_flow=options.mask_flow,
        semantic=_semantic(options),
        global_attention=options.global_attention,
        detections=_detections(options),
        size_divisor=config.data.dense.divisor,
    )


def _proposals(options: DetectOptions, strides: tuple[int, ...], crowd: float | None) -> ProposalSpec:
    per_level, per_image = options.proposals_per_level, options.proposals
    return ProposalSpec(
        strides=strides,
        scale=options.anchor_scale,
        ratios=options.anchor_ratios,
        border=None if options.anchor_border < 0 else options.anchor_border,
        assigner=Assigner(0.7, 0.3, low_quality=0.3, crowd=crowd),
        samples=options.anchors,
        loss=options.proposal_loss,
        beta=options.proposal_beta,
        suppression=options.proposal_overlap,
        training=Selection(per_level[0], per_image[0]),
        testing=Selection(per_level[1], per_image[1]),
    )


def _semantic(options: DetectOptions) -> SemanticSpec | None:
    if not options.semantic_classes:
        return None
    return SemanticSpec(options.semantic_classes, loss_weight=options.semantic_weight)


def _detections(options: DetectOptions) -> DetectionSpec:
    return DetectionSpec(
        options.score,
        options.overlap,
        options.soft,
        options.detections,
        options.mask_threshold,
        options.scales,
        options.flip,
    )


def _of_prefix(kind: type[S], prefix: str, options: DetectOptions) -> S:
    """Returns a part of a detector whose fields are the options of this prefix; what no option says is as it is."""
    names = [field.name for field in fields(kind) if hasattr(options, prefix + field.name)]  # type: ignore[arg-type]
    return kind(**{name: getattr(options, prefix + name) for name in names})
