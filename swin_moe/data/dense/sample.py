"""What an image with objects or a label map is: DenseSample, and DenseDataset, what gives them.

Shape legend: N objects, H height, W width in pixels of the image as it is now.
"""

from dataclasses import dataclass, field
from typing import Protocol, TypedDict

import numpy as np
from PIL import Image

from swin_moe.data.base import Listed

IGNORED = 255  # of a label map: no class is asked for here


class Annotation(TypedDict):
    """An object as the COCO API evaluates it, in the image as it is stored. Areas in pixels."""

    id: int
    category_id: int  # 0-based label
    bbox: list[float]  # x, y, width, height
    area: float
    iscrowd: int
    segmentation: dict | None  # RLE of the COCO API: size [height, width] and counts (bytes); None = has no mask


def _no_boxes() -> np.ndarray:
    return np.zeros((0, 4))


def _no_labels() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class DenseSample:
    """An image and what is known about its pixels; moves (geometry.py) return a new one.

    Arrays may be shared with the data set, so they are never written to.
    """

    image: Image.Image  # RGB, (W, H)
    image_id: int
    original_size: tuple[int, int]  # height, width as stored
    boxes: np.ndarray = field(default_factory=_no_boxes)  # (N, 4) float64, x1 y1 x2 y2 in pixels, x2 and y2 exclusive
    labels: np.ndarray = field(default_factory=_no_labels)  # (N,) int64, 0-based
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))  # (N,), the box is round several objects
    ids: np.ndarray = field(default_factory=_no_labels)  # (N,) int64, the annotations' numbers
    masks: np.ndarray | None = None  # (N, H, W) bool
    label_map: np.ndarray | None = None  # (H, W) uint8 or int64, 255 = ignored
    matrix: np.ndarray = field(default_factory=lambda: np.eye(3))  # stored pixel coordinates (x, y, 1) -> those of now
    labelled: bool = True  # False: there are no boxes because none are given (semi-supervised)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image now."""
        return self.image.height, self.image.width


class DenseDataset(Listed, Protocol):
    """What a data set with boxes, masks or label maps offers; of images that training may use."""

    category_ids: tuple[int, ...]  # what the data calls label 0, 1, ...

    def dense_sample(self, index: int) -> DenseSample:
        """Returns the image as stored; raises BrokenImage."""
        ...

    def truth(self, index: int) -> list[Annotation]:
        """Returns the image's objects as they are evaluated."""
        ...

    def sizes(self) -> np.ndarray:
        """Returns (len, 2) int64, height and width of every image, without decoding one."""
        ...
