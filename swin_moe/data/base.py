"""What a data set is: Dataset, the protocol; datasets.py has the rows."""

from typing import Protocol

import numpy as np
from PIL import Image


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
    """What every data set offers that labels whole images."""

    def sample(self, index: int) -> tuple[Image.Image, int]:
        """Returns (RGB image, label)."""
        ...
