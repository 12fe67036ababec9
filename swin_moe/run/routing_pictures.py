"""Pictures of routing: which expert took which patch, over the image, and which classes an expert serves.

Shape legend: H, W rows and columns of a layer's tokens, E experts, K classes.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from swin_moe.names.colours import BACKGROUND, INK, MANY

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont  # the second where Pillow was built without FreeType
_FAINT = (130, 130, 130)
_MARGIN, _LINE = 12, 18  # pixels
_TINT = 0.55  # how much of an expert's colour covers a patch
_HEAT = np.array([(255, 255, 255), (254, 217, 118), (240, 59, 32), (90, 0, 40)], dtype=np.float64)
_NUMBERED_FROM = 16  # pixels a patch must have before its expert's number is written on it
NOWHERE = -1  # in place of an expert: a token that is not routed, as of what pads an image
_NAMES_FROM = 13  # pixels a column must have before its class is named


@dataclass(frozen=True)
class PatchMap:
    """What one MoE layer did with one image."""

    layer: str
    expert: np.ndarray  # (H, W) int, the first choice of every token, or NOWHERE
    kept: np.ndarray  # (H, W) bool, whether that choice got a slot


@dataclass(frozen=True)
class ClassLoad:
    """What the experts of one MoE layer did for the images of each class."""

    layer: str
    tokens: np.ndarray  # (E, K) int, (token, choice) pairs of images of the class that chose the expert


def expert_colour(expert: int) -> tuple[int, int, int]:
    """Returns the colour of an expert: of the first 16 one that any colour vision tells from the others'.

    Further ones are a golden section of hue after the number before, in two brightnesses; their numbers tell them.
    """
    if expert < len(MANY):
        return MANY[expert]
    hue, value = expert * 0.61803398875 % 1.0, (0.95, 0.65)[expert // 12 % 2]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, value))
    return red, green, blue


def draw_patches(
    image: np.ndarray, maps: Sequence[PatchMap], num_experts: int, *, tile: int = 320, numbered: bool = False
) -> Image.Image:
    """Returns the image and, per layer, the image tinted by expert; a dropped token is crossed out.

    Args:
        image: (height, width, 3) uint8, what the network saw.
        tile: Width of one picture in pixels; with up to four of them in a row.
        numbered: Write each expert's number onto its patches, where there is room: colours alone do not tell everyone.
    """
    height = round(tile * image.shape[0] / image.shape[1])
    base = Image.fromarray(image).resize((tile, height), Image.Resampling.NEAREST)
    tiles = [("image", base)] + [(_summary(m), _tinted(base, m, numbered=numbered)) for m in maps]
    columns = min(4, len(tiles))
    rows = -(-len(tiles) // columns)
    legend, used = 26, sorted({int(e) for m in maps for e in np.unique(m.expert)} - {NOWHERE})
    per_row = max(1, columns * (tile + _MARGIN) // 44)
    legend_rows = -(-len(used) // per_row)
    size = (
        columns * (tile + _MARGIN) + _MARGIN,
        rows * (height + _LINE + _MARGIN) + _MARGIN + legend_rows * legend + _LINE,
    )
    canvas, font = Image.new("RGB", size, BACKGROUND), ImageFont.load_default(12)
    draw = ImageDraw.Draw(canvas)
    for number, (title, picture) in enumerate(tiles):
        x = _MARGIN + number % columns * (tile + _MARGIN)
        y = _MARGIN + number // columns * (height + _LINE + _MARGIN)
        draw.text((x, y), title, INK, font=font)
        canvas.paste(picture, (x, y + _LINE))
    y = size[1] - legend_rows * legend - _LINE
    draw.text((_MARGIN, y), f"experts seen here, of {num_experts}; crossed out: dropped by capacity", _FAINT, font=font)
    for place, expert in enumerate(used):
        x, top = _MARGIN + place % per_row * 44, y + _LINE + place // per_row * legend
        draw.rectangle((x, top, x + 16, top + 16), fill=expert_colour(expert))
        draw.text((x + 20, top + 1), str(expert), INK, font=font)
    return canvas


def _summary(patch_map: PatchMap) -> str:
    routed = patch_map.expert != NOWHERE
    dropped = 1 - patch_map.kept[routed].mean() if routed.any() else 0.0
    experts = len(np.unique(patch_map.expert[routed]))
    return f"{patch_map.layer}: {experts} experts" + (f", {dropped:.0%} dropped" if dropped else "")


def _tinted(base: Image.Image, patch_map: PatchMap, *, numbered: bool = False) -> Image.Image:
    rows, columns = patch_map.expert.shape
    colours = np.array([[expert_colour(int(e)) for e in row] for row in patch_map.expert], dtype=np.uint8)
    tint = Image.fromarray(colours).resize(base.size, Image.Resampling.NEAREST)
    grey = base.convert("L").point(lambda v: 80 + v * 0.6).convert("RGB")  # or a colour is not known again on black
    picture = Image.blend(grey, tint, _TINT)
    routed = patch_map.expert != NOWHERE
    if not routed.all():
        cover = Image.fromarray(routed.astype(np.uint8) * 255).resize(base.size, Image.Resampling.NEAREST)
        picture = Image.composite(picture, grey, cover)
    draw = ImageDraw.Draw(picture)
    xs = np.linspace(0, base.width, columns + 1).round().astype(int)
    ys = np.linspace(0, base.height, rows + 1).round().astype(int)
    for row, column in np.argwhere(~patch_map.kept & routed):
        left, top, right, bottom = (int(v) for v in (xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1))
        draw.line((left, top, right, bottom), fill=(0, 0, 0))
        draw.line((left, bottom, right, top), fill=(0, 0, 0))
    if numbered and (size := min(base.width // columns, base.height // rows)) >= _NUMBERED_FROM:
        font = ImageFont.load_default(min(16, size // 2 + 2))
        for row, column in np.argwhere(routed):
            middle = (int(xs[column] + xs[column + 1]) // 2, int(ys[row] + ys[row + 1]) // 2)
            draw.text(middle, str(patch_map.expert[row, column]), INK, font=font, anchor="mm")
    return picture


def draw_classes(loads: Sequence[ClassLoad], classes: Sequence[str], *, width: int = 1200) -> Image.Image:
    """Returns one heat map per layer: rows experts, columns classes, darkness the share of the class's tokens.

    Classes without images are left grey.
    """
    num_experts = max(len(load.tokens) for load in loads)
    cell_width = max(1, min(48, (width - 60) // max(1, len(classes))))
    cell_height = max(3, min(24, 900 // num_experts))
    named = cell_width >= _NAMES_FROM
    font = ImageFont.load_default(12)
    names = [name.split(",")[0][:16] for name in classes]
    foot = (max(round(font.getlength(name)) for name in names) + 8) if named and names else _LINE
    block = _LINE + num_experts * cell_height + foot + _MARGIN
    left = 60
    size = (max(left + cell_width * len(classes) + _MARGIN, 420), _MARGIN + _LINE + block * len(loads))
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 4), "row expert, column class: share of its tokens, white 0 to dark 100 %", _FAINT, font=font)
    for number, load in enumerate(loads):
        top = _MARGIN + _LINE + number * block
        draw.text((_MARGIN, top), load.layer, INK, font=font)
        top += _LINE
        totals = load.tokens.sum(axis=0)
        shares = load.tokens / np.maximum(totals, 1)
        cells = heat(shares)
        cells[:, totals == 0] = (225, 225, 225)
        grid = Image.fromarray(cells).resize((cells.shape[1] * cell_width, cells.shape[0] * cell_height), 0)
        canvas.paste(grid, (left, top))
        step = max(1, -(-14 // cell_height))
        for expert in range(0, len(cells), step):
            draw.text((_MARGIN, top + expert * cell_height), f"{expert}", INK, font=font)
        bottom = top + len(cells) * cell_height + 4
        if named:
            for column, name in enumerate(names):
                _vertical_text(canvas, name, (left + column * cell_width + (cell_width - 14) // 2, bottom), font)
        else:
            draw.text((left, bottom), f"classes 0 ... {len(classes) - 1}", _FAINT, font=font)
    return canvas


def heat(values: np.ndarray) -> np.ndarray:
    """Returns (..., 3) uint8 colours of numbers in [0, 1], from white to dark red."""
    place = np.clip(values, 0.0, 1.0) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    part = (place - low)[..., None]
    return ((1 - part) * _HEAT[low] + part * _HEAT[low + 1]).round().astype(np.uint8)


def _vertical_text(canvas: Image.Image, text: str, corner: tuple[int, int], font: Font) -> None:
    strip = Image.new("RGB", (max(1, round(font.getlength(text)) + 2), 15), BACKGROUND)
    ImageDraw.Draw(strip).text((0, 0), text, INK, font=font)
    canvas.paste(strip.rotate(-90, expand=True), corner)
