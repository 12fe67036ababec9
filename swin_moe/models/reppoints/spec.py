"""RepPoints V2 as data. The defaults are those of task.detect, the official configuration's with Swin-T.

Facts: SwinTransformer/Swin-Transformer-Object-Detection, configs/_base_/models/reppointsv2_swin_bifpn.py and
mask_reppointsv2_swin_bifpn.py.
"""

from dataclasses import dataclass

from swin_moe.config.options.detect_options import DetectOptions as Given
from swin_moe.models.detection.spec import DetectionSpec

FEATURES = 8  # of a pixel, from which masks are drawn, and channels of what draws them
POINTS = 9  # of a set: the taps of a 3 x 3 convolution; the first two are the corners of the box


@dataclass(frozen=True)
class PointMaskSpec:
    """What draws masks. Numbers of layers and channels that a cell speaks of are fixed: FEATURES, and three."""

    convs: int = 4  # over the sum of the finest maps
    channels: int = 128  # of these
    most: int = 500  # cells of an image that learn a mask in a step
    weights: tuple[float, float] = (0.6, 1.0)  # of the losses of both guesses


@dataclass(frozen=True)
class PointSpec:
    """A detector over maps of strides 8 to 128."""

    num_classes: int
    channels: int = Given.channels  # of every map
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)  # pixels between cells, of every level
    neck_repeats: int = Given.neck_repeats  # passes of the neck, down and up
    groups: int = Given.norm_groups  # of every group norm
    convs: int = Given.point_convs  # of the branch of classes, and of that of points
    shared_convs: int = Given.point_shared_convs  # of what is verified, after those of points
    corner_channels: int = Given.corner_channels  # that are pooled towards a corner
    base_scale: float = Given.point_scale  # side of an object that begins with the first level, in its strides
    nearest: int = 9  # candidates of a level that an object may be assigned to
    corner_overlap: float = 0.7  # that a box keeps whose corner moves by the radius of its bump
    ignores_crowd: bool = True  # background cells in a crowd region train nothing
    per_level: int = Given.proposals_per_level[1]  # cells of a level that enter suppression
    detections: DetectionSpec = DetectionSpec(suppression=0.6)
    masks: PointMaskSpec | None = None  # None = boxes only
    size_divisor: int = 32  # pixels; images are padded to multiples
