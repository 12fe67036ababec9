"""Moves of an image that act alike on its pixels, boxes, masks, label map and matrix. Pure functions of a sample.

Coordinates are continuous: pixel (x, y) covers [x, x + 1) x [y, y + 1). Boxes that a move leaves without area are
dropped with their labels and masks.

Shape legend: N objects, H height, W width before a move.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from swin_moe.data.dense.sample import IGNORED, DenseSample

Move = Callable[[DenseSample], DenseSample]


def scaled_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """Returns (height, width) of an image brought to a short side, its shape kept, the longer one at most `long`.

    Rounded as int(side * scale + 0.5), as the official detection and segmentation code does.
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _nearest(size: int, old: int) -> np.ndarray:
    """Returns (size,) which of `old` pixels each takes: the one that its left edge lies in, as OpenCV's nearest."""
    return np.minimum((np.arange(size) * (old / size)).astype(np.int64), old - 1)


def _resize_image(image: Image.Image, size: tuple[int, int], antialias: bool) -> Image.Image:
    height, width = size
    # Where an image grows the filter is bilinear interpolation itself, and Pillow four times as fast as floats.
    if antialias or (height >= image.height and width >= image.width):
        return image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return Image.fromarray(resized[0].permute(1, 2, 0).round().to(torch.uint8).numpy())


def select(sample: DenseSample, kept: np.ndarray) -> DenseSample:
    """Returns the sample with some of its objects, by numbers or as a mask (N,)."""
    return replace(
        sample,
        boxes=sample.boxes[kept],
        labels=sample.labels[kept],
        crowd=sample.crowd[kept],
        ids=sample.ids[kept],
        masks=None if sample.masks is None else sample.masks[kept],
    )


def _clipped(sample: DenseSample) -> DenseSample:
    """Returns the sample with boxes cut at the image's edges, those without area dropped."""
    height, width = sample.size
    boxes = sample.boxes.clip(0, [width, height, width, height])
    sample = replace(sample, boxes=boxes)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return sample if kept.all() else select(sample, kept)


@dataclass(frozen=True)
class Resize:
    """Brings an image to (height, width): bilinear, masks and label map by the nearest pixel."""

    size: tuple[int, int]
    antialias: bool = True

    def __call__(self, sample: DenseSample) -> DenseSample:
        """Returns the resized sample."""
        old, new = sample.size, self.size
        if old == new:
            return sample
        scale = np.asarray([new[1] / old[1], new[0] / old[0]])
        rows, columns = _nearest(new[0], old[0]), _nearest(new[1], old[1])
        moved = replace(
            sample,
            image=_resize_image(sample.image, new, self.antialias),
            boxes=sample.boxes * np.tile(scale, 2),
            masks=None if sample.masks is None else sample.masks.take(columns, 2).take(rows, 1),
            label_map=None if sample.label_map is None else sample.label_map.take(columns, 1).take(rows, 0),
            matrix=np.diag([*scale, 1.0]) @ sample.matrix,
        )
        return _clipped(moved)


@dataclass(frozen=True)
class Flip:
    """Mirrors left and right."""

    def __call__(self, sample: DenseSample) -> DenseSample:
        """Returns the mirrored sample."""
        width = sample.image.width
        boxes = sample.boxes.copy()
        boxes[:, [0, 2]] = width - sample.boxes[:, [2, 0]]
        return replace(
            sample,
            image=sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            boxes=boxes,
            masks=None if sample.masks is None else np.ascontiguousarray(sample.masks[..., ::-1]),
            label_map=None if sample.label_map is None else np.ascontiguousarray(sample.label_map[..., ::-1]),
            matrix=np.asarray([[-1.0, 0.0, width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) @ sample.matrix,
        )


@dataclass(frozen=True)
class Crop:
    """Cuts a rectangle out; boxes are clipped to it.

    places: (top, left) to try in order, until no class covers more than `max_share` of the label map's pixels that are
        not ignored; the last is taken as it is.
    """

    size: tuple[int, int]
    places: tuple[tuple[int, int], ...]
    max_share: float = 1.0

    def __call__(self, sample: DenseSample) -> DenseSample:
        """Returns the cut sample."""
        top, left = self._place(sample)
        height, width = self.size
        rows, columns = slice(top, top + height), slice(left, left + width)
        moved = replace(
            sample,
            image=sample.image.crop((left, top, left + width, top + height)),
            boxes=sample.boxes - [left, top, left, top],
            masks=None if sample.masks is None else np.ascontiguousarray(sample.masks[:, rows, columns]),
            label_map=None if sample.label_map is None else np.ascontiguousarray(sample.label_map[rows, columns]),
            matrix=np.asarray([[1.0, 0.0, -left], [0.0, 1.0, -top], [0.0, 0.0, 1.0]]) @ sample.matrix,
        )
        return _clipped(moved)

    def _place(self, sample: DenseSample) -> tuple[int, int]:
        if sample.label_map is None or self.max_share >= 1:
            return self.places[0]
        height, width = self.size
        for top, left in self.places:
            part = sample.label_map[top : top + height, left : left + width]
            counts = np.bincount(part[part != IGNORED])
            if (counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return top, left


@dataclass(frozen=True)
class Affine:
    """Moves every point (x, y) to the matrix's first two rows times (x, y, 1), within an image of the same size.

    Bilinear; masks and label map by the nearest pixel; `fill`, and ignored, where nothing comes from. A box becomes the
    bounds of its four moved corners, clipped.
    """

    matrix: tuple[tuple[float, float, float], tuple[float, float, float]]
    fill: int = 0  # grey level

    def __call__(self, sample: DenseSample) -> DenseSample:
        """Returns the moved sample."""
        matrix = np.vstack([self.matrix, [0.0, 0.0, 1.0]])
        size = sample.image.size
        # PIL asks where an output pixel comes from, and samples at pixel centres itself.
        back = tuple(np.linalg.inv(matrix)[:2].ravel())

        def move(values: np.ndarray, fill: int) -> np.ndarray:
            moved = Image.fromarray(values.astype(np.uint8)).transform(
                size, Image.Transform.AFFINE, back, Image.Resampling.NEAREST, fillcolor=fill
            )
            return np.asarray(moved)

        masks = sample.masks
        if masks is not None:
            masks = np.asarray([move(mask, 0) > 0 for mask in masks], dtype=bool).reshape(masks.shape)
        grey = (self.fill,) * 3
        image = sample.image.transform(size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR, fillcolor=grey)
        moved = replace(
            sample,
            image=image,
            boxes=moved_boxes(sample.boxes, matrix),
            masks=masks,
            label_map=None if sample.label_map is None else move(sample.label_map, IGNORED),
            matrix=matrix @ sample.matrix,
        )
        return _clipped(moved)


def moved_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Returns (N, 4), the bounds of the boxes' four corners after a matrix (3, 3)."""
    x1, y1, x2, y2 = boxes.T
    corners = np.stack([np.stack([x, y, np.ones_like(x)]) for x in (x1, x2) for y in (y1, y2)])  # (4, 3, N)
    moved = matrix @ corners
    points = moved[:, :2] / moved[:, 2:]
    return np.concatenate([points.min(0), points.max(0)]).T


def affine(
    size: tuple[int, int],
    *,
    degrees: float,
    shear: float,
    shift: tuple[float, float],
    slant: float = 0.0,
    fill: int = 0,
) -> Affine:
    """Returns the move that slants and turns an image round its middle, then shifts it.

    Args:
        size: Height, width. degrees: Clockwise as seen. shear: Degrees that the vertical is slanted by.
        shift: In pixels, right and down. slant: Degrees that the horizontal is slanted by. fill: See Affine.
    """
    height, width = size
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    linear = np.asarray([[cos, -sin], [sin, cos]]) @ np.asarray([[1.0, math.tan(math.radians(shear))], [0.0, 1.0]])
    if slant:
        linear = linear @ np.asarray([[1.0, 0.0], [math.tan(math.radians(slant)), 1.0]])
    middle = np.asarray([width / 2, height / 2])
    offset = middle - linear @ middle + shift
    (a, b), (c, d) = linear.tolist()
    return Affine(((a, b, float(offset[0])), (c, d, float(offset[1]))), fill)
