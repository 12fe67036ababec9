"""Pictures of what look.py found, in colours that the colour-blind tell apart; experts are numbered too."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from swin_moe.demo.look import Looked
from swin_moe.names.colours import BACKGROUND, INK
from swin_moe.run.routing_pictures import draw_patches
from swin_moe.tasks import drawing

# Five points of cividis (Nunez et al., 2018): brightness grows evenly, and any colour vision reads it alike.
_RAMP = np.array([(0, 34, 78), (66, 78, 108), (124, 123, 120), (187, 173, 108), (254, 232, 56)], dtype=np.float64)
SIDE = 448  # pixels of a picture's width
_MARK = (230, 60, 0)


def ramp(values: np.ndarray) -> np.ndarray:
    """Returns (..., 3) uint8 colours of values in [0, 1], dark blue to yellow."""
    place = np.clip(values, 0.0, 1.0) * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    part = (place - low)[..., None]
    return ((1 - part) * _RAMP[low] + part * _RAMP[low + 1]).round().astype(np.uint8)


def experts(looked: Looked) -> Image.Image | None:
    """Returns the image and, per MoE layer, which expert took which patch; None where no patch has one expert."""
    if not looked.routing:
        return None
    return draw_patches(looked.pixels, looked.routing, looked.num_experts, tile=288, numbered=True)


def found(looked: Looked, names: Sequence[str], lowest: float) -> Image.Image | None:
    """Returns the image with boxes, masks or classes of pixels over it; None of a network that classifies.

    lowest: Objects of a lower score are left out.
    """
    said = looked.said
    if said.found is None or said.stored is None:
        return None
    return Image.fromarray(drawing.draw(said.stored, said.found, names, threshold=lowest))


def count(looked: Looked, lowest: float) -> str:
    """Returns in words how much was found, so that a picture without boxes explains itself."""
    found = looked.said.found
    if found is None or found.scores is None:
        return "found: the class of every pixel"
    scores = found.scores.tolist()
    best = f", the surest {max(scores):.2f}" if scores else ""
    return f"found: {sum(score >= lowest for score in scores)} of {len(scores)} objects{best}"


def attention(looked: Looked, weights: np.ndarray, row: int, column: int) -> Image.Image:
    """Returns the image under the attention of one patch, which is framed; weights as Observer.attention_of gives them.

    A patch that takes as much of every other of its window as the largest weight would is yellow, outside it is dark.
    """
    height = round(SIDE * looked.pixels.shape[0] / looked.pixels.shape[1])
    image = Image.fromarray(looked.pixels).resize((SIDE, height), Image.Resampling.BICUBIC).convert("L").convert("RGB")
    colours = ramp(weights / max(float(weights.max()), 1e-12))
    cover = Image.fromarray(colours).resize((SIDE, height), Image.Resampling.NEAREST)
    picture = Image.blend(image, cover, 0.6)
    rows, columns = weights.shape
    box = (
        column * SIDE / columns,
        row * height / rows,
        (column + 1) * SIDE / columns - 1,
        (row + 1) * height / rows - 1,
    )
    ImageDraw.Draw(picture).rectangle(box, outline=_MARK, width=3)
    return picture


def features(looked: Looked) -> Image.Image | None:
    """Returns, per stage, how long the features of each position are: dark the least of the stage, yellow the most.

    None of a task of somebody's own that looks without the backbone.
    """
    if not looked.strength:
        return None
    height = round(SIDE // 2 * looked.pixels.shape[0] / looked.pixels.shape[1])
    tiles = []
    for stage, values in enumerate(looked.strength):
        low, high = float(values.min()), float(values.max())
        colours = ramp((values - low) / max(high - low, 1e-12))
        title = f"stage {stage}: {values.shape[0]} x {values.shape[1]}, length {low:.1f} to {high:.1f}"
        tiles.append((title, Image.fromarray(colours).resize((SIDE // 2, height), Image.Resampling.NEAREST)))
    return _side_by_side(tiles)


def _side_by_side(tiles: Sequence[tuple[str, Image.Image]], columns: int = 2) -> Image.Image:
    width, height = tiles[0][1].size
    rows, line, gap = -(-len(tiles) // columns), 18, 10
    used = min(columns, len(tiles))
    canvas = Image.new("RGB", (used * (width + gap) + gap, rows * (height + line + gap) + gap), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, (title, picture) in enumerate(tiles):
        x, y = gap + number % columns * (width + gap), gap + number // columns * (height + line + gap)
        draw.text((x, y), title, INK, font=font)
        canvas.paste(picture, (x, y + line))
    return canvas
