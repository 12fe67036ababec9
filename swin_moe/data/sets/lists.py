"""Images named in tables, train.csv and val.csv, as `swin-moe data split` writes them: nothing is moved or linked."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from swin_moe.config import DataConfig
from swin_moe.data.datasets import FileDataset, class_labels, require_directory

COLUMNS = ("image", "class")


def write_list(file: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Writes (image, class) rows under their header; images by paths relative to the table's folder, or absolute."""
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def read_list(file: Path) -> tuple[list[str], list[str]]:
    """Returns (paths as they are written, class names).

    Raises:
        ValueError: It is no such table, or lists nothing; names the line.
    """
    paths, classes = [], []
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
        reader = csv.reader(lines)
        try:
            header = next(reader, None)
            if header is None or [word.strip().lstrip("\ufeff") for word in header] != list(COLUMNS):
                raise ValueError(f"data.path: {file} must begin with the line {','.join(COLUMNS)}")
            for row in reader:
                if not row:
                    continue
                if len(row) != 2 or not row[0] or not row[1]:
                    raise ValueError(f"data.path: line {reader.line_num} of {file} must be an image and its class")
                paths.append(row[0])
                classes.append(row[1])
        except csv.Error as error:
            raise ValueError(f"data.path: line {reader.line_num} of {file}: {error}") from None
    if not paths:
        raise ValueError(f"data.path: {file} lists no image")
    return paths, classes


class ImageLists(FileDataset):
    """data.path/{train,val}.csv, image and class a line; classes are numbered in the order of their names in train."""

    def __init__(self, config: DataConfig, split: str) -> None:
        root = Path(config.path)
        require_directory(root, "directory")
        file, train = root / f"{split}.csv", root / "train.csv"
        if not file.is_file():
            raise ValueError(f"data.path: no table {file}")
        paths, names = read_list(file)
        known = sorted(set(names if split == "train" or not train.is_file() else read_list(train)[1]))
        numbers = class_labels(sorted(set(names)), known, where=file, train=train)
        super().__init__(paths, [numbers[name] for name in names], known)
        self._root = config.path

    def path(self, index: int) -> str:
        """Returns the path of the file."""
        return os.path.join(self._root, self._paths[index])
