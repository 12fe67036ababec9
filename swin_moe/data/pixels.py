"""8-bit RGB pixels from whatever PIL decodes."""

import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from swin_moe.data import jpeg

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive


class BrokenImage(ValueError):
    """An image that is missing, truncated or not an image at all; the message names its path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"broken image {path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple:
        return BrokenImage, (self.path, self.reason)


def read_image(path: str | Path) -> bytes:
    """Returns the bytes of an image file.

    Raises:
        BrokenImage: It is a pipe, a device or a folder: reading one may never end.
        OSError: It cannot be read; names it.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BrokenImage(str(path), "is no regular file")
    with open(path, "rb", buffering=0) as file:  # a third less time than Path.read_bytes, of 12 us
        return file.readall()


def decode(data: bytes, path: str, *, exif: bool = False) -> Image.Image:
    """Returns the RGB image in these bytes, fully decoded: PIL is lazy, and a truncated file fails only in load().

    exif: Turn it as its EXIF orientation says (data.exif).

    Raises:
        BrokenImage: PIL cannot decode it, for whatever reason (its decoders raise many types), or see to_rgb.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if exif else image)
    except Exception as error:
        raise _broken(path, error) from error


def _broken(path: str, error: Exception) -> BrokenImage:
    # The message of an unidentified file holds an object's address; its class says enough.
    known = not isinstance(error, Image.UnidentifiedImageError)
    return BrokenImage(path, f"{type(error).__name__}: {error}" if known else "not an image in a known format")


class Encoded:
    """An image file that is decoded as far as it is needed, once that is known; else as `decode` does."""

    def __init__(self, data: bytes, path: str, *, exif: bool = False) -> None:
        """exif: See decode."""
        self._data, self._path, self._exif = data, path, exif
        header = jpeg.read_header(data)
        self._header = None if header and exif and header.has_exif else header
        self._whole: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Returns (width, height) in pixels; raises BrokenImage, as everything here."""
        return self._header[:2] if self._header else self.whole().size

    def whole(self) -> Image.Image:
        """Returns the RGB image."""
        if self._whole is None:
            self._whole = decode(self._data, self._path, exif=self._exif)
        return self._whole

    def cut_resized(
        self, box: Box, size: tuple[int, int], resampling: Image.Resampling, *, draft: bool = False
    ) -> Image.Image:
        """Returns the RGB image in a box, resized to (width, height): the bits of whole().crop(box).resize(...).

        draft: A JPEG file is decoded at a half, a quarter or an eighth of its sides where the box then still has
            `size`; those are other bits.
        """
        if self._header is None:
            return self.whole().crop(box).resize(size, resampling)
        left, top, right, bottom = box
        scale = jpeg.largest_scale((right - left, bottom - top), size) if draft else 1
        if scale == 1:
            return self._cut(self._header, box, 1).resize(size, resampling)
        image = self._cut(self._header, (0, 0, self._header.width, bottom), scale)
        inside = (left / scale, top / scale, right / scale, bottom / scale)
        return image.resize(size, resampling, box=inside)

    def _cut(self, header: jpeg.Header, box: Box, scale: int) -> Image.Image:
        try:
            image = jpeg.decode_top(self._data, header, box[3], scale)
        except Exception:
            self.whole()  # says what is wrong with it; or nothing is, as it goes on behind some damages
            image = jpeg.decode_top(self._data, header, header.height, scale)
        left, top, right, bottom = (-(-edge // scale) for edge in box)
        return to_rgb(image.crop((left, top, right, bottom)))


def whole(image: Image.Image | Encoded) -> Image.Image:
    """Returns the image, all of it decoded."""
    return image.whole() if isinstance(image, Encoded) else image


def opened(path: str, *, exif: bool = False) -> Image.Image | BrokenImage:
    """Returns the RGB image of a file, or what is wrong with it; exif: see decode."""
    try:
        return decode(read_image(path), path, exif=exif)
    except BrokenImage as error:
        return error
    except OSError as error:
        return BrokenImage(path, error.strerror or str(error))


def unreadable(broken: Sequence[BrokenImage], images: int) -> str:
    """Returns the sentence about images that cannot be read, of so many."""
    many = f"{len(broken)} of {images} images cannot be read, the first: " if images > 1 else ""
    return f"{many}{broken[0]}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image in 8-bit RGB; grey values of 16 bits are divided by 257, so that 65,535 becomes 255.

    PIL's own conversion clips them at 255, which leaves white.

    Raises:
        ValueError: Its values have no range that is known: floating point, or integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown; store it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("its pixels are integers beyond 16 bits, of unknown range; store it with 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; PIL would warn on the screen
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
