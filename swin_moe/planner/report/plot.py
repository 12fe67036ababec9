"""The picture of a plan: images per second and efficiency over numbers of ranks, and what memory is spent on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from PIL import Image, ImageDraw

from swin_moe.config import Config
from swin_moe.names.colours import (
    BACKGROUND,
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    Colour,
)
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.plan import Plan, Planned, Traces, make_plan
from swin_moe.planner.report.chart import (
    TEXT,
    TITLE,
    Box,
    curve,
    dashes,
    decades,
    font,
    frame,
    scale,
    short,
    tick,
)

_WIDTH, _HEIGHT = 1200, 1000
# In the order of Memory's classes.
_COLOURS: dict[str, Colour] = {
    "parameters": BLUE,
    "gradients": ORANGE,
    "optimizer": GREEN,
    "averages": YELLOW,
    "activations": SKY,
    "gathered": VERMILION,
    "workspace": PURPLE,
}
_MOST = 10  # worlds in a picture


def plans_by_world(config: Config, hardware: Hardware, ranks: int, plan: Plan) -> dict[int, Planned]:
    """Returns world -> its best layout, for powers of two below `ranks` and for it; worlds that nothing fits are left
    out.

    plan: That of `ranks`, which is made already.
    """
    worlds = [2**power for power in range(int(math.log2(ranks)) + 1) if 2**power < ranks][1 - _MOST :]
    traces, found = Traces(config, kernels=hardware.device == "cuda"), {}
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
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((24, 16), title, INK, font=font(TITLE))
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
    ticks = decades(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    place = scale(low, high, logarithmic=True)
    frame(draw, box, "images per second (dashed: as many times the first)", "ranks")
    for value in ticks:
        tick(draw, box, place(value), short(value))
    curve(draw, _points(box, [place(v) for v in ideal]), FAINT, dashed=True, dots=False)
    curve(draw, _points(box, [place(v) for v in rates]), _COLOURS["parameters"], [short(v) for v in rates])
    _worlds(draw, box, worlds)


def _draw_efficiency(draw: ImageDraw.ImageDraw, box: Box, worlds: Sequence[int], shares: Sequence[float]) -> None:
    """Draws images per second of a rank over those of the first world."""
    high = max(1.0, *shares) * 1.1
    frame(draw, box, f"efficiency: a rank's share against {worlds[0]} rank{'s' if worlds[0] > 1 else ''}", "ranks")
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        tick(draw, box, value / high, f"{value:.0%}")
    curve(draw, _points(box, [v / high for v in shares]), _COLOURS["gathered"], [f"{v:.0%}" for v in shares])
    _worlds(draw, box, worlds)


def _draw_memory(draw: ImageDraw.ImageDraw, box: Box, plans: Mapping[int, Planned], limit: float) -> None:
    """Draws a bar for every world, by class, against the memory of a device."""
    tallest = max(planned.memory.total for planned in plans.values())
    # A device with far more memory than is used is named, not drawn: bars would be too low to be read.
    shown = limit <= 4 * tallest
    high = 1.12 * (max(tallest, limit) if shown else tallest)
    frame(draw, box, f"memory of the fullest rank, {_unit(high)[1]}; the device has {_bytes(limit)}", "ranks", above=34)
    unit = _unit(high)[0]
    apart = next(t for t in decades(high / unit / 6, high / unit) if t >= high / unit / 6)
    for number in range(int(high / unit / apart) + 1):
        tick(draw, box, number * apart * unit / high, f"{number * apart:g}")
    left, top, right, bottom = box
    step = (right - left) / len(plans)
    if shown:
        y = bottom - (bottom - top) * limit / high
        dashes(draw, (left, y), (right, y), INK)
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
        draw.text((middle, y - 4), text, INK, font=font(TEXT), anchor="ms", stroke_width=2, stroke_fill=BACKGROUND)
        draw.text((middle, bottom + 8), str(world), INK, font=font(TEXT), anchor="mt")
    x = left
    for name in used:
        draw.rectangle((x, top - 28, x + 14, top - 14), fill=_COLOURS[name])
        draw.text((x + 20, top - 28), name, INK, font=font(TEXT))
        x += 44 + round(font(TEXT).getlength(name))


def _worlds(draw: ImageDraw.ImageDraw, box: Box, worlds: Sequence[int]) -> None:
    for (x, _), world in zip(_points(box, [0.0] * len(worlds)), worlds):
        draw.text((x, box[3] + 8), str(world), INK, font=font(TEXT), anchor="mt")


def _points(box: Box, shares: Sequence[float]) -> list[tuple[float, float]]:
    """Returns where values lie: worlds at even distances, values by their share of the height."""
    left, top, right, bottom = box
    step = (right - left) / len(shares)
    return [(left + step * (n + 0.5), bottom - (bottom - top) * share) for n, share in enumerate(shares)]


def _unit(size: float) -> tuple[float, str]:
    return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")


def _bytes(size: float) -> str:
    scale, unit = _unit(size)
    return f"{size / scale:.3g} {unit}"
