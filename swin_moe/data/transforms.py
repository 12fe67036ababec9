"""From a PIL image to the network's input: training augmentation and the evaluation resize.

Augmentation is a pure function of a key, so it is equal for every world size, worker count and point of resumption.
timm draws from the global generators of `random`, numpy and torch; they are seeded for one image and put back after it.
"""

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from swin_moe.config import DataConfig
from swin_moe.data.pixels import Box, Encoded, whole
from swin_moe.randomness import PURPOSES, derive_key

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MEAN = torch.tensor(IMAGENET_MEAN)[:, None, None]
_STD = torch.tensor(IMAGENET_STD)[:, None, None]
_CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop, timm's and torchvision's default
_CROP_ATTEMPTS = 10
_PADDING = 4  # pixels of black around an image that is cropped without a resize
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

Transform = Callable[[Image.Image, int], Tensor]


def augment_key(seed: int, epoch: int, index: int) -> int:
    """Returns the key of all random draws for image `index` of the data set in this epoch."""
    return derive_key(seed, epoch, index, PURPOSES.index("augment"))


class Patch(NamedTuple):
    """A rectangle of a normalized image that is replaced (random erasing)."""

    top: int
    left: int
    values: np.ndarray  # (3, h, w) float32; an array, as each tensor would be a shared file between processes


class Pixels(NamedTuple):
    """A transformed image before it is scaled and normalized: a quarter of the bytes on the way between processes.

    Rows hold a channel after the other, which is converted in three quarters of the time that (H, W, 3) takes.
    """

    levels: np.ndarray  # (H, 3, W) uint8, not to be written to
    patches: Sequence[Patch]


class PixelTransform(Protocol):
    """A transform that also gives what it does as pixels; `normalized` of these is its result, bit for bit."""

    def __call__(self, image: Image.Image, key: int) -> Tensor:
        """Returns (3, H, W) float32."""
        ...

    def pixels(self, image: Image.Image | Encoded, key: int) -> Pixels:
        """Returns the transformed image; the global generators are left seeded, see generators_kept."""
        ...


def normalized(levels: Tensor, patches: Sequence[Patch], out: Tensor) -> Tensor:
    """Returns out (3, H, W) float32, filled with an image (H, 3, W) uint8 and its patches."""
    out.copy_(levels.transpose(0, 1)).div_(255).sub_(_MEAN).div_(_STD)
    for top, left, values in patches:
        out[:, top : top + values.shape[1], left : left + values.shape[2]] = torch.from_numpy(values)
    return out


def seed_generators(key: int) -> None:
    """Seeds the global generators of random, numpy and torch (CPU)."""
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    torch.default_generator.manual_seed(key)  # torch.manual_seed would reseed CUDA too


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seeds the global generators of random, numpy and torch (CPU) within the block and restores them after it."""
    with generators_kept():
        seed_generators(key)
        yield


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the global generators after the block; numpy's take 50 us, so a batch does it once."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def to_tensor(image: Image.Image) -> Tensor:
    """Returns (3, H, W) float32, scaled to [0, 1] and normalized with ImageNet's mean and deviation."""
    levels = torch.from_numpy(np.array(image)).transpose(1, 2)
    return normalized(levels, (), torch.empty(3, image.height, image.width))


def levels_of(image: Image.Image) -> np.ndarray:
    """Returns (H, 3, W) uint8 of an RGB image, not to be written to."""
    rows = np.frombuffer(image.tobytes("raw", "RGB;L"), dtype=np.uint8)
    return rows.reshape(image.height, 3, image.width)


def to_rgb(pixels: Tensor) -> np.ndarray:
    """Returns (H, W, 3) uint8 of a normalized image (3, H, W)."""
    return ((pixels.float() * _STD + _MEAN).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


class EvalTransform:
    """Resize and centre crop of the official evaluation; the key is not used.

    eval_crop: the image is resized to cover int(256 / 224 * size) in both dims, keeping its shape, and size is cut out
    of the middle. For a square size this is torchvision's Resize(int) and CenterCrop. Otherwise it is squeezed to size.
    """

    def __init__(self, config: DataConfig, img_size: tuple[int, int]) -> None:
        self._size = img_size
        self._crop, self._resize = config.eval_crop, config.resize
        # random: training only; the official code then evaluates bilinear (data/build.py, timm's _pil_interp).
        self._resampling = _RESAMPLING.get(config.interpolation, Image.Resampling.BILINEAR)

    def __call__(self, image: Image.Image, key: int = 0) -> Tensor:
        """Returns (3, H, W) float32."""
        return to_tensor(self._image(image))

    def pixels(self, image: Image.Image | Encoded, key: int = 0) -> Pixels:
        """Returns the transformed image, see PixelTransform."""
        return Pixels(levels_of(self._image(whole(image))), ())

    def _image(self, image: Image.Image) -> Image.Image:
        height, width = self._size
        if not self._resize:
            if image.size != (width, height):
                raise ValueError(
                    f"data.resize=false needs images of model.img_size, {width} x {height} pixels (width x height), "
                    f"got {image.width} x {image.height}"
                )
            return image
        if not self._crop:
            return image.resize((width, height), self._resampling)
        image = image.resize(self._covering_size(*image.size), self._resampling)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def _covering_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns (width, height) of the smallest resized image that covers the enlarged target, in pixels."""
        target_height, target_width = (int(256 / 224 * size) for size in self._size)
        if target_width * height >= target_height * width:
            return target_width, max(target_height, int(target_width * height / width))
        return max(target_width, int(target_height * width / height)), target_height


class TimmTransform:
    """Training augmentation by timm.data.create_transform: crop, flip, policy, colour jitter, normalize, erase."""

    def __init__(self, config: DataConfig, img_size: tuple[int, int]) -> None:
        from swin_moe.data.torchvision_compat import import_torchvision

        import_torchvision()
        from timm.data import create_transform

        try:
            self._transform = create_transform(
                input_size=(3, *img_size),
                is_training=True,
                scale=config.crop_scale,
                hflip=config.hflip,
                color_jitter=config.color_jitter or None,  # type: ignore[arg-type]  # None is timm's own word for none
                auto_augment=config.auto_augment or None,
                interpolation=config.interpolation,
                mean=IMAGENET_MEAN,
                std=IMAGENET_STD,
                re_prob=config.erase_prob,
                re_mode=config.erase_mode,
                re_count=config.erase_count,
            )
        except (AssertionError, ValueError, LookupError) as error:
            raise ValueError(
                f"data.auto_augment must be a policy of timm such as rand-m9-mstd0.5-inc1, or empty, "
                f"got {config.auto_augment!r} ({error})"
            ) from error
        self._crops = config.resize
        if config.resize:  # timm's own, for images that are to be decoded
            self._transform.transforms[0] = RandomResizedCrop(config, img_size)
        else:
            from torchvision.transforms import RandomCrop

            self._transform.transforms[0] = RandomCrop(img_size, padding=_PADDING)
        _repair_posterize(self._transform.transforms)
        self._size = img_size
        # What changes pixels, conversion and normalization, and erasing of rectangles.
        self._changes = self._transform.transforms[: -3 if config.erase_prob else -2]
        self._erasing = self._transform.transforms[-1] if config.erase_prob else None

    def __call__(self, image: Image.Image, key: int) -> Tensor:
        """Returns (3, H, W) float32."""
        with seeded(key):
            return self._transform(image)

    def pixels(self, image: Image.Image | Encoded, key: int) -> Pixels:
        """Returns the transformed image, see PixelTransform."""
        seed_generators(key)
        made = image if self._crops else whole(image)
        for change in self._changes:
            made = change(made)
        erased = _Erased(self._size)
        if self._erasing is not None:
            self._erasing(erased)
        return Pixels(levels_of(cast(Image.Image, made)), erased.patches)


class _Erased:
    """What timm's RandomErasing takes for an image; keeps what is written to it."""

    dtype = torch.float32

    def __init__(self, img_size: tuple[int, int]) -> None:
        self._size = (3, *img_size)
        self.patches: list[Patch] = []

    def size(self) -> tuple[int, int, int]:
        return self._size

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = place
        size = rows.stop - rows.start, columns.stop - columns.start
        self.patches.append(Patch(rows.start, columns.start, values.expand(3, *size).contiguous().numpy()))


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep < 8 else image


def _repair_posterize(parts: Iterable[Any]) -> None:
    """Makes posterize to 0 bits give a black image again, in timm's policies.

    timm 1.0.31 asks for 0 bits at full strength, which is about one image in 660 under rand-m9-mstd0.5-inc1, and
    Pillow 13 raises ValueError there; older ones returned black.
    """
    from timm.data import auto_augment

    for part in parts:
        for op in [*getattr(part, "ops", ()), *itertools.chain(*getattr(part, "policy", ()))]:
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize


class CropFlipTransform:
    """The same as TimmTransform where only crop and flip are asked for, bit for bit, without importing timm.

    About three times as fast on 8 x 8 images (80 against 240 us): no global generator is saved and restored.
    """

    def __init__(self, config: DataConfig, img_size: tuple[int, int]) -> None:
        self._crop = RandomResizedCrop(config, img_size)
        self._hflip = config.hflip

    @staticmethod
    def covers(config: DataConfig) -> bool:
        """Returns whether this configuration asks for nothing but crop and flip."""
        extra = config.auto_augment or config.color_jitter or config.erase_prob
        return config.resize and not extra and config.interpolation in _RESAMPLING

    def __call__(self, image: Image.Image, key: int) -> Tensor:
        """Returns (3, H, W) float32."""
        return to_tensor(self.image(image, key))

    def pixels(self, image: Image.Image | Encoded, key: int) -> Pixels:
        """Returns the transformed image, see PixelTransform."""
        return Pixels(levels_of(self.image(image, key)), ())

    def image(self, image: Image.Image | Encoded, key: int) -> Image.Image:
        """Returns the cropped and flipped image."""
        made = self._crop(image, random.Random(key))
        if self._hflip > 0 and torch.rand(1, generator=torch.Generator().manual_seed(key)).item() < self._hflip:
            made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return made


class RandomResizedCrop:
    """timm's RandomResizedCropAndInterpolation, bit for bit, that decodes what it cuts out."""

    def __init__(self, config: DataConfig, img_size: tuple[int, int]) -> None:
        self._size = img_size[1], img_size[0]  # as PIL has it
        self._scale, self._draft = config.crop_scale, config.draft
        one = _RESAMPLING.get(config.interpolation)
        self._resampling = (one,) if one is not None else (_RESAMPLING["bilinear"], _RESAMPLING["bicubic"])

    def __call__(self, image: Image.Image | Encoded, draw: Any = random) -> Image.Image:
        """Returns the RGB image; draw: the random module or one of its generators."""
        box = self._crop_box(*image.size, draw)
        resampling = draw.choice(self._resampling) if len(self._resampling) > 1 else self._resampling[0]
        if isinstance(image, Encoded):
            return image.cut_resized(box, self._size, resampling, draft=self._draft)
        return image.crop(box).resize(self._size, resampling)

    def _crop_box(self, width: int, height: int, draw: Any) -> Box:
        """Returns (left, top, right, bottom) of a crop of random area and shape (Szegedy et al., arXiv:1409.4842).

        Draws in timm's order: area, shape, top, left, up to ten times; then the largest central crop.
        """
        low, high = _CROP_RATIO
        for _ in range(_CROP_ATTEMPTS):
            area = draw.uniform(*self._scale) * (width * height)
            ratio = math.exp(draw.uniform(math.log(low), math.log(high)))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if crop_width <= width and crop_height <= height:
                top, left = draw.randint(0, height - crop_height), draw.randint(0, width - crop_width)
                return left, top, left + crop_width, top + crop_height
        crop_width, crop_height = width, height
        if width / height < low:
            crop_height = round(width / low)
        elif width / height > high:
            crop_width = round(height * high)
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height


def build_transform(config: DataConfig, img_size: tuple[int, int], *, train: bool) -> PixelTransform:
    """Returns transform(image, key) -> (3, H, W) float32; `img_size` is (height, width) in pixels.

    Raises:
        ValueError: timm does not know the policy data.auto_augment.
    """
    if not train:
        return EvalTransform(config, img_size)
    return CropFlipTransform(config, img_size) if CropFlipTransform.covers(config) else TimmTransform(config, img_size)
