"""Images as people have them: class folders, with train and val above them or not, a table of labels, lists, zips."""

import csv
import os
from dataclasses import dataclass, field
from pathlib import Path

from swin_moe.config import DataConfig
from swin_moe.config.arguments import near_path
from swin_moe.config.schema import DatasetName
from swin_moe.data.datasets import FileDataset, build_dataset, has_lists, is_hidden, is_image, walk_folders

SPLITS = ("train", "val")
_OTHER_NAMES = ("valid", "validation", "test", "dev", "eval", "testing", "training")  # of a split, elsewhere
_IMAGE_COLUMNS = "image file filename file_name image_name image_path path filepath img image_id id name".split()
_CLASS_COLUMNS = "class label labels category target class_name species breed tag".split()
_SUFFIXES = ("", ".jpg", ".jpeg", ".png")  # what tables leave out


@dataclass(frozen=True)
class Found:
    """Images of one path."""

    path: Path
    layout: str  # in words
    splits: dict[str, FileDataset]  # train and val, or "" where nothing is split yet; one numbering of classes
    notes: list[str] = field(default_factory=list)  # what is not as training wants it

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of labels."""
        return next(iter(self.splits.values())).classes


def find(path: Path, *, labels: Path | None = None, columns: tuple[str, str] = ("", "")) -> Found:
    """Returns the images at a path.

    Args:
        labels: A table of labels, for images in no class folders; a lone .csv or .tsv file beside them is found.
        columns: Of the table, for image and class; "" = found by their names.

    Raises:
        ValueError: There are none, or nothing says what they are.
    """
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        return _by_table(path.parent, path, columns)
    if path.is_file():
        raise ValueError(f"{path} is a file; give the folder of images, or of train.zip and val.zip, that it lies in")
    if not path.is_dir():
        raise ValueError(f"no folder {path}{near_path(path)}")
    if labels is not None:
        if not labels.is_file():
            raise ValueError(f"--labels: no file {labels}")
        return _by_table(path, labels, columns)
    if has_lists(path):
        return _as_trained(path, "lists", "lists of images, train.csv and val.csv")
    if any((path / f"{split}.zip").is_file() for split in SPLITS):
        return _as_trained(path, "zip", "zip files")
    if any(path.glob("ILSVRC2011fall_whole_map_*.txt")):
        return _as_trained(path, "imagenet22k", "lists of ImageNet-22K")
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if any(name in SPLITS for name in folders):
        return _by_split(path, folders)
    images = {name: _images_below(path / name) for name in folders if name != "__MACOSX"}
    with_images = [name for name in images if images[name]]
    tables = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in (".csv", ".tsv"))
    if len(tables) == 1 and len(with_images) <= 1:
        return _by_table(path, tables[0], columns)
    if not with_images:
        loose = any(is_image(entry.name) for entry in path.iterdir())
        what = "images in no class folder, and no single table of labels beside them" if loose else "no image"
        raise ValueError(f"{path} has {what}; a folder for each class is needed, or --labels TABLE.csv")
    return _by_class(path, images)


def _as_trained(path: Path, name: DatasetName, layout: str) -> Found:
    """Returns what a data set of training reads; its own sentences say what is wrong."""
    notes, splits = [], dict[str, FileDataset]()
    for split in SPLITS:
        try:
            made = build_dataset(DataConfig(name=name, path=str(path)), split, img_size=(1, 1))
        except ValueError as error:
            if split == "train":
                raise
            notes.append(str(error).removeprefix("data.path: "))
            continue
        assert isinstance(made, FileDataset)
        splits[split] = made
    return Found(path, layout, splits, notes)


def _images_below(folder: Path) -> list[str]:
    walk = sorted(walk_folders(folder))
    return [os.path.join(inside, name) for inside, _, names in walk for name in sorted(names) if is_image(name)]


def _by_split(path: Path, folders: list[str]) -> Found:
    """Returns the images of path/{train,val}/<class>/."""
    notes = [
        f"{path / name} is not read: training reads train/ and val/"
        for name in folders
        if name in _OTHER_NAMES and not (name.startswith("test") and "val" in folders)
    ]
    notes += [f"there is no {path / split}, which training needs" for split in SPLITS if split not in folders]
    of: dict[str, dict[str, list[str]]] = {}
    for split in SPLITS:
        if split in folders:
            inner = [entry.name for entry in (path / split).iterdir() if entry.is_dir() and not is_hidden(entry.name)]
            of[split] = {name: _images_below(path / split / name) for name in sorted(inner)}
            notes += [f"{path / split / name} has no image" for name, images in of[split].items() if not images]
    train = of.get("train", {})
    notes += [
        f"class {name!r} is in val, but not in train" for name in of.get("val", {}) if train and name not in train
    ]
    notes += [f"class {name!r} has no image in val" for name in train if "val" in of and not of["val"].get(name)]
    classes = sorted({name for images in of.values() for name in images})
    splits = {split: _dataset(images, classes, os.path.join(path, split, "")) for split, images in of.items()}
    if not any(len(dataset) for dataset in splits.values()):
        raise ValueError(f"{path}: there is no image in class folders of {' and '.join(of)}")
    return Found(path, "folders of train and val", splits, notes)


def _by_class(path: Path, images: dict[str, list[str]]) -> Found:
    notes = [f"{path / name} has no image" for name, files in images.items() if not files]
    loose = sum(is_image(entry.name) for entry in path.iterdir())
    notes += [f"{loose} images directly in {path} are in no class folder, and are left out"] if loose else []
    notes += [
        f"{path / name} is taken as a class; training reads train/ and val/" for name in images if name in _OTHER_NAMES
    ]
    classes = sorted(name for name, files in images.items() if files)
    return Found(path, "class folders", {"": _dataset(images, classes, os.path.join(path, ""))}, notes)


def _dataset(images: dict[str, list[str]], classes: list[str], folder: str) -> FileDataset:
    number = {name: label for label, name in enumerate(classes)}
    rows = [(file, number[name]) for name, files in sorted(images.items()) for file in files]
    return FileDataset([file for file, _ in rows], [label for _, label in rows], classes, folder=folder)


def _by_table(path: Path, table: Path, columns: tuple[str, str]) -> Found:
    """Returns the images that a table gives a class; those it does not name are counted."""
    rows = _read_table(table)
    at = _columns(table, rows, columns)
    below = {os.path.relpath(file, path): file for file in _images_below(path)}
    by_name: dict[str, list[str]] = {}
    for file in below.values():
        by_name.setdefault(os.path.basename(file), []).append(file)
    images: dict[str, list[str]] = {}
    missing: list[str] = []
    seen: dict[str, str] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) <= max(at) or not row[at[1]].strip():
            raise ValueError(f"{table}: line {number} has no class")
        word, label = row[at[0]].strip(), row[at[1]].strip()
        file = _file_of(word, below, by_name)
        if not file:
            missing.append(word)
        elif file not in seen:
            seen[file] = label
            images.setdefault(label, []).append(file)
        elif seen[file] != label:
            raise ValueError(f"{table}: line {number} calls {word} {label!r}, and a line before it {seen[file]!r}")
    if not images:
        raise ValueError(f"{table}: none of its {len(rows) - 1} images is below {path} (the first: {missing[0]!r})")
    notes = [f"{len(missing)} images of {table} are not there (the first: {missing[0]})"] if missing else []
    idle = len(below) - len(seen)
    notes += [f"{idle} images are not in {table}, and are left out"] if idle else []
    ordered = {name: sorted(files) for name, files in images.items()}
    return Found(
        path,
        f"images with the labels of {table}",
        {"": _dataset(ordered, sorted(images), os.path.join(path, ""))},
        notes,
    )


def _file_of(word: str, below: dict[str, str], by_name: dict[str, list[str]]) -> str:
    """Returns the file a table's word stands for: a path below the folder, or a name that only one file has."""
    for suffix in _SUFFIXES:
        name = os.path.normpath(word + suffix) if word else ""
        if name in below:
            return below[name]
        if len(files := by_name.get(os.path.basename(name), [])) == 1:
            return files[0]
    return ""


def _read_table(table: Path) -> list[list[str]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
        delimiter = "\t" if table.suffix.lower() == ".tsv" else ";" if ";" in text.partition("\n")[0] else ","
        rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is no table of text in UTF-8: {error}") from None
    if len(rows) < 2:
        raise ValueError(f"{table} must have a line of column names and a line for each image")
    return rows


def _columns(table: Path, rows: list[list[str]], wanted: tuple[str, str]) -> tuple[int, int]:
    """Returns the places of the columns of image and class."""
    header = [word.strip() for word in rows[0]]
    places: list[int] = []
    for name, known, option in (
        (wanted[0], _IMAGE_COLUMNS, "--image-column"),
        (wanted[1], _CLASS_COLUMNS, "--class-column"),
    ):
        if name and name not in header:
            raise ValueError(f"{option}: {table} has no column {name!r}; it has {', '.join(header)}")
        names = [name] if name else [word for word in header if word.lower() in known]
        names = sorted(names, key=lambda word: known.index(word.lower()) if word.lower() in known else 0)
        if not names and len(header) == 2:  # the other one
            names = [header[1 - places[0]]] if places else [header[0]] if header[1].lower() in _CLASS_COLUMNS else []
        if not names:
            raise ValueError(f"{table} has the columns {', '.join(header)}; say with {option} which one is meant")
        places.append(header.index(names[0]))
    return places[0], places[1]
