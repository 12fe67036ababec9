"""Images with labels and without, mixed: in which order they come, and those of a folder that has no labels.

Shape legend: N images.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.data.datasets import PathTable
from swin_moe.data.dense.layout import image_names
from swin_moe.data.dense.sample import Annotation, DenseDataset, DenseSample
from swin_moe.data.pixels import BrokenImage, decode, read_image
from swin_moe.randomness import PURPOSES, derive_key


def mixed_order(is_labelled_N: np.ndarray, ratio: tuple[int, int], *, seed: int, epoch: int) -> np.ndarray:
    """Returns (N,) int64, the images of an epoch: of every sum(ratio) of them in a row ratio[0] have labels, spread
    evenly, the first of them one.

    Images of each kind come in the order of a permutation, then of the next one: all equally often over the epochs,
    those with labels the more often the fewer they are. A function of (seed, epoch).
    """
    own, together = ratio[0], sum(ratio)
    number = len(is_labelled_N)
    place = epoch * number + np.arange(number + 1)
    before = -(-place * own // together)  # how many labelled ones came before each place, over all epochs
    first = np.diff(before) > 0
    order = np.zeros(number, dtype=np.int64)
    for kind, turn, rows in ((0, before[:-1], first), (1, place[:-1] - before[:-1], ~first)):
        images = np.flatnonzero(is_labelled_N == (kind == 0))
        turns, inside = np.divmod(turn[rows], len(images))
        for one in np.unique(turns):
            key = derive_key(seed, int(one), kind, PURPOSES.index("order"))
            shuffled = images[np.argsort(np.random.Philox(key).random_raw(len(images)), kind="stable")]
            chosen = np.flatnonzero(rows)[turns == one]
            order[chosen] = shuffled[inside[turns == one]]
    return order


def check_mixed(dataset: DenseDataset, config: DataConfig) -> np.ndarray:
    """Returns (N,) bool: which images have labels.

    Raises:
        ValueError: There are not both kinds, or nothing is in those with labels.
    """
    is_labelled = np.asarray(getattr(dataset, "is_labelled", np.ones(len(dataset), dtype=bool)))
    if is_labelled.all():
        raise ValueError(
            f"data.name={config.name}: all {len(dataset)} images of training have labels, so a teacher has nothing to "
            f"label; set data.dense.unlabelled=keep with data.dense.labelled below 1, or data.dense.unlabelled_images"
        )
    if not any(dataset.truth(int(index)) for index in np.flatnonzero(is_labelled)):
        raise ValueError(
            f"data.name={config.name}: none of the {int(is_labelled.sum())} images with labels has an object, so "
            f"nothing would be learned; raise data.dense.labelled, or set another data.subset"
        )
    return is_labelled


class WithUnlabelled:
    """A data set, and after its images those of a folder, of which no labels are known."""

    def __init__(self, dataset: DenseDataset, config: DataConfig) -> None:
        """Reads the size of every image of data.dense.unlabelled_images, not its pixels.

        Raises:
            ValueError: The folder is not there or has no image; one cannot be read, unless data.on_broken=skip.
        """
        self._dataset, self._exif = dataset, config.exif
        self._folder = Path(config.path) / config.dense.unlabelled_images
        if not self._folder.is_dir():
            raise ValueError(f"data.dense.unlabelled_images: no folder at {self._folder} (looked for below data.path)")
        names, sizes = [], []
        for name in image_names(self._folder):
            try:
                sizes.append(self._size(self._folder / name))
            except Exception as error:  # PIL raises many types
                if config.on_broken == "fail":
                    raise ValueError(
                        f"data.dense.unlabelled_images: {self._folder / name} is no image that can be read ({error}); "
                        f"data.on_broken=skip leaves it out"
                    ) from None
                continue
            names.append(name)
        if not names:
            raise ValueError(f"data.dense.unlabelled_images: no image in {self._folder}")
        self._paths, self._own_sizes = PathTable(names), np.asarray(sizes, dtype=np.int64)
        self.classes, self.num_classes = dataset.classes, dataset.num_classes
        self.category_ids = dataset.category_ids
        known = np.asarray(getattr(dataset, "is_labelled", np.ones(len(dataset), dtype=bool)))
        self.is_labelled = np.concatenate([known, np.zeros(len(names), dtype=bool)])

    def _size(self, path: Path) -> tuple[int, int]:
        if not path.is_file():  # of a pipe none would ever come
            raise OSError("it is no regular file")
        with Image.open(path) as image:
            width, height = image.size
            turned = self._exif and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)

    def __len__(self) -> int:
        return len(self.is_labelled)

    def _own(self, index: int) -> int:
        """Returns the place of an image in the folder; negative for one of the data set."""
        return index - len(self._dataset)

    def path(self, index: int) -> str:
        """Returns what to call this image in messages."""
        own = self._own(index)
        return self._dataset.path(index) if own < 0 else str(self._folder / self._paths[own])

    def sizes(self) -> np.ndarray:
        """Returns (len, 2) int64, height and width."""
        return np.concatenate([self._dataset.sizes(), self._own_sizes])

    def labels(self) -> np.ndarray:
        """Returns (len,) int64, a number per image; those of the folder have 0."""
        return np.concatenate([self._dataset.labels(), np.zeros(len(self._own_sizes), dtype=np.int64)])

    def update_listing(self, update: Callable[[bytes], None]) -> None:
        """Feeds a digest with what both list."""
        if hasattr(self._dataset, "update_listing"):
            self._dataset.update_listing(update)
        self._paths.update(update)

    def truth(self, index: int) -> list[Annotation]:
        """Returns the image's objects as they are evaluated; of the folder's images none are known."""
        return self._dataset.truth(index) if self._own(index) < 0 else []

    def dense_sample(self, index: int) -> DenseSample:
        """Returns the image as stored; raises BrokenImage."""
        own = self._own(index)
        if own < 0:
            return self._dataset.dense_sample(index)
        path = self.path(index)
        try:
            image = decode(read_image(path), path, exif=self._exif)
        except OSError as error:
            raise BrokenImage(path, error.strerror or str(error)) from error
        height, width = self._own_sizes[own].tolist()
        if image.size != (width, height):
            raise BrokenImage(path, f"is {image.width} x {image.height} pixels, it had {width} x {height} at start")
        masks = np.zeros((0, height, width), dtype=bool)
        return DenseSample(image, index, (height, width), masks=masks, labelled=False)
