"""scikit-learn's digits pasted on noise: boxes, masks and label maps exact by construction, without a download.

A canvas is a function of (data.dense.canvas_seed, split, index). Digits of the training split (data/sets/digits.py)
stand on training canvases, the 360 others on validation ones. Each is brought bilinearly to a square of a drawn side;
where its value is above 0.3 of full scale is its mask; canvas and digit join by their maximum; boxes are the masks'
tight bounds.

Shape legend: N digits of a canvas, H height, W width, S side of a digit.
"""

import functools

import numpy as np
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.data.dense.masks import rle_area, rle_of
from swin_moe.data.dense.sample import Annotation, DenseSample
from swin_moe.data.sets.digits import Digits
from swin_moe.randomness import derive_key

_NOISE = 0.25  # of full scale: most that the background has
_ON_MASK = 0.3
_TRIES = 50  # places for a digit until it is left out


@functools.cache
def _interpolation(side: int, small: int = 8) -> np.ndarray:
    """Returns (S, 8): rows of weights that resize bilinearly, pixel centres at +0.5, the border repeated."""
    centre = np.clip((np.arange(side) + 0.5) * small / side - 0.5, 0, small - 1)
    low = np.minimum(centre.astype(np.int64), small - 2)
    weights = np.zeros((side, small))
    weights[np.arange(side), low] = 1 - (centre - low)
    weights[np.arange(side), low + 1] = centre - low
    return weights


class _Draw:
    """Whole numbers and noise from one stream of raw Philox words, which never changes between versions of numpy."""

    def __init__(self, key: int) -> None:
        self._stream = np.random.Philox(key)

    def below(self, count: int) -> int:
        """Returns a number in [0, count)."""
        return int(self._stream.random_raw() >> np.uint64(11)) * count >> 53

    def between(self, low: int, high: int) -> int:
        """Returns a number in [low, high]."""
        return low + self.below(high - low + 1)

    def noise(self, height: int, width: int) -> np.ndarray:
        """Returns (H, W) float64 in [0, 1), in steps of 1/256."""
        words = self._stream.random_raw(-(-height * width // 8))
        return words.astype("<u8").view(np.uint8)[: height * width].reshape(height, width) / 256


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Returns (x1, y1, x2, y2) round the pixels of a mask (H, W), x2 and y2 exclusive; None where it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _apart(box: tuple[int, int, int, int], others: list[tuple[int, int, int, int]]) -> bool:
    return all(box[0] >= o[2] or o[0] >= box[2] or box[1] >= o[3] or o[1] >= box[3] for o in others)


class Canvases:
    """The data set data.name=canvases. Its classes are the digits; without `boxes` background stands before them."""

    def __init__(
        self, config: DataConfig, split: str, *, boxes: bool = True, maps: bool = False, num_classes: int = 0
    ) -> None:
        self._options, self._split = config.dense, split
        digits = Digits(config, split)
        self._digits = [np.asarray(digits.sample(index)[0])[..., 0] / 255 for index in range(len(digits))]
        self._digit_labels = digits.labels()
        self._length = config.dense.canvases if split == "train" else config.dense.val_canvases
        self.classes = (() if boxes else ("background",)) + digits.classes
        self.num_classes = len(self.classes)
        self.category_ids = tuple(range(self.num_classes))
        self._kept: dict[int, DenseSample] | None = {} if config.cache else None

    def __len__(self) -> int:
        return self._length

    def path(self, index: int) -> str:
        """Returns a name for messages."""
        return f"canvases/{self._split}[{index}]"

    def sizes(self) -> np.ndarray:
        """Returns (len, 2) int64."""
        return np.tile(np.asarray(self._options.canvas_size, dtype=np.int64), (self._length, 1))

    def labels(self) -> np.ndarray:
        """Returns (len,) zeros: the options say what canvases there are."""
        return np.zeros(self._length, dtype=np.int64)

    def dense_sample(self, index: int) -> DenseSample:
        """Returns the canvas with boxes, masks and label map (0 background, 1 + digit); kept with data.cache."""
        if self._kept is None:
            return self._made(index)
        if index not in self._kept:
            self._kept[index] = self._made(index)
        return self._kept[index]

    def _made(self, index: int) -> DenseSample:
        options = self._options
        draw = _Draw(derive_key(options.canvas_seed, 0 if self._split == "train" else 1, index))
        height, width = options.canvas_size
        canvas = draw.noise(height, width) * _NOISE
        masks: list[np.ndarray] = []
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        for _ in range(draw.between(*options.canvas_digits)):
            number = draw.below(len(self._digits))
            side = draw.between(*options.digit_size)
            weights = _interpolation(side)
            digit = weights @ self._digits[number] @ weights.T
            bounds = tight_box(digit > _ON_MASK)
            assert bounds is not None, "every digit has ink"
            for _ in range(_TRIES):
                top, left = draw.below(height - side + 1), draw.below(width - side + 1)
                box = bounds[0] + left, bounds[1] + top, bounds[2] + left, bounds[3] + top
                if options.digit_overlap or _apart(box, boxes):
                    break
            else:
                continue
            mask = np.zeros((height, width), dtype=bool)
            mask[top : top + side, left : left + side] = digit > _ON_MASK
            here = canvas[top : top + side, left : left + side]
            here[:] = np.where(digit > _ON_MASK, digit, np.maximum(here, digit))
            masks = [behind & ~mask for behind in masks] + [mask]
            boxes.append(box)
            labels.append(int(self._digit_labels[number]))
        return self._sample(index, canvas, masks, labels)

    def _sample(self, index: int, canvas: np.ndarray, masks: list[np.ndarray], labels: list[int]) -> DenseSample:
        seen = [(mask, box, label) for mask, label in zip(masks, labels) if (box := tight_box(mask)) is not None]
        label_map = np.zeros(canvas.shape, dtype=np.uint8)
        for mask, _, label in seen:
            label_map[mask] = label + 1
        grey = np.rint(canvas * 255).astype(np.uint8)
        return DenseSample(
            image=Image.fromarray(np.repeat(grey[..., None], 3, axis=-1)),
            image_id=index,
            original_size=canvas.shape,
            boxes=np.asarray([box for _, box, _ in seen], dtype=np.float64).reshape(-1, 4),
            labels=np.asarray([label for *_, label in seen], dtype=np.int64),
            crowd=np.zeros(len(seen), dtype=bool),
            ids=index * (self._options.canvas_digits[1] + 1) + 1 + np.arange(len(seen)),
            masks=np.asarray([mask for mask, *_ in seen], dtype=bool).reshape(-1, *canvas.shape),
            label_map=label_map,
        )

    def truth(self, index: int) -> list[Annotation]:
        """Returns the digits as COCO has objects."""
        sample = self.dense_sample(index)
        assert sample.masks is not None
        rows: list[Annotation] = []
        for place, (x1, y1, x2, y2) in enumerate(sample.boxes.tolist()):
            rle = rle_of(sample.masks[place])
            rows.append(
                {
                    "id": int(sample.ids[place]),
                    "category_id": int(sample.labels[place]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(rle_area(rle)),
                    "iscrowd": 0,
                    "segmentation": rle,
                }
            )
        return rows
