"""Masks as the COCO API packs them, run lengths of columns, by pycocotools (extra `detection`), imported when used.

Shape legend: N masks, H height, W width.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def load_coco_api(module: str) -> Any:
    """Returns a module of pycocotools; raises ValueError where it is not installed."""
    try:
        return importlib.import_module(f"pycocotools.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(
            "COCO masks and evaluation need the package 'pycocotools', which is not installed; "
            "install it with: pip install 'swin-moe[detection]'"
        ) from error


@functools.cache
def _api() -> Any:
    return load_coco_api("mask")


def rle_of(mask: np.ndarray) -> dict:
    """Returns the RLE ({"size": [H, W], "counts": bytes}) of a mask (H, W) bool."""
    return _api().encode(np.asfortranarray(mask, dtype=np.uint8))


def rles_of(masks: np.ndarray) -> list[dict]:
    """Returns the RLE of each of the masks (N, H, W) bool."""
    if not len(masks):
        return []
    return _api().encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))


def bitmaps_of(rles: Sequence[dict], height: int, width: int) -> np.ndarray:
    """Returns (N, H, W) bool."""
    if not rles:
        return np.zeros((0, height, width), dtype=bool)
    return np.ascontiguousarray(_api().decode(list(rles)).transpose(2, 0, 1)).astype(bool)


def rle_area(rle: dict) -> int:
    """Returns the pixels of a mask."""
    return int(_api().area(rle))


def rle_box(rle: dict) -> list[float]:
    """Returns the box round a mask: x, y, width, height."""
    return [float(number) for number in _api().toBbox(rle)]


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Raises ValueError, with the end of a sentence about the object, for what is neither polygons nor runs as a COCO
    json has them, or runs of another size. Polygons may leave the image."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            numbers = isinstance(polygon, list) and all(isinstance(value, (int, float)) for value in polygon)
            if not numbers or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("has a polygon that is not at least three pairs of numbers")
            if not math.isfinite(sum(polygon)):
                raise ValueError("has a polygon with a number that is not finite")
        return
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("has a segmentation that is neither polygons nor an RLE (size and counts)")
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, list) or size != [height, width]:
        raise ValueError(f"has an RLE of {_by(size)} pixels (height x width), the image has {height} x {width}")
    whole = isinstance(counts, str) or (isinstance(counts, list) and all(isinstance(r, int) and r >= 0 for r in counts))
    runs = (_runs(counts.encode()) if isinstance(counts, str) else counts) if whole else []
    if sum(runs) != height * width:
        raise ValueError(f"has an RLE whose runs are not the image's {height * width} pixels")


def rle_of_segmentation(segmentation: Any, height: int, width: int) -> dict:
    """Returns the RLE of checked polygons, drawn as the COCO API draws them, or runs."""
    if isinstance(segmentation, list):
        return _api().merge(_api().frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return _api().frPyObjects(segmentation, height, width)
    return {"size": [height, width], "counts": segmentation["counts"].encode()}


def _by(size: Any) -> str:
    return " x ".join(str(side) for side in size) if isinstance(size, (list, tuple)) else repr(size)


def _runs(counts: bytes) -> list[int]:
    """Returns the run lengths in the COCO API's text: 5 bits a character, from the third run on as a difference.

    Looked at before the API decodes it, which writes beyond its memory where runs are longer than the image.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs if not shift and all(run >= 0 for run in runs) else []
