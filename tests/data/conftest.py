"""Small images on disk for the data tests."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NUM_IMAGES = {"cat": 5, "dog": 4, "eel": 4}


def encode(seed: int, *, size: tuple[int, int] = (20, 14), suffix: str = ".png") -> bytes:
    """Returns an encoded noise image; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format={".png": "PNG", ".jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def write_split(directory: Path, counts: dict[str, int], *, seed: int) -> None:
    """Writes counts[name] images into each class directory, of several sizes and both formats."""
    for name, count in counts.items():
        (directory / name).mkdir(parents=True)
        for number in range(count):
            seed += 1
            suffix = ".jpg" if number % 2 else ".png"
            (directory / name / f"{number}{suffix}").write_bytes(encode(seed, size=(20 + number, 14), suffix=suffix))


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """Returns a directory with train/ (13 images, 3 classes) and val/ (5 images, 2 of the classes)."""
    root = tmp_path / "images"
    write_split(root / "train", NUM_IMAGES, seed=0)
    write_split(root / "val", {"cat": 2, "eel": 3}, seed=100)
    return root
