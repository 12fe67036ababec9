"""What a step does to an image, planned from its stored size and a key, and done later to all of it alike.

A plan knows the size it ends with before a pixel is read: the padded size of a step needs no image of another rank.
The official augmentations of detection (1x and 3x) and of UPerNet are options of data.dense: docs/detection.md.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from swin_moe.config import DataConfig
from swin_moe.data.dense.colours import Distort
from swin_moe.data.dense.geometry import Crop, Flip, Move, Resize, affine, scaled_size
from swin_moe.data.dense.sample import DenseSample
from swin_moe.data.dense.strong import Recolour, strong_moves
from swin_moe.randomness import derive_key

_CROP_TRIES = 10  # of segmentation
# Whose an image of training is: a task's of images with labels alone; or, where images without are mixed in, one with
# labels, or what the teacher or the student sees of one without.
View = Literal["plain", "labelled", "teacher", "student"]


@dataclass(frozen=True)
class Plan:
    """The moves of one image, in order."""

    size: tuple[int, int]  # height, width at the end
    moves: tuple[Move, ...]

    def apply(self, sample: DenseSample) -> DenseSample:
        """Returns the sample after all moves."""
        for move in self.moves:
            sample = move(sample)
        return sample


Planner = Callable[[int, int, int], Plan]  # height, width, key


def build_planner(config: DataConfig, *, train: bool) -> Planner:
    """Returns the planner of training, or of evaluation, where the key is not used."""
    return TrainingPlanner(config) if train else EvaluationPlanner(config)


class EvaluationPlanner:
    """Resizes to data.dense.eval_short, at most eval_long on the longer side."""

    def __init__(self, config: DataConfig) -> None:
        self._short, self._long = config.dense.eval_short, config.dense.eval_long
        self._antialias = config.dense.antialias

    def __call__(self, height: int, width: int, key: int = 0) -> Plan:
        """Returns the plan of an image of this size."""
        if not self._short:
            return Plan((height, width), ())
        size = scaled_size(height, width, self._short, self._long)
        return Plan(size, (Resize(size, self._antialias),))


def _stream(key: int, part: int) -> random.Random:
    return random.Random(derive_key(key, part))


def _choose(draw: random.Random, values: Sequence[int]) -> int:
    return values[int(draw.random() * len(values))]


def _between(draw: random.Random, low: int, high: int) -> int:
    """Returns a whole number in [low, high]."""
    return low + int(draw.random() * (high - low + 1))


class TrainingPlanner:
    """Flip; half of the time resize and crop (detection); resize; turn; crop to one size (segmentation); colours.

    Each part draws from a stream of its own, so that one option does not move the draws of another. Where images
    without labels are mixed in, a teacher's images are flipped and resized alone, a student's then moved strongly
    (strong.py), and those with labels recoloured.
    """

    def __init__(self, config: DataConfig, view: View = "plain") -> None:
        self._hflip, self._options, self._view = config.hflip, config.dense, view

    def __call__(self, height: int, width: int, key: int) -> Plan:
        """Returns the plan of an image of this size; a pure function of size and key."""
        options, moves, size = self._options, list[Move](), (height, width)
        if _stream(key, 0).random() < self._hflip:
            moves.append(Flip())
        if options.crop_short and (draw := _stream(key, 1)).random() < 0.5:
            size = self._resized(moves, size, _choose(draw, options.crop_short), options.long)
            low, high = options.crop_sides
            cut = (_between(draw, min(side, low), min(side, high)) for side in size)
            size = self._cropped(moves, draw, size, (next(cut), next(cut)), tries=1)
        if options.short:
            draw = _stream(key, 2)
            ratio = draw.uniform(*options.ratio)
            side = options.short
            drawn = _between(draw, min(side), max(side)) if options.short_between else _choose(draw, side)
            short, long = int(drawn * ratio), int(options.long * ratio)
            size = self._resized(moves, size, max(1, short), max(1, long))
        if self._view != "plain":
            return Plan(size, (*moves, *self._of_view(size, key)))
        if options.rotate or options.shear or options.translate:
            draw = _stream(key, 5)
            degrees, shear, right, down = (draw.uniform(-1, 1) for _ in range(4))
            shift = right * options.translate * size[1], down * options.translate * size[0]
            moves.append(affine(size, degrees=degrees * options.rotate, shear=shear * options.shear, shift=shift))
        if options.crop[0]:
            cut_size, share = (min(size[0], options.crop[0]), min(size[1], options.crop[1])), options.crop_max_share
            self._cropped(moves, _stream(key, 3), size, cut_size, tries=_CROP_TRIES, max_share=share)
            size = options.crop  # what is missing is padded by the batch
        if options.distort:
            moves.append(Distort.drawn(_stream(key, 4)))
        return Plan(size, tuple(moves))

    def _of_view(self, size: tuple[int, int], key: int) -> list[Move]:
        options, moves = self._options, list[Move]()
        if self._view == "student":
            moves = strong_moves(_stream(key, 6), size, options)
        elif self._view == "labelled" and options.recolour:
            moves = [Recolour.drawn(_stream(key, 6))]
        if options.distort and self._view != "teacher":
            moves.append(Distort.drawn(_stream(key, 4)))
        return moves

    def _resized(self, moves: list[Move], size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
        new = scaled_size(*size, short, long)
        moves.append(Resize(new, self._options.antialias))
        return new

    @staticmethod
    def _cropped(
        moves: list[Move],
        draw: random.Random,
        size: tuple[int, int],
        cut: tuple[int, int],
        *,
        tries: int,
        max_share: float = 1.0,
    ) -> tuple[int, int]:
        margin = size[0] - cut[0], size[1] - cut[1]
        places = tuple((_between(draw, 0, margin[0]), _between(draw, 0, margin[1])) for _ in range(tries))
        moves.append(Crop(cut, places, max_share))
        return cut
