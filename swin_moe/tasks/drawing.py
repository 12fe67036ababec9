"""Boxes, masks and label maps drawn over images, in colours that the colour-blind tell apart.

Shape legend: D objects, h height, w width of the image as stored.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from swin_moe.data.batch import Batch
from swin_moe.data.dense.masks import bitmaps_of
from swin_moe.data.dense.sample import IGNORED
from swin_moe.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from swin_moe.names.colours import MANY
from swin_moe.tasks.dense import Found

_SHADES = (1.0, 0.65, 1.35)  # of classes after those that have a colour of their own
_SIDE = 480  # pixels that the longer side of a drawing has at least: small images are enlarged
_FILL = 0.45  # of a mask's colour, the rest is the image


def colour_of(label: int) -> tuple[int, int, int]:
    """Returns the (red, green, blue) of a class: one of 16, in three shades, then the same again."""
    shade = _SHADES[label // len(MANY) % len(_SHADES)]
    red, green, blue = (min(255, round(shade * part)) for part in MANY[label % len(MANY)])
    return red, green, blue


def pixels_of(image: Tensor) -> np.ndarray:
    """Returns (H, W, 3) uint8 of a normalized image (3, H, W)."""
    pixels = image.detach().cpu().float().permute(1, 2, 0).numpy() * IMAGENET_STD + IMAGENET_MEAN
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def draw(image: np.ndarray, found: Found, names: Sequence[str], *, threshold: float = 0.0) -> np.ndarray:
    """Returns (height, width, 3) uint8: what was found over the image (h, w, 3), enlarged where it is small.

    threshold: Objects of a lower score are left out.
    """
    height, width = image.shape[:2]
    scale = max(1, round(_SIDE / max(height, width)))
    drawn = image
    if found.label_map is not None:
        drawn = _tinted(drawn, found.label_map.cpu().numpy())
    rows = _shown(found, threshold)
    if found.masks is not None:
        for row in reversed(rows):  # the best on top
            assert found.labels is not None
            drawn = _filled(drawn, found.masks[row].cpu().numpy(), colour_of(int(found.labels[row])))
    drawn = drawn.repeat(scale, 0).repeat(scale, 1)
    canvas = Image.fromarray(drawn)
    for row in reversed(rows):
        _outline(canvas, found, row, names, scale)
    if found.label_map is not None:
        _key(canvas, np.unique(found.label_map.cpu().numpy()), names)
    return np.asarray(canvas)


def _shown(found: Found, threshold: float) -> list[int]:
    if found.boxes is None or found.scores is None:
        return []
    return [row for row, score in enumerate(found.scores.tolist()) if score >= threshold]


def _filled(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Returns the image with a mask (h, w) in its colour, whole at the mask's edge."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    filled = image.copy()
    filled[inner] = (1 - _FILL) * image[inner] + _FILL * np.asarray(colour)
    filled[mask & ~inner] = colour
    return filled


def _tinted(image: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    """Returns the image in the colours of a label map (h, w); ignored pixels stay as they are."""
    colours = np.asarray([colour_of(label) for label in range(IGNORED + 1)])
    tinted = ((1 - _FILL) * image + _FILL * colours[label_map]).astype(np.uint8)
    return np.where((label_map == IGNORED)[..., None], image, tinted)


def _outline(canvas: Image.Image, found: Found, row: int, names: Sequence[str], scale: int) -> None:
    """Draws an object's box, with its name and score beside it."""
    assert found.boxes is not None and found.labels is not None and found.scores is not None
    label = int(found.labels[row])
    x1, y1, x2, y2 = (float(value) * scale for value in found.boxes[row])
    line = max(2, max(canvas.size) // 400)
    draw_on = ImageDraw.Draw(canvas)
    box = (min(x1, x2), min(y1, y2), max(x1, x2) - 1, max(y1, y2) - 1)
    if box[2] > box[0] and box[3] > box[1]:
        draw_on.rectangle(box, outline=colour_of(label), width=line)
    text = f"{_name(names, label)} {float(found.scores[row]):.2f}"
    _tag(draw_on, (box[0], box[1]), text, colour_of(label), canvas.size)


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else str(label)


def _tag(
    draw_on: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: tuple[int, ...],
    size: tuple[int, int],
    *,
    above: bool = True,
) -> float:
    """Writes a text on its colour above this corner, where there is room, or below; returns the height it takes."""
    font = ImageFont.load_default(max(15, max(size) // 32))  # read also where a phone shows it at two thirds
    left, top, right, bottom = draw_on.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(corner[0], 0), max(0, size[0] - width))
    y = corner[1] - height if above and corner[1] >= height else max(0, corner[1])
    draw_on.rectangle((x, y, x + width, y + height), fill=colour)
    is_light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128
    draw_on.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0) if is_light else (255, 255, 255), font=font)
    return height


def _key(canvas: Image.Image, labels: np.ndarray, names: Sequence[str]) -> None:
    """Writes the names of a label map's classes down the left side, as far as there is room."""
    draw_on, y = ImageDraw.Draw(canvas), 2.0
    for label in labels.tolist():
        if label == IGNORED or y > canvas.height - 20:
            continue
        y += 3 + _tag(draw_on, (2, y), _name(names, label), colour_of(label), canvas.size, above=False)


def truth_of(batch: Batch, row: int) -> Found:
    """Returns what is known about an image of an evaluation batch, as if it had been found with certainty."""
    height, width = batch["original_size"][row].tolist()
    label_map = batch["label_map"][row, :height, :width] if "label_map" in batch else None
    if "truth" not in batch:
        return Found(label_map=label_map)
    objects = batch["truth"][row]
    boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float64).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    rles = [item["segmentation"] for item in objects]
    return Found(
        boxes=boxes,
        scores=torch.ones(len(objects)),
        labels=torch.tensor([item["category_id"] for item in objects], dtype=torch.int64),
        masks=torch.from_numpy(bitmaps_of(rles, height, width)) if all(rle is not None for rle in rles) else None,
        label_map=label_map,
    )


class PictureBook:
    """Draws the first images of an evaluation, truth on the left and what was found on the right, on any ranks.

    Args:
        count: Images 0 .. count - 1 of the data set are drawn.
        threshold: Objects of a lower score are left out.
    """

    def __init__(self, names: Sequence[str], *, count: int, threshold: float = 0.3) -> None:
        self._names, self._count, self._threshold = names, count, threshold
        self._pages: dict[int, np.ndarray] = {}

    def add(self, batch: Batch, found: Sequence[Found]) -> None:
        """Draws those images of an evaluation batch that belong to the book."""
        for row, number in enumerate(batch["sample"].tolist()):
            if number >= self._count:
                continue
            height, width = batch["size"][row].tolist()
            pixels = Image.fromarray(pixels_of(batch["image"][row, :, :height, :width]))
            stored = batch["original_size"][row].tolist()
            image = np.asarray(pixels.resize((stored[1], stored[0]), Image.Resampling.BILINEAR))
            sides = (
                draw(image, truth_of(batch, row), self._names),
                draw(image, found[row], self._names, threshold=self._threshold),
            )
            gap = np.full((sides[0].shape[0], 4, 3), 255, dtype=np.uint8)
            self._pages[number] = np.concatenate([sides[0], gap, sides[1]], axis=1)

    def result(self, world_size: int = 1) -> dict[str, np.ndarray]:
        """Returns name -> picture for Task.pictures, alike on all ranks. Collective."""
        pages = [self._pages]
        if world_size > 1:
            pages = [{}] * world_size
            dist.all_gather_object(pages, self._pages)
        whole = {number: page for own in pages for number, page in own.items()}
        return {f"validation_{number}": page for number, page in sorted(whole.items())}
