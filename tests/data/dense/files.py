"""Small data sets on disk that tests of dense data read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swin_moe.config import DataConfig, DatasetName
from swin_moe.config.options.dense_data import DenseDataConfig
from swin_moe.data.dense.canvases import Canvases


def dense(name: DatasetName = "canvases", path: object = "", *, data: dict | None = None, **options: Any) -> DataConfig:
    """Returns the config of dense data with these options of data.dense; `data`: of data itself."""
    return DataConfig(name=name, path=str(path), dense=DenseDataConfig(**options), **(data or {}))


def write_coco(root: Path, *, images: int = 6, split: str = "train", ids: tuple[int, ...] = (), **options: Any) -> dict:
    """Writes canvases as a COCO json and PNG images; returns the json's tree. ids: Category ids of the ten digits."""
    canvases = Canvases(dense(**options), split)
    category = ids or tuple(range(1, 11))
    folder = root / split
    folder.mkdir(parents=True)
    tree: dict[str, list[dict]] = {"images": [], "annotations": [], "categories": []}
    for index in range(images):
        sample = canvases.dense_sample(index)
        sample.image.save(folder / f"{index}.png")
        height, width = sample.size
        tree["images"].append({"id": 10 + index, "file_name": f"{index}.png", "height": height, "width": width})
        for row in canvases.truth(index):
            assert row["segmentation"] is not None
            rle = {"size": row["segmentation"]["size"], "counts": row["segmentation"]["counts"].decode()}
            label = category[row["category_id"]]
            tree["annotations"].append({**row, "category_id": label, "image_id": 10 + index, "segmentation": rle})
    tree["categories"] = [{"id": number, "name": name} for number, name in zip(category, canvases.classes)]
    save(root, tree, split)
    return tree


def save(root: Path, tree: dict, split: str = "train") -> None:
    """Writes the json of write_coco anew."""
    (root / f"{split}.json").write_text(json.dumps(tree))


def write_label_maps(root: Path, *, images: int = 4, shift: int = 0, options: dict | None = None) -> None:
    """Writes canvases of both splits in ADE20K's layout; shift: What is added to the numbers of classes."""
    for split, name in (("train", "training"), ("val", "validation")):
        canvases = Canvases(dense(**(options or {})), split)
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True)
        for index in range(images):
            sample = canvases.dense_sample(index)
            sample.image.save(root / "images" / name / f"{index}.png")
            assert sample.label_map is not None
            numbers = (sample.label_map + shift).astype(np.uint8)
            Image.fromarray(numbers).save(root / "annotations" / name / f"{index}.png")
