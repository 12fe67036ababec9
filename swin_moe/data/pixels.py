"""8-bit RGB pixels from whatever PIL decodes."""

import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


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
    return Path(path).read_bytes()


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
        # The message of an unidentified file holds an object's address; its class says enough.
        known = not isinstance(error, Image.UnidentifiedImageError)
        reason = f"{type(error).__name__}: {error}" if known else "not an image in a known format"
        raise BrokenImage(path, reason) from error


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
