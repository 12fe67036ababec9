"""What a data set is: Dataset, the protocol; datasets.py has the rows."""

from typing import Protocol

import numpy as np
from PIL import Image


class Dataset(Protocol):
    """What every data set offers."""

    num_classes: int
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """Returns what to call this image in messages."""
        ...

    def sample(self, index: int) -> tuple[Image.Image, int]:
        """Returns (RGB image, label)."""
        ...

    def labels(self) -> np.ndarray:
        """Returns (N,) the label of every image, without decoding one."""
        ...
