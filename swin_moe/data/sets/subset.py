"""A few images of every class, drawn once: training with few labels, and few-shot evaluation."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np
from PIL import Image

from swin_moe.data.base import Dataset, encoded
from swin_moe.data.pixels import Encoded
from swin_moe.randomness import PURPOSES, derive_key


class Listed(Protocol):
    """What every data set tells without giving a sample."""

    classes: tuple[str, ...]
    num_classes: int

    def path(self, index: int) -> str: ...

    def labels(self) -> np.ndarray: ...


D = TypeVar("D", bound=Listed)


class Rows(Generic[D]):
    """Some images of a data set, by their places in it, in any order; whatever kind of sample it gives."""

    def __init__(self, dataset: D, rows: np.ndarray) -> None:
        self._dataset, self._rows = dataset, rows
        self.classes, self.num_classes = dataset.classes, dataset.num_classes

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> str:
        """Returns what to call this image in messages."""
        return self._dataset.path(int(self._rows[index]))

    def labels(self) -> np.ndarray:
        """Returns (N,) a number per image."""
        return self._dataset.labels()[self._rows]

    def update_listing(self, update: Callable[[bytes], None]) -> None:
        """Feeds a digest with the listing chosen from, and what was chosen."""
        if hasattr(self._dataset, "update_listing"):
            self._dataset.update_listing(update)
        update(self._rows.astype("<i8").tobytes())


class ClassSubset(Rows[Dataset]):
    """A data set with `count` images of every class of another, or all of a class that has fewer.

    Which ones is a function of (number of the draw, index in the data set), alike for all runs, seeds and layouts, so
    that runs with few labels compare. The raw Philox stream never changes between versions of numpy.
    """

    def __init__(self, dataset: Dataset, count: int, *, draw: int) -> None:
        labels = dataset.labels()
        number = np.random.Philox(derive_key(draw, PURPOSES.index("subset"))).random_raw(len(labels))
        order = np.lexsort((number, labels))
        place = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])  # within its class
        super().__init__(dataset, np.sort(order[place < count]))

    def sample(self, index: int) -> tuple[Image.Image, int]:
        """Returns (RGB image, label)."""
        return self._dataset.sample(int(self._rows[index]))

    def encoded(self, index: int) -> tuple[Image.Image | Encoded, int]:
        """Returns (image, maybe to be decoded, label)."""
        return encoded(self._dataset, int(self._rows[index]))
