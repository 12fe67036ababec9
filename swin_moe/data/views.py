"""Two differently augmented views of an image, for contrastive pre-training: BYOL's table (arXiv:2006.07733, table 6),
as MoBY uses it (SwinTransformer/Transformer-SSL, data/build.py)."""

import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from swin_moe.config import DataConfig
from swin_moe.data.transforms import CropFlipTransform, to_tensor
from swin_moe.randomness import derive_key

_BLUR_SIZE = 224  # pixels a side that the blur's radius is given for


@dataclass(frozen=True)
class ViewStrength:
    """Probabilities of what changes a view besides crop and flip; and by how much colours jitter."""

    blur: float
    solarize: float
    jitter: float = 0.8
    grey: float = 0.2
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1


VIEWS = (ViewStrength(blur=1.0, solarize=0.0), ViewStrength(blur=0.1, solarize=0.2))


class ViewTransform:
    """Crop and flip by data.crop_scale and data.hflip, then colours, grey, blur, solarization of one of the views.

    The blur's radius, 0.1 to 2 pixels of a 224 pixel image, shrinks with the image.
    """

    def __init__(self, config: DataConfig, img_size: tuple[int, int], *, view: int) -> None:
        self._crop = CropFlipTransform(config, img_size)
        self._strength = VIEWS[view]
        self._scale = max(img_size) / _BLUR_SIZE

    def __call__(self, image: Image.Image, key: int) -> Tensor:
        """Returns (3, H, W) float32, a pure function of image and key."""
        return to_tensor(self._colour(self._crop.image(image, key), random.Random(derive_key(key, 1))))

    def _colour(self, image: Image.Image, draw: random.Random) -> Image.Image:
        strength = self._strength
        # Everything is drawn, used or not, so that one option does not move the draws of another.
        chances = [draw.random() for _ in range(4)]
        factors = [1 + draw.uniform(-1, 1) * s for s in (strength.brightness, strength.contrast, strength.saturation)]
        shift, radius = draw.uniform(-1, 1) * strength.hue, draw.uniform(0.1, 2.0) * self._scale
        steps = list(range(4))
        draw.shuffle(steps)
        if chances[0] < strength.jitter:
            enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for step in steps:
                image = enhancers[step](image).enhance(factors[step]) if step < 3 else shift_hue(image, shift)
        if chances[1] < strength.grey:
            image = ImageOps.grayscale(image).convert("RGB")
        if chances[2] < strength.blur:
            image = image.filter(ImageFilter.GaussianBlur(radius))
        return ImageOps.solarize(image) if chances[3] < strength.solarize else image


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Returns the image with every hue turned by this part of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + round(turn * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
