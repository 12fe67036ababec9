"""The options of object detection: the network as data, what becomes a detection, and how a detector learns from
images without labels. Plain data, no torch.

The defaults are those of the official Mask R-CNN; swin_moe/models/detection/spec.py says what each means to the
network.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from swin_moe.config.checks import NOT_STATE, check
from swin_moe.config.options.task_options import TaskOptions

BoxLoss = Literal["l1", "smooth_l1", "giou"]


@dataclass(frozen=True)
class DetectOptions(TaskOptions):
    section = "detect"
    any_size = True
    network: Literal["two_stage", "reppoints_v2"] = "two_stage"
    channels: int = 256  # of every level's map
    masks: bool = True  # False: boxes only
    frozen_stages: int = -1  # -1 = none; 0 = patch embedding and positions; n = also the first n stages

    # Proposals. An anchor of ratio 1 has a side of anchor_scale x its level's stride.
    anchor_scale: float = 8.0
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height over width
    anchor_border: float = -1.0  # pixels that training anchors may reach beyond the image; below 0 = all train
    anchors: int = 256  # that train, of an image; half of them positive at most
    proposal_loss: BoxLoss = "l1"
    proposal_beta: float = 0.111111111111111  # below which smooth_l1 counts squared
    proposal_overlap: float = 0.7  # of boxes of a level beyond which the worse one goes
    proposals_per_level: tuple[int, int] = (2000, 1000)  # that enter suppression: training, evaluation
    proposals: tuple[int, int] = (1000, 1000)  # that are left of an image: training, evaluation

    # Stages of refinement, one value each: overlap of positive boxes, what codes are divided by, weight of losses.
    stage_overlaps: tuple[float, ...] = (0.5,)
    stage_stds: tuple[tuple[float, ...], ...] = ((0.1, 0.1, 0.2, 0.2),)
    stage_weights: tuple[float, ...] = (1.0,)
    low_quality: bool = True  # an object also trains its best boxes, where they reach the stage's overlap
    crowd_overlap: float = 0.5  # background with this share in a crowd region trains nothing; 0 = it trains
    boxes: int = 512  # that train in a stage, of an image; a quarter of them positive at most
    finest_scale: float = 56.0  # boxes of sides below twice this look at the finest level

    # Heads.
    box_convs: int = 0
    box_conv_channels: int = 256
    box_fcs: int = 2
    box_fc_channels: int = 1024
    box_norm: bool = False  # batch norm over the sampled boxes of all ranks
    box_agnostic: bool = False  # one refinement for all classes
    box_loss: BoxLoss = "l1"
    box_beta: float = 1.0
    box_loss_weight: float = 1.0
    mask_convs: int = 4
    mask_channels: int = 256

    # Hybrid Task Cascade.
    interleaved: bool = False  # masks learn from the boxes as the stage refined them
    mask_flow: bool = False  # a stage's mask features enter the next one's
    semantic_classes: int = 0  # of its semantic branch, which needs label maps; 0 = none
    semantic_weight: float = 0.2
    global_attention: bool = False  # HTC++ as rebuilt: a transformer block over the last map

    # RepPoints V2. Of what stands above it has channels, frozen_stages, crowd_overlap (0 or not) and, as the cells of a
    # level that enter suppression, the second of proposals_per_level; with masks also mask_convs and mask_channels.
    neck_repeats: int = 2  # passes of its neck, down and up
    norm_groups: int = 32  # of every group norm
    point_convs: int = 3  # of the branch of classes, and of that of points
    point_shared_convs: int = 1  # of what is verified, after those of points
    corner_channels: int = 64  # that are pooled towards corners
    point_scale: float = 4.0  # side of an object that begins with the first level, in its strides

    # Detections.
    score: float = 0.05  # above which a box counts
    overlap: float = 0.5  # of boxes of one class beyond which the worse one goes
    soft: bool = False  # it loses score instead
    detections: int = 100  # of an image
    mask_threshold: float = 0.5
    # Of an image's size in evaluation, at each of which it is looked at, with flip also mirrored; boxes, scores and
    # masks are means.
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    # Validation images that are drawn at every evaluation, with the objects of at least this score.
    pictures: int = field(default=4, metadata=NOT_STATE)
    picture_score: float = field(default=0.3, metadata=NOT_STATE)

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.stage_overlaps)
        check(count >= 1, "task.detect.stage_overlaps", self.stage_overlaps, "one number a stage, at least one")
        for name in ("stage_stds", "stage_weights"):
            value = getattr(self, name)
            check(len(value) == count, f"task.detect.{name}", value, f"one for each of {count} stages")
        fours = all(len(stds) == 4 and min(stds) > 0 for stds in self.stage_stds)
        check(fours, "task.detect.stage_stds", self.stage_stds, "four numbers > 0 a stage")
        check(len(self.scales) > 0, "task.detect.scales", self.scales, "one number or more")
        check(len(self.anchor_ratios) > 0, "task.detect.anchor_ratios", self.anchor_ratios, "one number or more")
        flows = not self.mask_flow or self.masks
        check(flows, "task.detect.mask_flow", self.mask_flow, "false with task.detect.masks=false")
        same = not self.mask_flow or self.mask_convs > 0
        check(same, "task.detect.mask_convs", self.mask_convs, ">= 1 with task.detect.mask_flow=true")

    def check(self, config: Any, *, forwards: int) -> None:
        """Raises ValueError for a network without classes, and where a step's losses or batch norm would not see all of
        its images."""
        classes, stages = config.model.num_classes, len(config.model.depths)
        check(classes >= 1, "model.num_classes", classes, f">= 1 with task.name={config.task.name}")
        check(self.frozen_stages <= stages, "task.detect.frozen_stages", self.frozen_stages, f"at most {stages}")
        height, width = config.model.patch_size
        check(height == width, "model.patch_size", config.model.patch_size, "square with task.name=detect")
        together = forwards == 1 or config.compat.official and not self.box_norm
        allowed = (
            "all images of a rank at once with task.name=detect, as what losses are divided by is known after a "
            "forward (compat.official=true without task.detect.box_norm divides each by its own)"
        )
        check(together, "data.micro_batch", config.data.micro_batch, allowed)
        if self.network == "reppoints_v2":
            self._check_points(stages)

    def _check_points(self, stages: int) -> None:
        """Raises ValueError for what RepPoints V2 has not."""
        why = "with task.detect.network=reppoints_v2"
        check(stages > 1, "model.depths", stages, f"two stages or more {why}")
        for name, value in (("semantic_classes", 0), ("global_attention", False), ("flip", False)):
            given = getattr(self, name)
            check(given == value, f"task.detect.{name}", given, f"{str(value).lower()} {why}")
        check(self.scales == (1.0,), "task.detect.scales", self.scales, f"[1.0] {why}")
        for name in ("channels", "corner_channels"):
            given = getattr(self, name)
            allowed = f"a multiple of task.detect.norm_groups={self.norm_groups} {why}"
            check(given % self.norm_groups == 0, f"task.detect.{name}", given, allowed)


@dataclass(frozen=True)
class SoftTeacherOptions(TaskOptions):
    """How a student listens to its teacher; the network is that of task.detect."""

    section = "soft_teacher"
    any_size = learns_unlabelled = True
    momentum: float = 0.999  # of the teacher's moving average at most; it begins at 0, as 1 - 1 / (step + 1)
    found_score: float = 0.5  # above which the teacher's boxes are kept at all
    proposal_score: float = 0.9  # above which the proposal network learns them
    class_score: float = 0.9  # above which they have their class
    box_spread: float = 0.02  # sides are believed where the teacher's answers to jittered boxes lie apart by less
    jitters: int = 10  # copies of a box
    jitter: float = 0.06  # standard deviation of a copy's coordinates, in sides of the box
    weight: float = 4.0  # of the losses of images without labels

    def check(self, config: Any, *, forwards: int) -> None:
        """Raises ValueError for a detector with several stages, and where there is nothing without labels."""
        detect, dense = config.task.detect, config.data.dense
        detect.check(config, forwards=forwards)
        why = "with task.name=soft_teacher"
        stages = len(detect.stage_overlaps)
        check(detect.network == "two_stage", "task.detect.network", detect.network, f"two_stage {why}")
        check(stages == 1, "task.detect.stage_overlaps", detect.stage_overlaps, f"one number {why}")
        for name, none in (("semantic_classes", "0"), ("interleaved", "false"), ("mask_flow", "false")):
            check(not getattr(detect, name), f"task.detect.{name}", getattr(detect, name), f"{none} {why}")
        check(dense.crop == (0, 0), "data.dense.crop", dense.crop, f"0 {why}")
        allowed = f"false {why}, whose batches are mixed by data.dense.sample_ratio"
        check(not dense.group_shapes, "data.dense.group_shapes", dense.group_shapes, allowed)
        if not dense.unlabelled_images:
            others = "or a folder in data.dense.unlabelled_images"
            check(dense.labelled < 1, "data.dense.labelled", dense.labelled, f"below 1 {why}, {others}")
            check(dense.unlabelled == "keep", "data.dense.unlabelled", dense.unlabelled, f"keep {why}, {others}")
