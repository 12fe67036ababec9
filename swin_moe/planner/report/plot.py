"""The picture of a plan: images per second and efficiency over numbers of ranks, and what memory is spent on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from PIL import Image, ImageDraw, ImageFont

from swin_moe.config import Config
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.plan import Plan, Planned, Traces, make_plan

Box = tuple[int, int, int, int]  # left, top, right, bottom; pixels
Colour = tuple[int, int, int]
_WIDTH, _HEIGHT = 1200, 1000
_BACKGROUND, _INK, _FAINT, _GRID = (255, 255, 255), (30, 30, 30), (95, 95, 95), (225, 225, 225)
# Okabe and Ito's colours, which eyes that see red and green alike tell apart; in the order of Memory's classes.
_COLOURS: dict[str, Colour] = {
    "parameters": (0, 114, 178),
    "gradients": (230, 159, 0),
    "optimizer": (0, 158, 115),
    "averages": (240, 228, 66),
    "activations": (86, 180, 233),
    "gathered": (213, 94, 0),
    "workspace": (204, 121, 167),
}
_MOST = 10  # worlds in a picture
_TEXT, _TITLE = 15, 19  # sizes of letters


def plans_by_world(config: Config, hardware: Hardware, ranks: int, plan: Plan) -> dict[int, Planned]:
    """Returns world -> its best layout, for powers of two below `ranks` and for it; worlds that nothing fits are left
    out.

    plan: That of `ranks`, which is made already.
    """
    worlds = [2**power for power in range(int(math.log2(ranks)) + 1) if 2**power < ranks][1 - _MOST :]
    traces, found = Traces(config), {}
    for world in worlds:
        try:
            layouts = make_plan(config, hardware, world, traces).layouts
        except ValueError:
            continue
        if layouts:
            found[world] = layouts[0]
    return found | ({ranks: plan.layouts[0]} if plan.layouts else {})


def draw_plans(plans: Mapping[int, Planned], title: str, memory_bytes: float) -> Image.Image:
    """Returns the picture. plans: World -> its best layout; memory_bytes: Of a rank's device."""
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((24, 16), title, _INK, font=_font(_TITLE))
    worlds = list(plans)
    rates = [planned.images_per_second for planned in plans.values()]
    each = rates[0] / worlds[0]
    _draw_rates(draw, (90, 90, 590, 470), worlds, rates, each)
    _draw_efficiency(draw, (690, 90, 1170, 470), worlds, [rate / world / each for rate, world in zip(rates, worlds)])
    _draw_memory(draw, (90, 585, 1170, 940), plans, memory_bytes)
    return canvas


def _draw_rates(
    draw: ImageDraw.ImageDraw, box: Box, worlds: Sequence[int], rates: Sequence[float], each: float
) -> None:
    """Draws images per second, both axes logarithmic, with what as many times the first would be."""
    ideal = [each * world for world in worlds]
    low, high = min(*rates, *ideal), max(*rates, *ideal)
    ticks = _decades(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(value: float) -> float:
        return math.log(value / low) / math.log(high / low) if high > low else 0.5

    _frame(draw, box, "images per second (dashed: as many times the first)", "ranks")
    for tick in ticks:
        _tick(draw, box, place(tick), _short(tick))
    _curve(draw, box, [place(v) for v in ideal], _FAINT, dashed=True)
    _curve(draw, box, [place(v) for v in rates], _COLOURS["parameters"], [_short(v) for v in rates])
    _worlds(draw, box, worlds)


def _draw_efficiency(draw: ImageDraw.ImageDraw, box: Box, worlds: Sequence[int], shares: Sequence[float]) -> None:
    """Draws images per second of a rank over those of the first world."""
    high = max(1.0, *shares) * 1.1
    _frame(draw, box, f"efficiency: a rank's share against {worlds[0]} rank{'s' if worlds[0] > 1 else ''}", "ranks")
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        _tick(draw, box, tick / high, f"{tick:.0%}")
    _curve(draw, box, [v / high for v in shares], _COLOURS["gathered"], [f"{v:.0%}" for v in shares])
    _worlds(draw, box, worlds)


def _draw_memory(draw: ImageDraw.ImageDraw, box: Box, plans: Mapping[int, Planned], limit: float) -> None:
    """Draws a bar for every world, by class, against the memory of a device."""
    tallest = max(planned.memory.total for planned in plans.values())
    # A device with far more memory than is used is named, not drawn: bars would be too low to be read.
    shown = limit <= 4 * tallest
    high = 1.12 * (max(tallest, limit) if shown else tallest)
    _frame(draw, box, f"memory of the fullest rank, {_unit(high)[1]}; the device has {_bytes(limit)}", "ranks")
    scale = _unit(high)[0]
    apart = next(t for t in _decades(high / scale / 6, high / scale) if t >= high / scale / 6)
    for tick in range(int(high / scale / apart) + 1):
        _tick(draw, box, tick * apart * scale / high, f"{tick * apart:g}")
    left, top, right, bottom = box
    step = (right - left) / len(plans)
    if shown:
        y = bottom - (bottom - top) * limit / high
        _dashes(draw, (left, y), (right, y), _INK)
    used = [name for name in _COLOURS if any(getattr(p.memory, name) for p in plans.values())]
    for number, (world, planned) in enumerate(plans.items()):
        middle, width, y = left + step * (number + 0.5), min(90.0, 0.6 * step), float(bottom)
        parts = asdict(planned.memory)
        for name in used:
            height = (bottom - top) * parts[name] / high
            if height:
                draw.rectangle((middle - width / 2, y - height, middle + width / 2, y), fill=_COLOURS[name])
            y -= height
        text = _bytes(planned.memory.total)
        draw.text((middle, y - 4), text, _INK, font=_font(_TEXT), anchor="ms", stroke_width=2, stroke_fill=_BACKGROUND)
        draw.text((middle, bottom + 8), str(world), _INK, font=_font(_TEXT), anchor="mt")
    x = left
    for name in used:
        draw.rectangle((x, top - 28, x + 14, top - 14), fill=_COLOURS[name])
        draw.text((x + 20, top - 28), name, _INK, font=_font(_TEXT))
        x += 44 + round(_font(_TEXT).getlength(name))


def _frame(draw: ImageDraw.ImageDraw, box: Box, title: str, below: str) -> None:
    left, top, right, bottom = box
    above = 34 if box[1] > _HEIGHT / 2 else 10  # room for the legend of the bars
    draw.text((left - 60, top - above - 8), title, _INK, font=_font(_TEXT + 1), anchor="ls")
    draw.line((left, bottom, right, bottom), fill=_INK)
    draw.text(((left + right) / 2, bottom + 28), below, _FAINT, font=_font(_TEXT), anchor="mt")


def _tick(draw: ImageDraw.ImageDraw, box: Box, share: float, text: str) -> None:
    """Draws a line over the frame at a share of its height."""
    left, top, right, bottom = box
    y = bottom - (bottom - top) * share
    draw.line((left, y, right, y), fill=_GRID)
    draw.text((left - 8, y), text, _FAINT, font=_font(_TEXT), anchor="rm")


def _worlds(draw: ImageDraw.ImageDraw, box: Box, worlds: Sequence[int]) -> None:
    for (x, _), world in zip(_points(box, [0.0] * len(worlds)), worlds):
        draw.text((x, box[3] + 8), str(world), _INK, font=_font(_TEXT), anchor="mt")


def _points(box: Box, shares: Sequence[float]) -> list[tuple[float, float]]:
    """Returns where values lie: worlds at even distances, values by their share of the height."""
    left, top, right, bottom = box
    step = (right - left) / len(shares)
    return [(left + step * (n + 0.5), bottom - (bottom - top) * share) for n, share in enumerate(shares)]


def _curve(
    draw: ImageDraw.ImageDraw,
    box: Box,
    shares: Sequence[float],
    colour: Colour,
    texts: Sequence[str] = (),
    *,
    dashed: bool = False,
) -> None:
    """Draws lines between values, and the values' texts beside their points."""
    points = _points(box, shares)
    for start, end in zip(points, points[1:]):
        if dashed:
            _dashes(draw, start, end, colour)
        else:
            draw.line((*start, *end), fill=colour, width=3)
    for (x, y), text in zip(points, texts):
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
        draw.text(
            (x, y + 10), text, _INK, font=_font(_TEXT - 1), anchor="mt", stroke_width=3, stroke_fill=_BACKGROUND
        )  # fmt: skip


def _dashes(draw: ImageDraw.ImageDraw, start: Sequence[float], end: Sequence[float], colour: Colour) -> None:
    count = max(1, round(math.dist(start, end) / 8))
    for dash in range(0, count, 2):
        ends = [a + (b - a) * min(1.0, (dash + part) / count) for part in (0, 1) for a, b in zip(start, end)]
        draw.line(ends, fill=colour, width=2)


def _decades(low: float, high: float) -> list[float]:
    """Returns the powers of ten around two values, or less far apart ones where they are near."""
    steps = (1,) if high / low > 50 else (1, 2, 5)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    below = [t for t in ticks if t <= low][-1:]
    return below + [t for t in ticks if low < t < high] + [t for t in ticks if t >= high][:1]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _unit(size: float) -> tuple[float, str]:
    return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")


def _bytes(size: float) -> str:
    scale, unit = _unit(size)
    return f"{size / scale:.3g} {unit}"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
