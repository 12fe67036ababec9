"""Moves of an image that act alike on its pixels, boxes, masks, label map and matrix. Pure functions of a sample.

Shape legend: N objects, H height, W width before a move.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from swin_moe.data.dense.sample import DenseSample

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
    if antialias:
        return image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return Image.fromarray(resized[0].permute(1, 2, 0).round().to(torch.uint8).numpy())


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
        return replace(
            sample,
            image=_resize_image(sample.image, new, self.antialias),
            boxes=sample.boxes * np.tile(scale, 2),
            masks=None if sample.masks is None else sample.masks[:, rows[:, None], columns],
            label_map=None if sample.label_map is None else sample.label_map[rows[:, None], columns],
            matrix=np.diag([*scale, 1.0]) @ sample.matrix,
        )


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
