"""Pictures of numbers: curves, heat maps, tables of counts, rows of images. Pixels only; charts.py says what to draw.

Colours are Okabe and Ito's (names/colours.py), and viridis for amounts: told apart by eyes that see red and green
alike, and in grey.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from swin_moe.names.colours import BACKGROUND, BLUE, BROWN, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, Colour

WIDTH, HEIGHT = 1120, 560  # pixels of a chart, shown at half that
GRID = (228, 228, 228)
COLOURS: tuple[Colour, ...] = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BROWN, INK)
_TEXT = 28
_VIRIDIS = np.array(  # every eighth of the map of that name (S. van der Walt and N. Smith, matplotlib 1.5)
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    dtype=np.float64,
)
_MOST_NAMED = 40  # rows of a table of counts that are named, and cells that hold their number


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    x: np.ndarray  # (n,)
    y: np.ndarray  # (n,)
    colour: int = 0  # of COLOURS
    dashed: bool = False


def draw_curves(curves: Sequence[Curve], *, below: str = "step", logarithmic: bool = False) -> Image.Image:
    """Returns curves over a common axis, with a legend where there are several.

    Args:
        below: What the horizontal axis counts.
        logarithmic: Whether values stand by their logarithm; where none is above 0 they do not.
    """
    curves = [curve for curve in curves if len(curve.x)]
    logarithmic = logarithmic and all((curve.y > 0).all() for curve in curves)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    ys = np.concatenate([curve.y for curve in curves])
    xs = np.concatenate([curve.x for curve in curves])
    ticks = _decades(ys.min(), ys.max()) if logarithmic else _ticks(float(ys.min()), float(ys.max()))
    legend = len(curves) > 1
    left = 24 + max(_width(short(tick)) for tick in ticks)
    box = (left, 20 + (legend_height(curves, WIDTH - left - 30) if legend else 0), WIDTH - 30, HEIGHT - 74)
    up = _scale(ticks[0], ticks[-1], box[3], box[1], logarithmic)
    along = _scale(float(xs.min()), float(xs.max()), box[0], box[2])
    for tick in ticks:
        y = up(tick)
        draw.line((box[0], y, box[2], y), fill=GRID, width=2)
        draw.text((box[0] - 12, y), short(tick), FAINT, font=font(), anchor="rm")
    for tick in _ticks(float(xs.min()), float(xs.max())):
        if xs.min() <= tick <= xs.max():
            draw.text((along(tick), box[3] + 10), short(tick), FAINT, font=font(), anchor="mt")
    draw.text(((box[0] + box[2]) / 2, HEIGHT - 8), below, FAINT, font=font(), anchor="ms")
    for curve in curves:
        _draw_line(draw, [(along(x), up(y)) for x, y in zip(curve.x, curve.y)], curve)
    if legend:
        _draw_legend(draw, curves, box[0], WIDTH - 30)
    return canvas


def draw_heat(
    values: np.ndarray, *, rows: str, columns: str, high: float, ends: tuple[float, float], unit: str
) -> Image.Image:
    """Returns a map of amounts with its scale, from 0 to `high`.

    Args:
        values: (rows, columns); NaN stays white.
        rows, columns: What the axes count; rows are numbered from 0, columns from one of `ends` to the other.
        unit: Of the scale.
    """
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = 110, 20, WIDTH - 190, HEIGHT - 74
    picture = Image.fromarray(shade(values / high))
    canvas.paste(picture.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    count = len(values)
    each = (bottom - top) / count
    apart = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000) if each * step >= _TEXT + 4)
    for row in range(0, count, apart):
        draw.text((left - 12, top + (row + 0.5) * each), str(row), FAINT, font=font(), anchor="rm")
    draw.text((8, (top + bottom) / 2), rows, FAINT, font=font(), anchor="lm")
    for place, value in zip((left, right), ends):
        draw.text((place, bottom + 10), short(value), FAINT, font=font(), anchor="lt" if place == left else "rt")
    draw.text(((left + right) / 2, HEIGHT - 8), columns, FAINT, font=font(), anchor="ms")
    bar = Image.fromarray(shade(np.linspace(1, 0, 64)[:, None])).resize((28, bottom - top))
    canvas.paste(bar, (right + 36, top))
    for share, value in ((0.0, high), (0.5, high / 2), (1.0, 0.0)):
        y = top + share * (bottom - top)
        anchor = "lt" if share == 0 else "lm" if share < 1 else "lb"
        draw.text((right + 72, y), short(value), FAINT, font=font(), anchor=anchor)
    draw.text((WIDTH - 8, HEIGHT - 8), unit, FAINT, font=font(), anchor="rs")
    return canvas


def draw_counts(counts: np.ndarray, names: Sequence[str], *, down: str, across: str) -> Image.Image:
    """Returns a square table of counts, each row by its share of the row's sum.

    Args:
        counts: (K, K) int.
        names: Of rows and columns; written where there are few.
        down, across: What rows and columns are.
    """
    number = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    named = number <= _MOST_NAMED
    side = max(1, round(880 / number)) if number <= 880 else 1
    table = shade(shares)
    if number > 880:  # the largest of the cells that share a pixel: a lone confusion stays visible
        edges = np.linspace(0, number, 881).astype(int)
        pooled = np.maximum.reduceat(np.maximum.reduceat(shares, edges[:-1], axis=0), edges[:-1], axis=1)
        table = shade(pooled)
    picture = Image.fromarray(table)
    picture = picture.resize((picture.width * side, picture.height * side), Image.Resampling.NEAREST)
    label = round(min(240, max(_width(name, _size(side)) for name in names))) + 16 if named else 0
    left, top = 40 + label, 56
    canvas = Image.new("RGB", (left + picture.width + 20, top + picture.height + 20 + label), BACKGROUND)
    canvas.paste(picture, (left, top))
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 8), f"down: {down}; across: {across}", FAINT, font=font())
    if named:
        for k, name in enumerate(names):
            middle = (k + 0.5) * side
            text = _cut(name, label - 12, _size(side))
            draw.text((left - 8, top + middle), text, INK, font=font(_size(side)), anchor="rm")
            _draw_upright(canvas, (round(left + middle), top + picture.height + 8), text, _size(side), label)
        for row, column in np.argwhere(counts):
            ink = INK if shares[row, column] > 0.6 else BACKGROUND
            text = str(counts[row, column])
            if _width(text, _size(side)) < side - 2:
                place = (left + (column + 0.5) * side, top + (row + 0.5) * side)
                draw.text(place, text, ink, font=font(_size(side)), anchor="mm")
    return canvas


def draw_images(images: Sequence[np.ndarray], captions: Sequence[Sequence[str]], *, tile: int = 256) -> Image.Image:
    """Returns images in rows of four, each with lines of text below it. images: (height, width, 3) uint8 each."""
    columns, gap, line = min(4, max(1, len(images))), 20, _TEXT + 6
    text = max((len(lines) for lines in captions), default=0) * line
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (tile + gap) + gap, rows * (tile + text + gap) + gap), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (pixels, lines) in enumerate(zip(images, captions)):
        x, y = gap + number % columns * (tile + gap), gap + number // columns * (tile + text + gap)
        picture = Image.fromarray(pixels)
        scale = tile / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        how = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
        canvas.paste(picture.resize(size, how), (x, y))
        for row, words in enumerate(lines):
            draw.text((x, y + tile + 4 + row * line), _cut(words, tile, _TEXT), INK, font=font())
    return canvas


def shade(shares: np.ndarray) -> np.ndarray:
    """Returns (..., 3) uint8 colours of amounts between 0 and 1; NaN is white."""
    places = np.clip(np.nan_to_num(shares), 0, 1) * (len(_VIRIDIS) - 1)
    below = np.minimum(places.astype(int), len(_VIRIDIS) - 2)
    part = (places - below)[..., None]
    colours = _VIRIDIS[below] * (1 - part) + _VIRIDIS[below + 1] * part
    return np.where(np.isnan(shares)[..., None], 255, colours).round().astype(np.uint8)


def font(size: int = _TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns the letters of pictures."""
    return ImageFont.load_default(size)


def short(value: float) -> str:
    """Returns a number of an axis in few letters."""
    if value == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def legend_height(curves: Sequence[Curve], room: float) -> int:
    """Returns the pixels that a legend takes in rows of a width."""
    return (_legend_rows(curves, room)[-1][0] + 1) * (_TEXT + 12)


def _legend_rows(curves: Sequence[Curve], room: float) -> list[tuple[int, float]]:
    """Returns (row, place in it) of every curve's name."""
    places, row, x = [], 0, 0.0
    for curve in curves:
        width = 70 + _width(curve.label)
        if x and x + width > room:
            row, x = row + 1, 0.0
        places.append((row, x))
        x += width
    return places


def _draw_legend(draw: ImageDraw.ImageDraw, curves: Sequence[Curve], left: float, right: float) -> None:
    for curve, (row, x) in zip(curves, _legend_rows(curves, right - left)):
        y = 8 + row * (_TEXT + 12) + _TEXT / 2
        _draw_line(draw, [(left + x, y), (left + x + 36, y)], curve)
        draw.text((left + x + 44, y), _cut(curve.label, right - left - x - 44, _TEXT), INK, font=font(), anchor="lm")


def _draw_line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], curve: Curve) -> None:
    colour = COLOURS[curve.colour % len(COLOURS)]
    if len(points) == 1:
        (x, y) = points[0]
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
    if not curve.dashed:
        draw.line(points, fill=colour, width=4, joint="curve")
        return
    for start, end in zip(points, points[1:]):
        count = max(1, round(math.dist(start, end) / 10))
        for dash in range(0, count, 2):
            ends = [a + (b - a) * min(1.0, (dash + part) / count) for part in (0, 1) for a, b in zip(start, end)]
            draw.line(ends, fill=colour, width=4)


def _draw_upright(canvas: Image.Image, place: tuple[int, int], text: str, size: int, length: int) -> None:
    """Writes a text downwards, centred on a place."""
    strip = Image.new("RGB", (length, size + 6), BACKGROUND)
    ImageDraw.Draw(strip).text((length, (size + 6) / 2), text, INK, font=font(size), anchor="rm")
    turned = strip.rotate(90, expand=True)
    canvas.paste(turned, (place[0] - turned.width // 2, place[1]))


def _size(side: int) -> int:
    return max(9, min(_TEXT, side - 4))


def _width(text: str, size: int = _TEXT) -> float:
    return font(size).getlength(text)


def _cut(text: str, room: float, size: int) -> str:
    """Returns the text, shortened to a width."""
    if _width(text, size) <= room:
        return text
    while text and _width(f"{text}...", size) > room:
        text = text[:-1]
    return f"{text}..."


def _scale(low: float, high: float, start: float, end: float, logarithmic: bool = False):  # type: ignore[no-untyped-def]
    """Returns value -> place between two pixels."""
    if logarithmic:
        low, high = math.log(low), math.log(high)
    span = high - low or 1.0

    def place(value: float) -> float:
        share = ((math.log(value) if logarithmic else value) - low) / span
        return start + (end - start) * (share if high > low else 0.5)

    return place


def _ticks(low: float, high: float) -> list[float]:
    """Returns round values from at most `low` to at least `high`, five or so."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]
