"""Options of images with boxes, masks or label maps: where they lie, what is drawn, how they are moved and padded."""

from dataclasses import dataclass, field
from typing import Literal

from swin_moe.config.checks import NOT_STATE, check, check_choices


@dataclass(frozen=True)
class DenseDataConfig:
    # Where things lie below data.path; "" = where they usually do (docs/detection.md).
    train_annotations: str = field(default="", metadata=NOT_STATE)  # COCO json, or the folder of label maps
    val_annotations: str = field(default="", metadata=NOT_STATE)
    train_images: str = field(default="", metadata=NOT_STATE)  # folder that file_name begins in
    val_images: str = field(default="", metadata=NOT_STATE)
    train_maps: str = field(
        default="", metadata=NOT_STATE
    )  # label maps beside a COCO json, for detectors that want both
    val_maps: str = field(default="", metadata=NOT_STATE)
    class_file: str = ""  # names of the classes of label maps, one a line
    reduce_zero_label: bool = False  # label maps: 0 is ignored, the others count from 0 (ADE20K)
    on_bad: Literal["skip", "fail"] = "skip"  # an object that is wrong is named either way; images: data.on_broken
    keep_empty: bool = False  # train on images without objects too
    min_side: int = 32  # pixels; smaller images are not trained on
    # canvases: digits on noise, made as they are read (docs/detection.md).
    canvas_size: tuple[int, int] = (64, 64)  # height, width
    canvas_digits: tuple[int, int] = (1, 3)  # least and most on a canvas
    digit_size: tuple[int, int] = (16, 32)  # least and largest side
    canvas_seed: int = 0
    digit_overlap: bool = False  # later digits lie in front, and cut the masks of those behind
    canvases: int = 1500  # of training
    val_canvases: int = 60
    # Part of the training images that have labels, drawn once for all runs by data.subset; the others are left out, or
    # kept without any (semi-supervised tasks).
    labelled: float = 1.0
    unlabelled: Literal["drop", "keep"] = "drop"
    unlabelled_images: str = field(default="", metadata=NOT_STATE)  # folder below data.path of others without any
    sample_ratio: tuple[int, int] = (1, 4)  # images with labels to those without, of training that mixes both
    # Training: flip by data.hflip; resize to a drawn short side; (detection) crop first in half of the cases;
    # (segmentation) crop to one size afterwards, distort colours.
    short: tuple[int, ...] = ()  # pixels, one is drawn; () = images keep their size
    short_between: bool = False  # any whole number from the least to the largest of them is drawn
    long: int = 1333  # the longer side is at most this
    ratio: tuple[float, float] = (1.0, 1.0)  # what both are multiplied by, drawn uniformly
    crop_short: tuple[int, ...] = ()  # short sides before the crop of detection; () = no crop
    crop_sides: tuple[int, int] = (384, 600)  # least and largest side of that crop
    # An affine move after the resize, drawn uniformly up to these either way: turned and slanted by degrees round the
    # middle, shifted by parts of the sides. Where images without labels are mixed in, their student's view alone is
    # moved so, and by one of these (Soft Teacher: 30, 30, 0.1).
    rotate: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    crop: tuple[int, int] = (0, 0)  # height, width of the crop of segmentation; smaller images are padded; 0 = none
    crop_max_share: float = 0.75  # up to ten crops are tried until no class covers more; 1 = the first is taken
    # Where images without labels are mixed in: one of nine operations on the colours of all that the student sees; how
    # many places of its view of images without labels are erased, the least and the most, of sides up to this share.
    recolour: bool = False
    erase: tuple[int, int] = (0, 0)
    erase_side: float = 0.2
    distort: bool = False  # brightness, contrast, saturation and hue as the official segmentation code draws them
    eval_short: int = 0  # of evaluation; 0 = images keep their size
    eval_long: int = 1333
    antialias: bool = True  # False: bilinear without a filter where images shrink, as the official code resizes
    divisor: int = 32  # images are padded with zeros to a multiple, right and at the bottom
    # What is padded to one size: the images of an optimizer step, so that results do not depend on how they are spread
    # over ranks, or those of one forward.
    pad_over: Literal["step", "forward"] = "step"
    group_shapes: bool = True  # a batch of training holds only images that are wider than high, or only others

    def __post_init__(self) -> None:
        check_choices(self, "data.dense")
        for name in ("canvas_digits", "digit_size", "ratio", "crop_sides", "erase"):
            low, high = getattr(self, name)
            check(low <= high, f"data.dense.{name}", (low, high), "two numbers, the smaller first")
        side = min(self.canvas_size)
        check(self.digit_size[1] <= side, "data.dense.digit_size", self.digit_size, f"at most {side} pixels, a canvas")
        whole = (self.crop[0] > 0) == (self.crop[1] > 0)
        check(whole, "data.dense.crop", self.crop, "height and width, or 0 for none")
        check(bool(self.short) or not self.crop_short, "data.dense.short", self.short, "set with data.dense.crop_short")
