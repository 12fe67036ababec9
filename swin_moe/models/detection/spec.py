"""Detectors as data. The defaults are those of task.detect, the official Mask R-CNN's.

Facts: SwinTransformer/Swin-Transformer-Object-Detection, configs/_base_/models and configs/swin.
"""

from dataclasses import dataclass

from swin_moe.config.options.detect_options import BoxLoss
from swin_moe.config.options.detect_options import DetectOptions as Given
from swin_moe.models.detection.assign import Assigner


@dataclass(frozen=True)
class Selection:
    """How many proposals the region proposal network gives."""

    per_level: int  # that enter suppression, of each level's map
    per_image: int  # that are left


@dataclass(frozen=True)
class ProposalSpec:
    """The region proposal network."""

    strides: tuple[int, ...] = (4, 8, 16, 32, 64)  # pixels between anchors, of every level
    scale: float = Given.anchor_scale  # side of an anchor of ratio 1, in strides
    ratios: tuple[float, ...] = Given.anchor_ratios  # height over width
    border: float | None = None  # pixels that training anchors may reach beyond the image; None = all train
    assigner: Assigner = Assigner(0.7, 0.3, low_quality=0.3)
    samples: int = Given.anchors  # anchors of an image that train
    positive_share: float = 0.5  # of them, at most
    loss: BoxLoss = Given.proposal_loss
    beta: float = 1 / 9  # of smooth_l1; the option has its decimals
    suppression: float = Given.proposal_overlap  # of boxes of one level beyond which the worse one goes
    training: Selection = Selection(Given.proposals_per_level[0], Given.proposals[0])
    testing: Selection = Selection(Given.proposals_per_level[1], Given.proposals[1])


@dataclass(frozen=True)
class BoxHeadSpec:
    """What classifies and refines boxes: convolutions, then linear layers, then two outputs."""

    convs: int = Given.box_convs
    conv_channels: int = Given.box_conv_channels
    fcs: int = Given.box_fcs
    fc_channels: int = Given.box_fc_channels
    norm: bool = Given.box_norm  # batch norm after the convolutions
    agnostic: bool = Given.box_agnostic  # one code for all classes
    size: int = 7  # bins per side of a box's features
    loss: BoxLoss = Given.box_loss
    beta: float = Given.box_beta  # of smooth_l1
    loss_weight: float = Given.box_loss_weight  # of the box loss; 10 with giou


@dataclass(frozen=True)
class MaskHeadSpec:
    convs: int = Given.mask_convs
    channels: int = Given.mask_channels
    size: int = 14  # bins per side of a box's features; masks have twice as many


@dataclass(frozen=True)
class Stage:
    """One refinement of boxes."""

    assigner: Assigner = Assigner(0.5, 0.5, low_quality=0.5)
    stds: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)  # that codes are divided by
    weight: float = 1.0  # of its losses


CASCADE = (
    Stage(Assigner(0.5, 0.5), (0.1, 0.1, 0.2, 0.2), 1.0),
    Stage(Assigner(0.6, 0.6), (0.05, 0.05, 0.1, 0.1), 0.5),
    Stage(Assigner(0.7, 0.7), (0.033, 0.033, 0.067, 0.067), 0.25),
)


@dataclass(frozen=True)
class SemanticSpec:
    """HTC's semantic branch."""

    num_classes: int = 183
    convs: int = 4
    level: int = 1  # whose size its map has
    loss_weight: float = Given.semantic_weight


@dataclass(frozen=True)
class DetectionSpec:
    """What becomes a detection."""

    score: float = Given.score  # above it
    suppression: float = Given.overlap  # of boxes of one class beyond which the worse one goes
    soft: bool = Given.soft  # it loses score instead (soft NMS, linear)
    per_image: int = Given.detections
    mask_threshold: float = Given.mask_threshold
    scales: tuple[float, ...] = Given.scales  # of an image's size, at which it is looked at
    mirror: bool = Given.flip  # and at each mirrored too

    @property
    def several(self) -> bool:
        """Whether an image is looked at otherwise than once as it is."""
        return self.mirror or self.scales != (1.0,)


@dataclass(frozen=True)
class DetectorSpec:
    """A two-stage detector over a backbone."""

    num_classes: int
    channels: int = Given.channels  # of every level
    proposals: ProposalSpec = ProposalSpec()
    stages: tuple[Stage, ...] = (Stage(),)
    cascade: bool = False  # parameters of stages are numbered, also of one
    box_head: BoxHeadSpec = BoxHeadSpec()
    mask_head: MaskHeadSpec | None = MaskHeadSpec()  # None = boxes only
    samples: int = Given.boxes  # boxes of an image that a stage learns from
    positive_share: float = 0.25  # of them, at most
    finest_scale: float = Given.finest_scale  # boxes of sides below twice this are looked up in the finest level
    interleaved: bool = Given.interleaved  # HTC: masks learn from the boxes as the stage refined them
    mask_flow: bool = Given.mask_flow  # HTC: a stage's mask features enter the next stage's
    semantic: SemanticSpec | None = None
    global_attention: bool = (
        Given.global_attention
    )  # HTC++, rebuilt: a transformer block over the last map of the backbone
    detections: DetectionSpec = DetectionSpec()
    size_divisor: int = 32  # pixels; images are padded to multiples


def mask_rcnn(num_classes: int = 80, **changes: object) -> DetectorSpec:
    """Returns the official Mask R-CNN, with other fields where given."""
    return DetectorSpec(num_classes, **changes)  # type: ignore[arg-type]
