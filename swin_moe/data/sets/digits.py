"""The real handwritten digits that scikit-learn ships: 1,797 grey images of 8 x 8 pixels, values 0..16, ten classes.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(the repository's test part). No download: the file is inside the scikit-learn wheel.
"""

import functools
import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from swin_moe.config import DataConfig

NUM_TEST = 360  # the other 1,437 images are for training
_SPLIT_SEED = 20210325  # fixed, so that accuracies of different runs are of the same test images


def stratified_split(labels: np.ndarray, *, num_test: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, test): ascending int64 indices of a split in which every class keeps its share.

    Fixed for all runs, whatever run.seed. Test images per class are num_test * class size / N, rounded down, and the
    largest remainders get one more. Within a class the images with the smallest raw Philox numbers are taken:
    the raw stream is the part of numpy that never changes between versions.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    share = num_test * sizes / len(labels)
    counts = share.astype(np.int64)
    largest = np.argsort(counts - share, kind="stable")[: num_test - counts.sum()]
    counts[largest] += 1
    draw = np.random.Philox(_SPLIT_SEED).random_raw(len(labels))
    test = []
    for label, count in zip(classes, counts):
        members = np.flatnonzero(labels == label)
        test.append(members[np.argsort(draw[members], kind="stable")[:count]])
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[np.concatenate(test)] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


@functools.cache
def _table() -> np.ndarray:
    """Returns (1797, 65) float64: the 64 pixels of every image, row by row, and its label.

    Read where load_digits reads it, but without the second that importing scikit-learn takes.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ValueError(
            "data.name=digits needs the package 'scikit-learn', which is not installed; "
            "install it with: pip install scikit-learn"
        )
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        return np.loadtxt(file, delimiter=",")


class Digits:
    """Data set of RGB images of 8 x 8 pixels; the transforms bring them to the image size."""

    def __init__(self, config: DataConfig, split: str) -> None:
        pixels, labels = _table()[:, :-1], _table()[:, -1].astype(np.int64)
        train, test = stratified_split(labels, num_test=NUM_TEST)
        self._rows = train if split == "train" else test
        self._labels = labels[self._rows]
        # 16 grey levels above black -> 8 bits, and the same in three channels.
        grey = np.rint(pixels[self._rows].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._pixels = np.repeat(grey[..., None], 3, axis=-1)
        self._images = [Image.fromarray(pixels) for pixels in self._pixels] if config.cache else None
        self.classes = tuple(str(c) for c in range(10))
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> str:
        """Returns a name for error messages: the row in scikit-learn's table."""
        return f"sklearn.datasets.load_digits()[{self._rows[index]}]"

    def sample(self, index: int) -> tuple[Image.Image, int]:
        """Returns (RGB image, label); the image may be shared with later calls, so transforms must not write to it."""
        image = self._images[index] if self._images is not None else Image.fromarray(self._pixels[index])
        return image, int(self._labels[index])

    def labels(self) -> np.ndarray:
        """Returns (N,) the label of every image."""
        return self._labels
