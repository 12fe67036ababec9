"""What a data set is: Dataset, the protocol; datasets.py has the rows."""

from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
from PIL import Image

from swin_moe.data.pixels import Encoded


class Listed(Protocol):
    """What every data set tells without decoding an image; of whole images' labels, or of boxes and label maps."""

    num_classes: int
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """Returns what to call this image in messages."""
        ...

    def labels(self) -> np.ndarray:
        """Returns (N,) the label of every image; with boxes or label maps a number that changes with them."""
        ...


class Dataset(Listed, Protocol):
    """What every data set offers that labels whole images.

    One of files may also have encoded(index) -> (pixels.Encoded, label): training then decodes what it crops.
    """

    def sample(self, index: int) -> tuple[Image.Image, int]:
        """Returns (RGB image, label)."""
        ...


def encoded(dataset: Dataset, index: int) -> tuple[Image.Image | Encoded, int]:
    """Returns (RGB image, or one to be decoded where the data set has such, label)."""
    give = getattr(dataset, "encoded", dataset.sample)
    return cast(Callable[[int], tuple[Image.Image | Encoded, int]], give)(index)
