"""The contact sheet: images of every class on one page."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from swin_moe.data.datasets import FileDataset
from swin_moe.data.pixels import BrokenImage, decode
from swin_moe.names.colours import BACKGROUND, FAINT, INK

_FEW = 24  # classes that get a row each; more are one image each
_ROW = 8  # images of a row
_SIDE, _GAP, _TEXT = 112, 8, 15
_SMALL = 72  # side of an image where there are many classes
MOST_CLASSES = 1000  # drawn, of a data set with more


def contact_sheet(dataset: FileDataset, broken: set[int]) -> Image.Image:
    """Returns a page with rows of images, a class each, or with an image of every class where they are many.

    Args:
        broken: Numbers of images that cannot be decoded; others stand for them.
    """
    labels = dataset.labels()
    order = np.argsort(labels, kind="stable")
    order = order[~np.isin(order, list(broken))] if broken else order
    ends = np.searchsorted(labels[order], np.arange(len(dataset.classes) + 1))
    of_class = [order[start:end] for start, end in zip(ends, ends[1:])]
    if len(of_class) <= _FEW:
        return _rows(dataset, of_class, np.bincount(labels, minlength=len(of_class)))
    return _grid(dataset, of_class[:MOST_CLASSES])


def _rows(dataset: FileDataset, of_class: Sequence[np.ndarray], counts: np.ndarray) -> Image.Image:
    height = _SIDE + _TEXT + 3 * _GAP
    page = Image.new("RGB", (_GAP + _ROW * (_SIDE + _GAP), len(of_class) * height + _GAP), BACKGROUND)
    draw = ImageDraw.Draw(page)
    for row, images in enumerate(of_class):
        top = _GAP + row * height
        said = f", {counts[row]:,} images"
        name = _fitted(dataset.classes[row], page.width - 2 * _GAP - _font().getlength(said))
        draw.text((_GAP, top), name, INK, font=_font())
        draw.text((_GAP + _font().getlength(name), top), said, FAINT, font=_font())
        chosen = images[np.linspace(0, len(images) - 1, min(_ROW, len(images))).round().astype(int)]
        for column, index in enumerate(chosen):
            page.paste(_tile(dataset, int(index), _SIDE), (_GAP + column * (_SIDE + _GAP), top + _TEXT + _GAP))
    return page


def _grid(dataset: FileDataset, of_class: Sequence[np.ndarray]) -> Image.Image:
    columns = min(25, int(np.ceil(np.sqrt(len(of_class)))))
    width, height = _SMALL + _GAP, _SMALL + _TEXT + _GAP
    page = Image.new("RGB", (_GAP + columns * width, -(-len(of_class) // columns) * height + _GAP), BACKGROUND)
    draw = ImageDraw.Draw(page)
    for place, images in enumerate(of_class):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        if len(images):
            page.paste(_tile(dataset, int(images[0]), _SMALL), (left, top))
        draw.text((left, top + _SMALL), _fitted(dataset.classes[place], _SMALL, 12), INK, font=_font(12))
    return page


def _tile(dataset: FileDataset, index: int, side: int) -> Image.Image:
    """Returns an image fitted into a square, or an empty one where it can no longer be read."""
    tile = Image.new("RGB", (side, side), (240, 240, 240))
    try:
        image = decode(dataset.read(index), dataset.path(index))
    except (BrokenImage, OSError):
        return tile
    scale = side / max(image.size)
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    tile.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return tile


def _font(size: int = _TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fitted(text: str, width: float, size: int = _TEXT) -> str:
    """Returns the text, cut to a width in pixels."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if _font(size).getlength(text) <= width:
        return text
    while len(text) > 1 and _font(size).getlength(f"{text}..") > width:
        text = text[:-1]
    return f"{text}.."
