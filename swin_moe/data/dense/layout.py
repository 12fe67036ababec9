"""Where the files of dense data lie below data.path: what an option says, or the first usual place that is there."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from swin_moe.config import DataConfig
from swin_moe.names.files import IMAGE_SUFFIXES

_log = logging.getLogger(__name__)


def locate(
    config: DataConfig, option: str, places: Sequence[str], *, what: str, folder: bool, beside: Path | None = None
) -> Path:
    """Returns the file or folder that data.dense.<option> says, or the first of `places` that is there.

    Args:
        places: Below data.path, most usual first. what: It in words. beside: Is taken before all places, if given.

    Raises:
        ValueError: It is not there, with the places that were looked at.
    """
    root, given = Path(config.path), getattr(config.dense, option)
    if not root.is_dir():
        raise ValueError(f"data.path: no directory at {root}")
    candidates = [root / given] if given else [*([beside] if beside else []), *(root / place for place in places)]
    for path in candidates:
        if path.is_dir() if folder else path.is_file():
            return path
    if given:
        raise ValueError(f"data.dense.{option}: no {what} at {candidates[0]}")
    looked = ", ".join(places)
    raise ValueError(f"data.path: no {what} in {root} (looked for {looked}); data.dense.{option} names it")


def image_names(folder: Path) -> list[str]:
    """Returns the paths of all images below a folder, relative to it, in order."""
    found: list[str] = []
    for inner, _, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(inner, folder)
        found += [os.path.normpath(os.path.join(below, n)) for n in names if n.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(found)


def large_enough(sizes: np.ndarray, config: DataConfig, source: Path) -> np.ndarray:
    """Returns (images,) bool: which have no side below data.dense.min_side; how many have is said.

    Args:
        sizes: (images, 2) int64, height and width.
        source: What the images are of.
    """
    least = config.dense.min_side
    kept: np.ndarray = sizes.min(1) >= least
    small = int((~kept).sum())
    if small:
        told = "%s: %d of %d images have a side below data.dense.min_side=%d and are left out of training"
        _log.warning(told, source, small, len(sizes), least)
    return kept
