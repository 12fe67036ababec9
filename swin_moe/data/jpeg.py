"""JPEG files decoded as far as a crop needs them: down to its last row, and at a part of their size where asked.

A JPEG decoder starts at the top, so what lies above a crop is decoded with it; what lies below need not be. Pillow has
no word for that, but decodes a file whose header says that it is less high: the same bits in every row that is there.

Whatever is unusual (progressive, several scans, no end marker, ...) is not taken, and decoded whole by the caller.
Source of the format: ITU-T T.81, annex B.
"""

import io
import math
from typing import NamedTuple

from PIL import Image

_SEQUENTIAL = (0xC0, 0xC1)  # frames that are one pass from top to bottom; Huffman coded
_OTHER = frozenset(range(0xC2, 0xDA)) - {0xC4, 0xCC}  # frames of other kinds, and markers without a size
_HAS_SIZE = 0xC0, 0xFE
_EXIF, _FIRST_SCAN, _END = 0xE1, 0xDA, b"\xff\xd9"
_MOST_PIXELS = 65_500  # a side, for libjpeg
_SCALES = (8, 4, 2)  # what libjpeg divides sizes by while it decodes, as Pillow offers it


class Header(NamedTuple):
    """What the header of a JPEG file says, in pixels, and the place of its frame's height in the file."""

    width: int
    height: int
    row_block: int  # rows that are decoded at once
    height_at: int
    has_exif: bool


def read_header(data: bytes) -> Header | None:
    """Returns the header of a file with 8 bits a channel and one sequential scan, None of any other file."""
    try:
        return _read_header(data)
    except IndexError:  # it ends in the middle
        return None


def _read_header(data: bytes) -> Header | None:
    if data[:2] != b"\xff\xd8":
        return None
    at, frame, has_exif = 2, 0, False
    while True:
        if data[at] != 0xFF:
            return None
        kind, size = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if not _HAS_SIZE[0] <= kind <= _HAS_SIZE[1] or kind in _OTHER or (kind in _SEQUENTIAL and frame):
            return None
        if kind in _SEQUENTIAL:
            frame = at + 4
        elif kind == _FIRST_SCAN:
            break
        has_exif |= kind == _EXIF
        at += 2 + size
    # In a scan 0xFF comes before a marker alone, so what is found behind its beginning is an end marker.
    if not frame or data[at + 4] != data[frame + 5] or data.rfind(_END, at) < 0:
        return None
    bits, height, width, channels = data[frame], _word(data, frame + 1), _word(data, frame + 3), data[frame + 5]
    row_block = 8 * max(data[frame + 7 + 3 * channel] & 15 for channel in range(channels))
    if bits != 8 or min(height, width, row_block) == 0 or max(height, width) > _MOST_PIXELS or row_block > 32:
        return None
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow warns or refuses
        return None
    return Header(width, height, row_block, frame + 1, has_exif)


def _word(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]


def largest_scale(crop: tuple[int, int], least: tuple[int, int]) -> int:
    """Returns the largest of 8, 4, 2 and 1 that a crop may be divided by and still have `least` (width, height)."""
    return next((scale for scale in _SCALES if all(c >= scale * n for c, n in zip(crop, least))), 1)


def decode_top(data: bytes, header: Header, rows: int, scale: int = 1) -> Image.Image:
    """Returns the image, each side divided by `scale` and rounded up, right in what its first `rows` rows become.

    Raises what Pillow does.
    """
    # The bits of a row depend on colours 2 rows (of the scaled image) below it, which are stored at half the height.
    height = -(-(rows + 4 * scale) // header.row_block) * header.row_block
    if height < header.height:
        data = data[: header.height_at] + height.to_bytes(2, "big") + data[header.height_at + 2 :]
    image = Image.open(io.BytesIO(data))
    image.decodermaxblock = len(data) + 1  # all at once
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    return image
