"""Masks as the COCO API packs them, run lengths of columns, by pycocotools (extra `detection`), imported when used.

Shape legend: N masks, H height, W width.
"""

import functools
import importlib
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


def rle_of_annotation(segmentation: Any, height: int, width: int) -> dict:
    """Returns the RLE of what stands in a COCO json: polygons (drawn as the COCO API draws them), or runs.

    Raises:
        ValueError: It is neither, or runs of another size; the reason without the place.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            raise ValueError("its segmentation has no polygon")
        for polygon in segmentation:
            numbers = isinstance(polygon, list) and all(isinstance(value, (int, float)) for value in polygon)
            if not numbers or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("its polygon is not a list of at least three pairs of numbers")
            if not np.isfinite(polygon).all():
                raise ValueError("its polygon has a number that is not finite")
        return _api().merge(_api().frPyObjects(segmentation, height, width))
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("its segmentation is neither polygons nor an RLE (size and counts)")
    size, counts = segmentation["size"], segmentation["counts"]
    if list(size) != [height, width]:
        raise ValueError(f"its RLE is of {_by(size)} pixels (height x width), the image {height} x {width}")
    if isinstance(counts, list):
        whole = all(isinstance(run, int) and run >= 0 for run in counts)
        if not whole or sum(counts) != height * width:
            raise ValueError(f"its RLE does not cover the image's {height * width} pixels")
        return _api().frPyObjects(segmentation, height, width)
    packed: bytes = counts.encode() if isinstance(counts, str) else counts
    if sum(_runs(packed)) != height * width:
        raise ValueError(f"its RLE does not cover the image's {height * width} pixels")
    return {"size": [height, width], "counts": packed}


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
