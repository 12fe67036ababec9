"""Detectors as data. The defaults are those of the official Mask R-CNN.

Facts: SwinTransformer/Swin-Transformer-Object-Detection, configs/_base_/models and configs/swin.
"""

from dataclasses import dataclass, field

from swin_moe.config.options.detect_options import BoxLoss
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
    scale: float = 8.0  # side of an anchor of ratio 1, in strides
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height over width
    border: float | None = None  # pixels that training anchors may reach beyond the image; None = all train
    assigner: Assigner = Assigner(0.7, 0.3, low_quality=0.3)
    samples: int = 256  # anchors of an image that train
    positive_share: float = 0.5  # of them, at most
    loss: BoxLoss = "l1"
    beta: float = 1 / 9  # of smooth_l1
    suppression: float = 0.7  # overlap of boxes of one level beyond which the worse one goes
    training: Selection = Selection(2000, 1000)
    testing: Selection = Selection(1000, 1000)


@dataclass(frozen=True)
class BoxHeadSpec:
    """What classifies and refines boxes: convolutions, then linear layers, then two outputs."""

    convs: int = 0
    conv_channels: int = 256
    fcs: int = 2
    fc_channels: int = 1024
    norm: bool = False  # batch norm after the convolutions
    agnostic: bool = False  # one code for all classes
    size: int = 7  # bins per side of a box's features
    loss: BoxLoss = "l1"
    beta: float = 1.0  # of smooth_l1
    loss_weight: float = 1.0  # of the box loss; 10 with giou


@dataclass(frozen=True)
class MaskHeadSpec:
    convs: int = 4
    channels: int = 256
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
    loss_weight: float = 0.2


@dataclass(frozen=True)
class DetectionSpec:
    """What becomes a detection."""

    score: float = 0.05  # above it
    suppression: float = 0.5  # overlap of boxes of one class beyond which the worse one goes
    soft: bool = False  # it loses score instead (soft NMS, linear)
    per_image: int = 100
    mask_threshold: float = 0.5
    scales: tuple[float, ...] = (1.0,)  # of an image's size, at which it is looked at
    mirror: bool = False  # and at each mirrored too

    @property
    def several(self) -> bool:
        """Whether an image is looked at otherwise than once as it is."""
        return self.mirror or self.scales != (1.0,)


@dataclass(frozen=True)
class DetectorSpec:
    """A two-stage detector over a backbone."""

    num_classes: int
    channels: int = 256  # of every level
    proposals: ProposalSpec = ProposalSpec()
    stages: tuple[Stage, ...] = (Stage(),)
    cascade: bool = False  # parameters of stages are numbered, also of one
    box_head: BoxHeadSpec = BoxHeadSpec()
    mask_head: MaskHeadSpec | None = MaskHeadSpec()  # None = boxes only
    samples: int = 512  # boxes of an image that a stage learns from
    positive_share: float = 0.25  # of them, at most
    finest_scale: float = 56.0  # boxes of sides below twice this are looked up in the finest level
    interleaved: bool = False  # HTC: masks learn from the boxes as the stage refined them
    mask_flow: bool = False  # HTC: a stage's mask features enter the next stage's
    semantic: SemanticSpec | None = None
    global_attention: bool = False  # HTC++, rebuilt: a transformer block over the last map of the backbone
    detections: DetectionSpec = DetectionSpec()
    size_divisor: int = field(default=32)  # pixels; images are padded to multiples


def mask_rcnn(num_classes: int = 80, **changes: object) -> DetectorSpec:
    """Returns the official Mask R-CNN, with other fields where given."""
    return DetectorSpec(num_classes, **changes)  # type: ignore[arg-type]
