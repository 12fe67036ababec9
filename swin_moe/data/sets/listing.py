"""Which images and classes a data set lists: a digest to compare it by, and its labels in another numbering."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from swin_moe.data.base import Dataset, Listed, encoded
from swin_moe.data.pixels import Encoded


def listing_digest(dataset: Listed) -> str:
    """Returns 32 hexadecimal digits of the class names, and every image's label and path below data.path.

    Where the data lies does not count, so a copy on another disk is the same data. Made-up and packaged data sets have
    no paths: length and class names tell them.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([len(dataset), list(dataset.classes)]).encode())
    if hasattr(dataset, "update_listing"):
        digest.update(np.ascontiguousarray(dataset.labels(), dtype="<i8").tobytes())
        dataset.update_listing(digest.update)
    return digest.hexdigest()


class Relabeled:
    """A data set whose labels are those of `classes`, by class name, as a trained network numbers them."""

    def __init__(self, dataset: Dataset, classes: Sequence[str]) -> None:
        """Raises ValueError for a class with images that is none of `classes`."""
        self._dataset = dataset
        self.classes, self.num_classes = tuple(classes), len(classes)
        number = {name: label for label, name in enumerate(self.classes)}
        self._new = np.asarray([number.get(name, -1) for name in dataset.classes], dtype=np.int64)
        for label in np.unique(dataset.labels()):
            if self._new[label] < 0:
                raise ValueError(
                    f"data.path: class {dataset.classes[label]!r} has images, but is none of the {len(classes)} "
                    f"classes the checkpoint was trained with ({_some(self.classes)})"
                )

    def __len__(self) -> int:
        return len(self._dataset)

    def path(self, index: int) -> str:
        """Returns what to call this image in messages."""
        return self._dataset.path(index)

    def sample(self, index: int) -> tuple[Image.Image, int]:
        """Returns (RGB image, label)."""
        image, label = self._dataset.sample(index)
        return image, int(self._new[label])

    def encoded(self, index: int) -> tuple[Image.Image | Encoded, int]:
        """Returns (image, maybe to be decoded, label)."""
        image, label = encoded(self._dataset, index)
        return image, int(self._new[label])

    def labels(self) -> np.ndarray:
        """Returns (N,) the label of every image."""
        return self._new[self._dataset.labels()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
