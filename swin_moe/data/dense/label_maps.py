"""A folder of images and a folder of label maps, one grey or palette image each of the same name: a class per pixel.

ADE20K lies so (images/training, annotations/training, validation), with 0 for pixels that are in no class:
data.dense.reduce_zero_label makes those 255, ignored, and the others count from 0.

Shape legend: H height, W width.
"""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.data.datasets import PathTable
from swin_moe.data.dense.layout import image_names, large_enough, locate
from swin_moe.data.dense.sample import IGNORED, Annotation, DenseSample
from swin_moe.data.pixels import BrokenImage, decode, read_image

# ADE20K's folder, Cityscapes' and ours, by split.
_FOLDERS = {"train": ("training", "train"), "val": ("validation", "val")}
_MAP_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
_CLASS_FILES = ("classes.txt", "objectInfo150.txt")


def read_classes(path: Path) -> tuple[str, ...]:
    """Returns the names in a file, one a line; of ADE20K's objectInfo150.txt the last column, up to its first comma.

    Raises:
        ValueError: It is no text; names the file.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"data.path: {path} is no text of UTF-8, a class a line") from None
    if path.name == "objectInfo150.txt":
        return tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines[1:])
    return tuple(line.strip() for line in lines)


def read_label_map(path: str) -> np.ndarray:
    """Returns (H, W) int64, the numbers in a label map's file: grey values or places in its palette.

    Raises:
        BrokenImage: It cannot be read, or has colours instead of numbers.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("L", "P", "1", "I", "I;16"):
                raise BrokenImage(path, f"is a label map with colours (mode {image.mode}), not a number per pixel")
            return np.asarray(image).astype(np.int64)
    except BrokenImage:
        raise
    except Exception as error:  # PIL's decoders raise many types
        raise BrokenImage(path, f"label map: {getattr(error, 'strerror', None) or type(error).__name__}") from error


class LabelMaps:
    """The data set data.name=label_maps; `truth` is empty, as it has no objects."""

    def __init__(
        self, config: DataConfig, split: str, *, boxes: bool = False, maps: bool = True, num_classes: int = 0
    ) -> None:
        if boxes:
            raise ValueError("data.name=label_maps has no boxes, which task.name needs; allowed: canvases, coco")
        names = _FOLDERS[split]
        images = [place.format(name) for name in names for place in ("images/{}", "{}/images", "leftImg8bit/{}")]
        annotated = [
            place.format(name) for name in names for place in ("annotations/{}", "labels/{}", "{}/labels", "masks/{}")
        ]
        what = f"folder of {split} "
        self._images = locate(config, f"{split}_images", images, what=f"{what}images", folder=True)
        self._maps = locate(config, f"{split}_annotations", annotated, what=f"{what}label maps", folder=True)
        self._exif, self._reduce, self._train = config.exif, config.dense.reduce_zero_label, split == "train"
        self.classes = self._class_names(config, num_classes)
        self.num_classes = len(self.classes)
        self.category_ids = tuple(range(self._reduce, self.num_classes + self._reduce))
        found = self._pairs(config)
        self._image_paths = PathTable([image for image, _ in found])
        self._map_paths = PathTable([label_map for _, label_map in found])
        self._sizes = self._read_sizes(unknown=max(1, config.dense.min_side))
        self._rows = np.arange(len(found))
        if self._train:
            self._rows = np.flatnonzero(large_enough(self._sizes, config, self._images))
        if not len(found):
            raise ValueError(f"data.path: no image in {self._images} with a label map in {self._maps}")
        if not len(self._rows):
            least = config.dense.min_side
            raise ValueError(f"{self._images}: all {len(found)} images have a side below data.dense.min_side={least}")

    @staticmethod
    def _class_names(config: DataConfig, num_classes: int) -> tuple[str, ...]:
        root = Path(config.path)
        given = config.dense.class_file
        files = [root / given] if given else [root / name for name in _CLASS_FILES]
        for file in files:
            if file.is_file():
                return read_classes(file)
        if given:
            raise ValueError(f"data.dense.class_file: no file {files[0]}")
        if num_classes < 1:
            raise ValueError(
                f"data.path: no {' or '.join(_CLASS_FILES)} in {root}, and model.num_classes={num_classes}; one of "
                "them says how many classes there are"
            )
        return tuple(str(label) for label in range(num_classes))

    def _pairs(self, config: DataConfig) -> list[tuple[str, str]]:
        """Returns (image, label map) by their names without suffix, relative to the folders."""
        maps = {
            os.path.splitext(os.path.join(folder, name))[0]: os.path.join(folder, name)
            for folder, _, names in os.walk(self._maps, followlinks=True)
            for name in names
            if name.lower().endswith(_MAP_SUFFIXES)
        }
        pairs: list[tuple[str, str]] = []
        alone: list[tuple[str, str]] = []
        for name in image_names(self._images):
            key = os.path.join(self._maps, os.path.splitext(name)[0])
            (pairs if key in maps else alone).append((name, maps.get(key, "")))
        if alone and config.on_broken == "fail":
            raise ValueError(
                f"{self._images}: {len(alone)} images have no label map in {self._maps}, first {alone[0][0]} "
                "(data.on_broken=skip leaves them out)"
            )
        return [(os.path.join(self._images, name), label_map) for name, label_map in pairs]

    def _read_sizes(self, unknown: int) -> np.ndarray:
        """Returns (images, 2) int64 from the headers of the label maps; `unknown` where one has none."""
        sizes = np.full((len(self._map_paths), 2), unknown, dtype=np.int64)
        for row in range(len(sizes)):
            try:
                with Image.open(self._map_paths[row]) as image:
                    sizes[row] = image.height, image.width
            except OSError:
                continue  # found broken again, and reported, when it is read
        return sizes

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> str:
        """Returns the path of the image."""
        return self._image_paths[int(self._rows[index])]

    def sizes(self) -> np.ndarray:
        """Returns (len, 2) int64, height and width."""
        return self._sizes[self._rows]

    def labels(self) -> np.ndarray:
        """Returns (len,) int64: a checksum of the label map's name and size; its pixels are not read."""
        sums = [zlib.crc32(os.path.basename(self._map_paths[int(row)]).encode()) for row in self._rows]
        return np.asarray(sums, dtype=np.int64) + self._sizes[self._rows].sum(1)

    def update_listing(self, update: Callable[[bytes], None]) -> None:
        """Feeds a digest with the names of all images below their folder."""
        self._image_paths.update(update, skip=len(os.fsencode(os.path.join(self._images, ""))))

    def dense_sample(self, index: int) -> DenseSample:
        """Returns the image and its label map.

        Raises:
            BrokenImage: One of both cannot be read, they differ in size, or a number is no class.
        """
        row = int(self._rows[index])
        path, map_path = self._image_paths[row], self._map_paths[row]
        try:
            data = read_image(path)
        except OSError as error:
            raise BrokenImage(path, error.strerror or str(error)) from error
        image = decode(data, path, exif=self._exif)
        label_map = read_label_map(map_path)
        if label_map.shape != (image.height, image.width):
            size = f"{label_map.shape[1]} x {label_map.shape[0]}"
            raise BrokenImage(path, f"is {image.width} x {image.height} pixels, its label map {map_path} {size}")
        if self._reduce:
            label_map = np.where((label_map == 0) | (label_map == IGNORED), IGNORED, label_map - 1)
        wrong = label_map[(label_map != IGNORED) & (label_map >= self.num_classes)]
        if len(wrong):
            number = int(wrong.min()) + self._reduce
            raise BrokenImage(map_path, f"has the number {number}, which is none of {self.num_classes} classes or 255")
        return DenseSample(image, index, (image.height, image.width), label_map=label_map)

    def truth(self, index: int) -> list[Annotation]:
        """Returns none."""
        return []
