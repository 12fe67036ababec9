"""Data sets by name: images on disk in the layouts of the official code.

A data set has `__len__`, `num_classes`, `classes` (names), `path(index)` and `sample(index) -> (RGB image, label)`.
It never draws random numbers and never replaces an image: one that cannot be decoded raises BrokenImage. All of them
can be pickled and forked, so that loader processes may use them, and hold no Python object per image: reference counts
of 14 million strings would copy every page of them into every process.
"""

import array
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.config.arguments import near_path
from swin_moe.config.checks import shown
from swin_moe.data.base import Dataset
from swin_moe.data.pixels import BrokenImage, Encoded, read_image
from swin_moe.data.sets.subset import ClassSubset
from swin_moe.names.files import IMAGE_SUFFIXES
from swin_moe.registry import lookup

DATASETS = {
    "digits": "swin_moe.data.sets.digits:Digits",
    "folder": "swin_moe.data.datasets:ImageFolder",
    "zip": "swin_moe.data.datasets:ZipArchive",
    "imagenet22k": "swin_moe.data.datasets:ImageNet22k",
    "lists": "swin_moe.data.sets.lists:ImageLists",
    "synthetic": "swin_moe.data.sets.synthetic:Synthetic",
}
_MOST_CLASSES = 1_000_000
DENSE = ("canvases", "coco", "label_maps")  # rows of data/dense/loader.py: DENSE_DATASETS


def build_dataset(config: DataConfig, split: str, *, img_size: tuple[int, int], num_classes: int = 1000) -> Dataset:
    """Returns the data set data.name; `split` is "train" or "val".

    img_size (height, width in pixels) and num_classes only shape synthetic images; the others have their own.

    Raises:
        ValueError: Something under data.path is missing, empty or malformed, or a package is not installed.
    """
    if config.name in DENSE:
        raise ValueError(
            f"data.name: {config.name} has boxes or label maps, and this task needs images with a label each; allowed: "
            f"{', '.join(DATASETS)}"
        )
    lists = config.name == "folder" and has_lists(Path(config.path))  # one data.path, however images are split in it
    dataset_class = lookup(DATASETS, "lists" if lists else config.name, key="data.name")
    shape = {"img_size": img_size, "num_classes": num_classes} if config.name == "synthetic" else {}
    dataset = dataset_class(config, split, **shape)
    if isinstance(dataset, FileDataset):
        dataset.exif = config.exif
    if split == "train" and config.images_per_class:
        return ClassSubset(dataset, config.images_per_class, draw=config.subset)
    return dataset


def has_lists(root: Path) -> bool:
    """Returns whether a folder holds tables instead of folders of images (sets/lists.py)."""
    return (root / "train.csv").is_file() and not (root / "train").is_dir()


class PathTable:
    """Paths in one block of bytes instead of one string each, of which there are never all at once."""

    def __init__(self, paths: Iterable[str]) -> None:
        block, ends = bytearray(), array.array("q")
        for path in paths:
            block += os.fsencode(path)
            ends.append(len(block))
        self._ends = np.array(ends, dtype=np.int64)
        self._bytes = np.array(block, dtype=np.uint8)  # a copy, without what the block has to grow

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())

    def update(self, update: Callable[[bytes], None], *, skip: int = 0) -> None:
        """Feeds a digest with every path, without its first `skip` bytes; in arrays, as there may be millions."""
        starts = np.concatenate([np.zeros(1, dtype=np.int64), self._ends])[: len(self._ends)]
        kept = np.ones(len(self._bytes), dtype=bool)
        for place in range(skip):
            kept[starts + place] = False
        update(np.ascontiguousarray(self._ends - skip * np.arange(1, len(starts) + 1), dtype="<i8").tobytes())
        update(self._bytes[kept].tobytes())


class FileDataset:
    """Images that are files: everything but how a file is found and its bytes are read."""

    exif = False  # data.exif

    def __init__(
        self, paths: Iterable[str] | PathTable, labels: ArrayLike, classes: Sequence[str], *, folder: str = ""
    ) -> None:
        """folder: What all paths begin with where they are not relative to data.path."""
        self._paths = paths if isinstance(paths, PathTable) else PathTable(paths)
        self._prefix_size = len(os.fsencode(folder))
        self._labels = np.asarray(labels, dtype=np.int32)
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self._labels)

    def path(self, index: int) -> str:
        """Returns the path of the file."""
        return self._paths[index]

    def labels(self) -> np.ndarray:
        """Returns (N,) the label of every image."""
        return self._labels

    def update_listing(self, update: Callable[[bytes], None]) -> None:
        """Feeds a digest with the paths of all images below data.path."""
        self._paths.update(update, skip=self._prefix_size)

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image; raises OSError or BrokenImage."""
        return read_image(self.path(index))

    def sample(self, index: int) -> tuple[Image.Image, int]:
        """Returns (RGB image, label).

        Raises:
            BrokenImage: The file cannot be read or decoded.
        """
        image, label = self.encoded(index)
        return image.whole(), label

    def encoded(self, index: int) -> tuple[Encoded, int]:
        """Returns (image to be decoded, label).

        Raises:
            BrokenImage: The file cannot be read.
        """
        path = self.path(index)
        try:
            data = self.read(index)
        except OSError as error:
            raise BrokenImage(path, error.strerror or str(error)) from error
        return Encoded(data, path, exif=self.exif), int(self._labels[index])


def _is_no_data(member: zipfile.ZipInfo) -> bool:
    *folders, name = member.filename.split("/")
    return member.is_dir() or name.startswith("._") or any(map(is_hidden, folders))


def is_hidden(folder: str) -> bool:
    """Returns whether a folder is no data by its name: hidden (.ipynb_checkpoints), or what macOS adds to archives."""
    return folder == "__MACOSX" or (folder.startswith(".") and folder not in (".", ".."))


def walk_folders(directory: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields what os.walk does, behind links too, no hidden folders; raises ValueError for a link to a folder above."""
    for folder, inner, names in os.walk(directory, followlinks=True):
        inner[:] = [name for name in inner if not is_hidden(name)]
        for name in inner:
            path = os.path.join(folder, name)
            real = os.path.realpath(path) if os.path.islink(path) else ""
            if real and Path(os.path.realpath(folder)).is_relative_to(real):
                raise ValueError(f"data.path: the link {path} leads back to {real}, a folder above it")
        yield folder, inner, names


def is_image(name: str) -> bool:
    """Returns whether a file has an image's suffix; those of macOS that begin with ._ hold something else."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("._")


def require_directory(path: Path, what: str, *, hint: str = "") -> None:
    """Raises ValueError where there is no such directory; says what is called nearly so, or `hint`."""
    if path.is_file():
        raise ValueError(f"data.path: {path} is a file; give the folder that holds the images")
    if not path.is_dir():
        raise ValueError(f"data.path: no {what} at {path}{hint or near_path(path)}")


def class_labels(classes: Sequence[str], known: Sequence[str], *, where: object, train: object) -> dict[str, int]:
    """Returns class name -> label, as numbered in the training split `known`.

    Numbering the validation classes by themselves would shift every label after a class that has no
    validation image.
    """
    labels = {name: label for label, name in enumerate(known)}
    unknown = [name for name in classes if name not in labels]
    if unknown:
        raise ValueError(f"data.path: class {unknown[0]!r} of {where} does not exist in {train}")
    return labels


class ImageFolder(FileDataset):
    """data.path/{train,val}/<class>/**/<image>; classes are numbered in the order of their names in train/."""

    def __init__(self, config: DataConfig, split: str) -> None:
        root = Path(config.path)
        require_directory(root, "directory")
        directory, train = root / split, root / "train"
        split_it = f"; `swin-moe data split {root} --out {root}_split` makes train and val of class folders"
        if not any(entry.is_dir() for entry in root.iterdir()):
            split_it = f"; a folder for each class is needed, and `swin-moe data check {root}` says what is there"
        require_directory(directory, "directory", hint="" if train.is_dir() else split_it)
        found = self._class_names(directory)
        classes = self._class_names(train) if train.is_dir() else found
        labels_of = class_labels(found, classes, where=directory, train=train)
        counts: list[int] = []
        paths = PathTable(self._listed(directory, found, counts))
        labels = np.repeat([labels_of[name] for name in found], counts)
        super().__init__(paths, labels, classes, folder=os.path.join(directory, ""))

    @classmethod
    def _listed(cls, directory: Path, names: Iterable[str], counts: list[int]) -> Iterator[str]:
        """Yields the images of classes; adds to `counts` how many each has."""
        for name in names:
            images = cls._images(directory / name)
            if not images:
                raise ValueError(
                    f"data.path: no image in class directory {directory / name} ({', '.join(IMAGE_SUFFIXES)})"
                )
            counts.append(len(images))
            yield from images

    @staticmethod
    def _class_names(directory: Path) -> list[str]:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
        if not names:
            raise ValueError(f"data.path: no class directory in {directory}")
        return names

    @staticmethod
    def _images(directory: Path) -> list[str]:
        walk = sorted(walk_folders(directory))
        return [os.path.join(folder, name) for folder, _, names in walk for name in sorted(names) if is_image(name)]


def _read_map(path: Path) -> tuple[list[str], list[int]]:
    """Returns (paths, labels) of a map file with lines "path<tab>label"."""
    paths, labels = [], []
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:  # names of files may be of another encoding
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, tab, label = line.rstrip("\n").rpartition("\t")
            if not tab or not re.fullmatch(r"\s*[0-9]{1,9}\s*", label):
                got = shown(line.strip())
                raise ValueError(f"data.path: line {number} of {path} must be 'path<tab>label', got {got}")
            paths.append(name)
            labels.append(int(label))
    return paths, labels


def _number_names(labels: Sequence[int], file: Path) -> tuple[str, ...]:
    if max(labels, default=0) >= _MOST_CLASSES:  # a name each: a wrong column would take all memory
        raise ValueError(f"data.path: {file} has label {shown(max(labels))}; labels are below {_MOST_CLASSES:,}")
    return tuple(str(label) for label in range(max(labels, default=-1) + 1))


class ZipArchive(FileDataset):
    """data.path/{train,val}.zip, with labels from {train,val}_map.txt or, without one, from the image's folder name.

    Members are read with pread at offsets kept in arrays: one descriptor serves forked loader processes, and none of
    them holds zipfile's table, which takes about a kilobyte per image.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        root = Path(config.path)
        require_directory(root, "directory")
        self._archive = str(root / f"{split}.zip")
        self._file: io.FileIO | None = None
        members = self._members(root, split)
        has_map = (root / f"{split}_map.txt").is_file()
        if (root / "train.zip").is_file() and has_map != (root / "train_map.txt").is_file():
            raise ValueError(
                f"data.path: {root} must have a map file for both {split}.zip and train.zip, or for neither"
            )
        paths, labels, classes = (self._listed if has_map else self._by_folder)(root, split, members)
        if not paths:
            raise ValueError(f"data.path: no image in {self._archive} ({', '.join(IMAGE_SUFFIXES)})")
        fields = [(m.header_offset, m.compress_size, m.compress_type, m.CRC) for m in map(members.__getitem__, paths)]
        self._location = np.asarray(fields, dtype=np.int64)
        super().__init__(paths, labels, classes)

    def _listed(self, root: Path, split: str, members: Container[str]) -> tuple[list[str], list[int], Sequence[str]]:
        """Returns (paths, labels, classes) of the map file; classes are called by their numbers."""
        map_file, train_map = root / f"{split}_map.txt", root / "train_map.txt"
        paths, labels = _read_map(map_file)
        paths = [path.strip("/") for path in paths]
        absent = next((path for path in paths if path not in members), None)
        if absent is not None:
            raise ValueError(f"data.path: {map_file} lists {absent!r}, which is not in {self._archive}")
        listing = train_map if train_map.is_file() else map_file
        classes = _number_names(_read_map(listing)[1], listing)
        if max(labels, default=0) >= len(classes) > 0:
            raise ValueError(
                f"data.path: {map_file} has label {max(labels)}, but {train_map} only {len(classes)} classes"
            )
        return paths, labels, classes

    def _by_folder(self, root: Path, split: str, members: Iterable[str]) -> tuple[list[str], list[int], Sequence[str]]:
        """Returns (paths, labels, classes), the class of an image being the folder it lies in."""
        paths = sorted(filter(is_image, members))
        folders = [self._folder(path) for path in paths]
        found, train_zip = sorted(set(folders)), root / "train.zip"
        classes = found
        if split != "train" and train_zip.is_file():
            classes = sorted({self._folder(path) for path in filter(is_image, self._members(root, "train"))})
        numbers = class_labels(found, classes, where=self._archive, train=train_zip)
        return paths, [numbers[folder] for folder in folders], classes

    @staticmethod
    def _members(root: Path, split: str) -> dict[str, zipfile.ZipInfo]:
        archive = root / f"{split}.zip"
        if not archive.is_file():
            raise ValueError(f"data.path: no file {archive}")
        try:
            with zipfile.ZipFile(archive) as opened:
                members = {m.filename.strip("/"): m for m in opened.infolist() if not _is_no_data(m)}
        except zipfile.BadZipFile as error:
            raise ValueError(f"data.path: {archive} is not a complete zip file: {error}") from error
        for member in members.values():
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"data.path: {member.filename} in {archive} is encrypted or not stored or deflated")
        return members

    def _folder(self, path: str) -> str:
        folder = os.path.basename(os.path.dirname(path))
        if not folder:
            raise ValueError(f"data.path: {path!r} in {self._archive} is in no class folder, and there is no map file")
        return folder

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def path(self, index: int) -> str:
        """Returns archive@/member, as the official code writes it."""
        return f"{self._archive}@/{self._paths[index]}"

    def read(self, index: int) -> bytes:
        """Returns the bytes of a member; raises OSError or BrokenImage."""
        if self._file is None:
            self._file = io.FileIO(self._archive)
        file = self._file.fileno()
        offset, size, method, checksum = map(int, self._location[index])
        # Local file header: 30 bytes, name and extra-field lengths in the last four (APPNOTE.TXT 4.3.7).
        header = os.pread(file, 30, offset)
        skip = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = os.pread(file, size, offset + skip)
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else data
        except zlib.error as error:
            raise BrokenImage(self.path(index), str(error)) from error
        if zlib.crc32(data) != checksum:
            raise BrokenImage(self.path(index), "wrong checksum in the zip file")
        return data


class ImageNet22k(FileDataset):
    """data.path/<relative path>, listed in ILSVRC2011fall_whole_map_{train,val}.txt: JSON, [[path, label], ...]."""

    def __init__(self, config: DataConfig, split: str) -> None:
        self._root = config.path
        require_directory(Path(config.path), "directory")
        file = Path(config.path) / f"ILSVRC2011fall_whole_map_{split}.txt"
        if not file.is_file():
            raise ValueError(f"data.path: no list file {file}")
        try:
            rows = json.loads(file.read_bytes())
            paths, labels = [str(row[0]) for row in rows], [int(row[1]) for row in rows]
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise ValueError(f"data.path: {file} must be a JSON list [[path, label], ...]: {error}") from error
        if not rows or min(labels) < 0:
            raise ValueError(f"data.path: {file} must list at least one image, with labels >= 0")
        super().__init__(paths, labels, _number_names(labels, file))

    def path(self, index: int) -> str:
        """Returns the path of the file."""
        return os.path.join(self._root, self._paths[index])
