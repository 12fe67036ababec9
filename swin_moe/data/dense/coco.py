"""Objects of a COCO json: boxes, polygons or run lengths, crowds. No Python object per image or object is kept.

Labels follow the ascending category ids, whatever those are. What is wrong with single objects is named, with the file
and both numbers, and left out or refused (data.dense.on_bad); a json that is none of COCO's is refused.

Shape legend: N objects of an image, M objects of the file, H height, W width.
"""

import collections
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from swin_moe.config import DataConfig
from swin_moe.data.datasets import PathTable
from swin_moe.data.dense.label_maps import read_label_map
from swin_moe.data.dense.layout import large_enough, locate
from swin_moe.data.dense.masks import bitmaps_of, check_segmentation, rle_of_segmentation
from swin_moe.data.dense.sample import IGNORED, Annotation, DenseSample
from swin_moe.data.pixels import BrokenImage, decode, read_image

_log = logging.getLogger(__name__)
_JSON = (
    "annotations/instances_{split}2017.json",
    "annotations/{split}.json",
    "{split}.json",
    "{split}/_annotations.coco.json",
)
_IMAGES = ("{split}2017", "images/{split}2017", "{split}", "images/{split}", "images", ".")
_SHOWN = 3  # bad objects that one sentence names


def read_coco(path: Path) -> dict[str, list[dict]]:
    """Returns the lists images, annotations and categories of a COCO json.

    Raises:
        ValueError: It is none, with the file and what is missing.
    """
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no json: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no COCO json: its top level is a {type(tree).__name__}, not an object")
    for key, needs in (
        ("images", ("id", "file_name", "height", "width")),
        ("categories", ("id", "name")),
        ("annotations", ()),
    ):
        rows = tree.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is no COCO json: it has no list '{key}' of objects")
        for row in rows:
            lacks = [name for name in needs if name not in row]
            if lacks:
                raise ValueError(f"{path}: {key[:-1]} {row.get('id', row)!r} has no {', '.join(lacks)}")
        numbers = [row["id"] for row in rows if needs]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"{path}: an id in '{key}' is no whole number")
        if len(set(numbers)) < len(numbers):
            twice = collections.Counter(numbers).most_common(1)[0][0]
            raise ValueError(f"{path}: two of '{key}' have the id {twice}")
    for image in tree["images"]:
        sides = image["height"], image["width"]
        if not all(isinstance(side, int) and side > 0 for side in sides) or not isinstance(image["file_name"], str):
            raise ValueError(
                f"{path}: image {image['id']} must have a file_name in quotes and sides of whole pixels, got "
                f"{image['file_name']!r}, height {sides[0]!r}, width {sides[1]!r}"
            )
    if not tree["categories"]:
        raise ValueError(f"{path}: its list 'categories' is empty, so nothing can be detected")
    if not tree["images"]:
        raise ValueError(f"{path}: its list 'images' is empty")
    return tree


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


class _Objects:
    """The objects of a file in arrays; those of image i are rows [starts[i], starts[i + 1])."""

    def __init__(self, tree: dict[str, list[dict]]) -> None:
        self.bad: list[str] = []  # a sentence for each that is left out
        images = tree["images"]
        place = {image["id"]: index for index, image in enumerate(images)}
        self._sizes = [(image["height"], image["width"]) for image in images]
        self._label = {row["id"]: label for label, row in enumerate(sorted(tree["categories"], key=lambda c: c["id"]))}
        self._needs_masks = any(row.get("segmentation") for row in tree["annotations"])
        seen: set[int] = set()
        kept: list[tuple[int, dict, dict | None]] = []
        for row in tree["annotations"]:
            try:
                self._check(row, place, seen)
                rle = self._packed(row, self._sizes[place[row["image_id"]]])
            except (ValueError, TypeError) as error:
                reason = str(error) if isinstance(error, ValueError) else f"has a value of a wrong type ({error})"
                self.bad.append(f"object {row.get('id')} of image {row.get('image_id')} {reason}")
                continue
            seen.add(row["id"])
            kept.append((place[row["image_id"]], row, rle))
        kept.sort(key=lambda entry: entry[0])  # stable: in the order of the file within an image
        self._fill(kept, len(images))

    def _check(self, row: dict, place: dict[int, int], seen: set[int]) -> None:
        """Raises ValueError with what is wrong about an object, as the end of a sentence."""
        if not isinstance(row.get("id"), int):
            raise ValueError("has no id that is a whole number")
        if row["id"] in seen:
            raise ValueError("has the id of another object")
        if row.get("image_id") not in place:
            raise ValueError("belongs to an image that is not in 'images'")
        if row.get("category_id") not in self._label:
            raise ValueError(f"has category_id {row.get('category_id')!r}, which is not in 'categories'")
        box = row.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
            raise ValueError(f"has the bbox {box!r}, which is not four numbers x, y, width, height")
        x, y, width, height = box
        if width <= 0 or height <= 0 or row.get("area", 1) <= 0:
            raise ValueError(f"has no area (bbox {box}, area {row.get('area')})")
        rows, columns = self._sizes[place[row["image_id"]]]
        if x >= columns or y >= rows or x + width <= 0 or y + height <= 0:
            raise ValueError(f"lies outside of the image, {columns} x {rows} pixels (bbox {box})")

    def _packed(self, row: dict, size: tuple[int, int]) -> dict | None:
        """Returns the RLE of an object that stands as one in the file; None for polygons and objects without a mask."""
        segmentation = row.get("segmentation")
        if not segmentation:
            if self._needs_masks:
                raise ValueError("has no segmentation, which other objects of the file have")
            return None
        check_segmentation(segmentation, *size)
        return rle_of_segmentation(segmentation, *size) if isinstance(segmentation, dict) else None

    def _fill(self, kept: Sequence[tuple[int, dict, dict | None]], images: int) -> None:
        rows = [row for _, row, _ in kept]
        polygons = [row["segmentation"] if isinstance(row.get("segmentation"), list) else [] for row in rows]
        self.starts = np.searchsorted([index for index, *_ in kept], np.arange(images + 1))
        self.boxes = np.asarray([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)  # x, y, width, height
        self.labels = np.asarray([self._label[row["category_id"]] for row in rows], dtype=np.int64)
        self.crowd = np.asarray([bool(row.get("iscrowd", 0)) for row in rows], dtype=bool)
        self.ids = np.asarray([row["id"] for row in rows], dtype=np.int64)
        areas = [row.get("area", box[2] * box[3]) for row, box in zip(rows, self.boxes.tolist())]
        self.areas = np.asarray(areas, dtype=np.float64)
        flat = [polygon for own in polygons for polygon in own]
        self._points = np.asarray([value for polygon in flat for value in polygon], dtype=np.float64)
        self._point_ends = np.cumsum([0, *map(len, flat)])
        self._polygon_ends = np.cumsum([0, *map(len, polygons)])
        packed = [b"" if rle is None else rle["counts"] for _, _, rle in kept]
        self._runs = np.frombuffer(b"".join(packed), dtype=np.uint8)
        self._run_ends = np.cumsum([0, *map(len, packed)])
        self.has_masks = self._needs_masks and bool(rows)
        del self._label, self._sizes

    def rle(self, number: int, height: int, width: int) -> dict | None:
        """Returns the RLE of an object's mask; None without any."""
        if not self.has_masks:
            return None
        runs = self._runs[self._run_ends[number] : self._run_ends[number + 1]].tobytes()
        if runs:
            return {"size": [height, width], "counts": runs}
        own = range(self._polygon_ends[number], self._polygon_ends[number + 1])
        polygons = [self._points[self._point_ends[n] : self._point_ends[n + 1]].tolist() for n in own]
        return rle_of_segmentation(polygons, height, width)


class Coco:
    """The data set data.name=coco: a json below data.path, and the folder that its file names begin in.

    Training has the images of at least data.dense.min_side pixels that have an object, crowds included, unless
    data.dense.keep_empty; objects with a side below one pixel are evaluated, not trained on. Label maps (`maps`) come
    from a folder (data.dense.train_maps), or are painted from the masks: background, then the categories, the largest
    object first, crowds ignored. Without `boxes` those are the classes.
    """

    def __init__(
        self, config: DataConfig, split: str, *, boxes: bool = True, maps: bool = False, num_classes: int = 0
    ) -> None:
        places = [place.format(split=split) for place in _JSON]
        self.file = locate(config, f"{split}_annotations", places, what="COCO json", folder=False)
        beside = self.file.parent if self.file.parent.name == split else None
        places = [place.format(split=split) for place in _IMAGES]
        self._folder = locate(config, f"{split}_images", places, what="folder of images", folder=True, beside=beside)
        self._exif, self._train, self._has_maps = config.exif, split == "train", maps
        self._maps = self._found_maps(config, split) if maps and boxes else None
        first = 0 if boxes else 1  # category 0 is label 1 beside background
        tree = read_coco(self.file)
        categories = sorted(tree["categories"], key=lambda row: row["id"])
        self.classes = ("background",) * first + tuple(str(row["name"]) for row in categories)
        self.num_classes = len(self.classes)
        self.category_ids = (0,) * first + tuple(row["id"] for row in categories)
        self._objects = _Objects(tree)
        self._report(config.dense.on_bad, self.classes[first:])
        images = tree["images"]
        self._paths = PathTable([str(image["file_name"]) for image in images])
        self._all_sizes = np.asarray([(image["height"], image["width"]) for image in images], dtype=np.int64)
        self._image_ids = np.asarray([image["id"] for image in images], dtype=np.int64)
        self._rows = self._chosen(config)
        if not len(self._rows):
            raise ValueError(f"{self.file}: none of its {len(images)} images is there, and for training has an object")

    @staticmethod
    def _found_maps(config: DataConfig, split: str) -> Path | None:
        """Returns the folder of label maps: COCO-Stuff's, where it is there, or what data.dense.<split>_maps says."""
        given = getattr(config.dense, f"{split}_maps")
        places = [f"stuffthingmaps/{split}2017", f"stuffthingmaps/{split}"]
        if not given and not any((Path(config.path) / place).is_dir() for place in places):
            return None
        return locate(config, f"{split}_maps", places, what="folder of label maps", folder=True)

    def _report(self, on_bad: str, categories: Sequence[str]) -> None:
        """Names the objects that are left out, and empty categories; raises ValueError where objects are fatal."""
        bad = self._objects.bad
        if bad:
            count = "1 object is" if len(bad) == 1 else f"{len(bad)} objects are"
            named = "; ".join(bad[:_SHOWN]) + ("; ..." if len(bad) > _SHOWN else "")
            if on_bad == "fail":
                raise ValueError(f"{self.file}: {count} wrong: {named} (data.dense.on_bad=skip leaves them out)")
            _log.warning("%s: %s left out: %s", self.file, count, named)
        used = np.bincount(self._objects.labels, minlength=len(categories))
        empty = [name for name, count in zip(categories, used) if not count]
        if empty and self._train:
            _log.warning(
                "%s: no object of %d of %d categories: %s", self.file, len(empty), len(used), ", ".join(empty[:8])
            )

    def _chosen(self, config: DataConfig) -> np.ndarray:
        """Returns the images of this data set, by their place in the file."""
        there = self._there()
        if not there.all():
            first = self._path(int(np.flatnonzero(~there)[0]))
            count = int((~there).sum())
            if config.on_broken == "fail":
                raise ValueError(
                    f"{self.file}: {count} of {len(there)} images are missing, first {first} "
                    f"(data.on_broken=skip leaves them out)"
                )
            _log.warning("%s: %d of %d images are missing and left out, first %s", self.file, count, len(there), first)
        if self._train:
            there &= large_enough(self._all_sizes, config, self.file)
            there &= (np.diff(self._objects.starts) > 0) | config.dense.keep_empty
        return np.flatnonzero(there)

    def _there(self) -> np.ndarray:
        """Returns (images of the file,) bool: whether each is a file. Folders are listed, which takes one look for
        thousands of images."""
        folders: dict[str, set[str]] = {}
        there = np.zeros(len(self._all_sizes), dtype=bool)
        for row in range(len(there)):
            folder, name = os.path.split(self._path(row))
            if folder not in folders:
                folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            there[row] = name in folders[folder]
        return there

    def _path(self, row: int) -> str:
        return os.path.join(self._folder, self._paths[row])

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> str:
        """Returns the path of the file."""
        return self._path(int(self._rows[index]))

    def sizes(self) -> np.ndarray:
        """Returns (len, 2) int64, height and width as the json says."""
        return self._all_sizes[self._rows]

    def labels(self) -> np.ndarray:
        """Returns (len,) int64: a checksum of every image's objects."""
        objects = self._objects
        sums = []
        for row in self._rows:
            own = slice(objects.starts[row], objects.starts[row + 1])
            parts = (objects.boxes[own], objects.labels[own], objects.crowd[own], objects.areas[own])
            sums.append(zlib.crc32(b"".join(part.tobytes() for part in parts)))
        return np.asarray(sums, dtype=np.int64)

    def update_listing(self, update: Callable[[bytes], None]) -> None:
        """Feeds a digest with the file names and numbers of all images."""
        self._paths.update(update)
        update(self._image_ids.astype("<i8").tobytes())
        update(self._rows.astype("<i8").tobytes())

    def dense_sample(self, index: int) -> DenseSample:
        """Returns the image with its objects; raises BrokenImage, also for one of another size than the json says."""
        row = int(self._rows[index])
        path, (height, width) = self._path(row), self._all_sizes[row].tolist()
        try:
            data = read_image(path)
        except OSError as error:
            raise BrokenImage(path, error.strerror or str(error)) from error
        image = decode(data, path, exif=self._exif)
        if image.size != (width, height):
            reason = f"is {image.width} x {image.height} pixels, {self.file.name} says {width} x {height}"
            raise BrokenImage(path, reason)
        objects = self._objects
        numbers = np.arange(objects.starts[row], objects.starts[row + 1])
        if self._train:
            numbers = numbers[(objects.boxes[numbers, 2:] >= 1).all(1)]
        boxes = objects.boxes[numbers]
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        masks = self._masks(numbers, height, width) if objects.has_masks else None
        return DenseSample(
            image=image,
            image_id=int(self._image_ids[row]),
            original_size=(height, width),
            boxes=boxes.clip(0, [width, height, width, height]),
            labels=objects.labels[numbers],
            crowd=objects.crowd[numbers],
            ids=objects.ids[numbers],
            masks=masks,
            label_map=self._label_map(path, row, numbers, masks) if self._has_maps else None,
        )

    def _masks(self, numbers: np.ndarray, height: int, width: int) -> np.ndarray:
        rles = [self._objects.rle(int(number), height, width) for number in numbers]
        return bitmaps_of([rle for rle in rles if rle is not None], height, width)

    def _label_map(self, path: str, row: int, numbers: np.ndarray, masks: np.ndarray | None) -> np.ndarray:
        """Returns (H, W) int64 of an image, whose objects and masks these are."""
        size = tuple(self._all_sizes[row].tolist())
        if self._maps is not None:
            file = os.path.join(self._maps, f"{os.path.splitext(os.path.basename(path))[0]}.png")
            label_map = read_label_map(file)
            if label_map.shape != size:
                raise BrokenImage(path, f"is {size[1]} x {size[0]} pixels, its label map {file} has another size")
            return label_map
        if masks is None:
            raise ValueError(f"{self.file}: its objects have no masks (segmentation) to paint label maps from")
        label_map = np.zeros(size, dtype=np.int64)
        for place in np.argsort(-masks.sum((1, 2)), kind="stable"):
            number = numbers[place]
            label_map[masks[place]] = IGNORED if self._objects.crowd[number] else 1 + self._objects.labels[number]
        return label_map

    def truth(self, index: int) -> list[Annotation]:
        """Returns the image's objects as the json has them, with labels for category ids."""
        row = int(self._rows[index])
        height, width = self._all_sizes[row].tolist()
        objects = self._objects
        return [
            {
                "id": int(objects.ids[number]),
                "category_id": int(objects.labels[number]),
                "bbox": objects.boxes[number].tolist(),
                "area": float(objects.areas[number]),
                "iscrowd": int(objects.crowd[number]),
                "segmentation": objects.rle(number, height, width),
            }
            for number in range(objects.starts[row], objects.starts[row + 1])
        ]
