"""Colour changes of the official segmentation code: brightness, contrast, saturation and hue, each half of the time."""

import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from swin_moe.data.dense.sample import DenseSample
from swin_moe.data.views import shift_hue

BRIGHTNESS = 32.0  # most that is added, of 255
FACTORS = (0.5, 1.5)  # of contrast and of saturation
HUE = 18 / 180  # most that hues turn, of the colour circle


@dataclass(frozen=True)
class Distort:
    """What one image's colours go through; None leaves a step out. Contrast comes second, or last."""

    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: float | None
    contrast_last: bool

    @classmethod
    def drawn(cls, draw: random.Random) -> "Distort":
        """Returns a drawn one. Everything is drawn, used or not, so that one choice does not move another's draw."""
        used = [draw.random() < 0.5 for _ in range(4)]
        low, high = FACTORS
        brightness, contrast = draw.uniform(-BRIGHTNESS, BRIGHTNESS), draw.uniform(low, high)
        saturation, hue = draw.uniform(low, high), draw.uniform(-HUE, HUE)
        return cls(
            brightness=brightness if used[0] else None,
            contrast=contrast if used[1] else None,
            saturation=saturation if used[2] else None,
            hue=hue if used[3] else None,
            contrast_last=draw.random() < 0.5,
        )

    def __call__(self, sample: DenseSample) -> DenseSample:
        """Returns the sample with other colours; nothing moves."""
        image = _scaled(sample.image, 1.0, self.brightness)
        if not self.contrast_last:
            image = _scaled(image, self.contrast, 0.0)
        if self.saturation is not None:
            hue, saturation, value = image.convert("HSV").split()
            factor = self.saturation
            saturation = saturation.point([min(255, int(level * factor)) for level in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        if self.hue is not None:
            image = shift_hue(image, self.hue)
        return replace(sample, image=_scaled(image, self.contrast, 0.0) if self.contrast_last else image)


def _scaled(image: Image.Image, factor: float | None, offset: float | None) -> Image.Image:
    """Returns the image with every value times the factor plus the offset, clipped; as it is where one is None."""
    if factor is None or offset is None:
        return image
    table = np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8).tolist()
    return image.point(table * 3)
