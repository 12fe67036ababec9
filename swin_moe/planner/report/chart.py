"""Charts as PNG with Pillow alone: what pictures of plans are made of, and panels of curves with error bars.

A box is (left, top, right, bottom) in pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from swin_moe.names.colours import BACKGROUND, BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, Colour

Box = tuple[int, int, int, int]
GRID = (225, 225, 225)
PALETTE: tuple[Colour, ...] = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
TEXT, TITLE = 15, 19  # sizes of letters
_PANEL_WIDTH, _PANEL_HEIGHT = 600, 440
_MARGINS = (90, 96, 30, 66)  # of a panel: left, top, right, bottom


@dataclass(frozen=True)
class Series:
    """A curve. name: "" = not in the legend. ranges: (low, high) of every point, drawn as bars; empty = none.
    texts: Whether points are labelled."""

    name: str
    points: Sequence[tuple[float, float]]
    ranges: Sequence[tuple[float, float]] = ()
    dashed: bool = False
    texts: bool = False
    colour: Colour | None = None  # None = by its place in the panel


@dataclass(frozen=True)
class Panel:
    """Curves in one frame. log_x, log_y: Logarithmic axes, of values above 0. from_zero: The other y axis begins there.

    names: x -> the word below it, in the place of the number.
    """

    title: str
    below: str
    series: Sequence[Series]
    log_x: bool = True
    log_y: bool = False
    from_zero: bool = False
    names: dict[float, str] | None = None


def draw_panels(title: str, panels: Sequence[Panel]) -> Image.Image:
    """Returns a picture of panels, two a row."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (columns * _PANEL_WIDTH, 50 + rows * _PANEL_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((24, 16), title, INK, font=font(TITLE))
    left, top, right, bottom = _MARGINS
    for number, panel in enumerate(panels):
        x, y = number % columns * _PANEL_WIDTH, 50 + number // columns * _PANEL_HEIGHT
        draw_panel(draw, (x + left, y + top, x + _PANEL_WIDTH - right, y + _PANEL_HEIGHT - bottom), panel)
    return canvas


def draw_panel(draw: ImageDraw.ImageDraw, box: Box, panel: Panel) -> None:
    """Draws curves with their frame, axes and legend, which stands between title and frame."""
    left, top, right, bottom = box
    xs = sorted({x for series in panel.series for x, _ in series.points})
    ys = [y for series in panel.series for _, y in series.points]
    ys += [y for series in panel.series for pair in series.ranges for y in pair]
    ticks = decades(min(ys), max(ys)) if panel.log_y else even_ticks(0.0 if panel.from_zero else min(ys), max(ys))
    up = scale(min(*ys, ticks[0]), max(*ys, ticks[-1]), logarithmic=panel.log_y)
    along = scale(xs[0], xs[-1], logarithmic=panel.log_x)
    frame(draw, box, panel.title, panel.below, above=34)
    for value in ticks:
        tick(draw, box, up(value), short(value))
    inner, width = left + 26, right - left - 52

    def place(x: float, y: float) -> tuple[float, float]:
        return inner + width * along(x), bottom - (bottom - top) * up(y)

    _mark_x(draw, bottom, [(place(x, ticks[0])[0], (panel.names or {}).get(x, short(x))) for x in xs])
    beside = left
    for number, series in enumerate(panel.series):
        colour = series.colour or PALETTE[number % len(PALETTE)]
        for (x, _), (low, high) in zip(series.points, series.ranges):
            _bar(draw, place(x, low), place(x, high), colour)
        texts = [short(y) for _, y in series.points] if series.texts else []
        curve(draw, [place(x, y) for x, y in series.points], colour, texts, dashed=series.dashed)
        if not series.name:
            continue
        draw.line((beside, top - 20, beside + 18, top - 20), fill=colour, width=3)
        draw.text((beside + 24, top - 20), series.name, INK, font=font(TEXT), anchor="lm")
        beside += 44 + round(font(TEXT).getlength(series.name))


def scale(low: float, high: float, *, logarithmic: bool) -> Callable[[float], float]:
    """Returns what gives the share of an axis at which a value lies; one half where all are one."""
    if high <= low:
        return lambda value: 0.5
    if logarithmic:
        return lambda value: math.log(value / low) / math.log(high / low)
    return lambda value: (value - low) / (high - low)


def frame(draw: ImageDraw.ImageDraw, box: Box, title: str, below: str, *, above: int = 10) -> None:
    """Draws the lower line, the title and the axis's name. above: Pixels between title and frame."""
    left, top, right, bottom = box
    draw.text((left - 60, top - above - 8), title, INK, font=font(TEXT + 1), anchor="ls")
    draw.line((left, bottom, right, bottom), fill=INK)
    draw.text(((left + right) / 2, bottom + 28), below, FAINT, font=font(TEXT), anchor="mt")


def tick(draw: ImageDraw.ImageDraw, box: Box, share: float, text: str) -> None:
    """Draws a line over the frame at a share of its height."""
    left, top, right, bottom = box
    y = bottom - (bottom - top) * share
    draw.line((left, y, right, y), fill=GRID)
    draw.text((left - 8, y), text, FAINT, font=font(TEXT), anchor="rm")


def curve(
    draw: ImageDraw.ImageDraw,
    points: Sequence[tuple[float, float]],
    colour: Colour,
    texts: Sequence[str] = (),
    *,
    dashed: bool = False,
    dots: bool = True,
) -> None:
    """Draws lines between points in pixels, dots on them, and texts below."""
    for start, end in zip(points, points[1:]):
        if dashed:
            dashes(draw, start, end, colour)
        else:
            draw.line((*start, *end), fill=colour, width=3)
    for number, (x, y) in enumerate(points if dots else ()):
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
        if texts:
            draw.text(
                (x, y + 10),
                texts[number],
                INK,
                font=font(TEXT - 1),
                anchor="mt",
                stroke_width=3,
                stroke_fill=BACKGROUND,
            )


def dashes(draw: ImageDraw.ImageDraw, start: Sequence[float], end: Sequence[float], colour: Colour) -> None:
    """Draws a dashed line."""
    count = max(1, round(math.dist(start, end) / 8))
    for dash in range(0, count, 2):
        ends = [a + (b - a) * min(1.0, (dash + part) / count) for part in (0, 1) for a, b in zip(start, end)]
        draw.line(ends, fill=colour, width=2)


def decades(low: float, high: float) -> list[float]:
    """Returns the powers of ten around two values, or less far apart ones where they are near."""
    steps = (1,) if high / low > 50 else (1, 2, 5)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    below = [t for t in ticks if t <= low][-1:]
    return below + [t for t in ticks if low < t < high] + [t for t in ticks if t >= high][:1]


def even_ticks(low: float, high: float) -> list[float]:
    """Returns round values at equal distances, from one at or below `low` to one at or above `high`; at most eight."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span))
    apart = next(step * power for step in (0.2, 0.5, 1.0, 2.0) if span / (step * power) <= 6)
    first, last = math.floor(low / apart), math.ceil(high / apart)
    return [round(number * apart, 12) for number in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """Returns a number in few letters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns Pillow's own letters."""
    return ImageFont.load_default(size)


def _mark_x(draw: ImageDraw.ImageDraw, bottom: int, marks: Sequence[tuple[float, str]]) -> None:
    """Draws words below the frame, but those that would touch the one before."""
    free = -math.inf
    for x, text in marks:
        half = font(TEXT).getlength(text) / 2
        draw.line((x, bottom, x, bottom + 4), fill=INK)
        if x - half > free:
            draw.text((x, bottom + 8), text, INK, font=font(TEXT), anchor="mt")
            free = x + half + 6


def _bar(draw: ImageDraw.ImageDraw, low: tuple[float, float], high: tuple[float, float], colour: Colour) -> None:
    """Draws a range with its ends."""
    draw.line((*low, *high), fill=colour, width=2)
    for x, y in (low, high):
        draw.line((x - 6, y, x + 6, y), fill=colour, width=2)
