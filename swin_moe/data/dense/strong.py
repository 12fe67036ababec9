"""What Soft Teacher's student sees more than its teacher: other colours, a turned, shifted or slanted image, erasures.

Facts: arXiv:2106.09018, table 2; microsoft/SoftTeacher, configs/soft_teacher/base.py and ssod/datasets/pipelines. Of
the colour operations one is drawn, and its strength among nine steps.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from swin_moe.config.options.dense_data import DenseDataConfig
from swin_moe.data.dense.geometry import Affine, Move, affine
from swin_moe.data.dense.sample import DenseSample

GREY = 125  # of what a move leaves empty, and of erased places
_STEPS = 10  # of a colour operation's strength; the first and the last are not drawn

Operation = Literal[
    "identity", "autocontrast", "equalize", "solarize", "posterize", "color", "contrast", "brightness", "sharpness"
]
_ENHANCED = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


@dataclass(frozen=True)
class Recolour:
    """One operation on an image's colours; nothing moves."""

    operation: Operation
    step: int  # of its strength, 1 to 9

    @classmethod
    def drawn(cls, draw: random.Random) -> "Recolour":
        """Returns a drawn one."""
        operations = get_args(Operation)
        return cls(operations[int(draw.random() * len(operations))], 1 + int(draw.random() * (_STEPS - 1)))

    def __call__(self, sample: DenseSample) -> DenseSample:
        """Returns the sample with other colours."""
        image = sample.image
        if self.operation in _ENHANCED:
            image = _ENHANCED[self.operation](image).enhance(self.step * 1.8 / _STEPS + 0.1)
        elif self.operation == "solarize":
            image = ImageOps.solarize(image, self.step * 256 // _STEPS)
        elif self.operation == "posterize":
            image = ImageOps.posterize(image, 4 - self.step * 4 // _STEPS)
        elif self.operation == "autocontrast":
            image = ImageOps.autocontrast(image)
        elif self.operation == "equalize":
            image = ImageOps.equalize(image)
        return replace(sample, image=image)


@dataclass(frozen=True)
class Erase:
    """Paints rectangles grey; boxes, masks and label map stay: what is hidden is to be found all the same."""

    places: tuple[tuple[int, int, int, int], ...]  # top, left, bottom, right

    @classmethod
    def drawn(cls, draw: random.Random, size: tuple[int, int], options: DenseDataConfig) -> "Erase":
        """Returns a drawn one for an image of this (height, width)."""
        low, high = options.erase
        places = []
        for _ in range(low + int(draw.random() * (high - low + 1))):
            share = draw.random() * options.erase_side
            height, width = int(share * size[0]), int(share * size[1])
            top, left = int(draw.random() * (size[0] - height)), int(draw.random() * (size[1] - width))
            places.append((top, left, top + height, left + width))
        return cls(tuple(places))

    def __call__(self, sample: DenseSample) -> DenseSample:
        """Returns the sample with erased places."""
        pixels = np.array(sample.image)
        for top, left, bottom, right in self.places:
            pixels[top:bottom, left:right] = GREY
        return replace(sample, image=Image.fromarray(pixels))


def _turned(draw: random.Random, size: tuple[int, int], options: DenseDataConfig) -> Affine | None:
    """Returns one of the geometric moves that the options allow, or None where they allow none."""
    across, down, turn, slant, other = (draw.uniform(-1, 1) for _ in range(5))
    kinds = ["right", "down"] * (options.translate > 0)
    kinds += ["turn"] * (options.rotate > 0) + ["slant"] * (options.shear > 0)
    if not kinds:
        return None
    kind = kinds[int(draw.random() * len(kinds))]
    shift = (
        across * options.translate * size[1] * (kind == "right"),
        down * options.translate * size[0] * (kind == "down"),
    )
    return affine(
        size,
        degrees=turn * options.rotate * (kind == "turn"),
        shear=slant * options.shear * (kind == "slant"),
        slant=other * options.shear * (kind == "slant"),
        shift=shift,
        fill=GREY,
    )


def strong_moves(draw: random.Random, size: tuple[int, int], options: DenseDataConfig) -> list[Move]:
    """Returns the moves of an image of this (height, width): colours and a geometric move in any order, erasures."""
    moves: list[Move] = [Recolour.drawn(draw)] if options.recolour else []
    turned = _turned(draw, size, options)
    if turned is not None:
        moves.append(turned)
    if draw.random() < 0.5:
        moves.reverse()
    erase = Erase.drawn(draw, size, options)
    return moves + [erase] * bool(erase.places)
