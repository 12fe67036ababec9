"""What `swin-moe predict` does with a task that looks at pixels: pictures, a COCO json of objects, PNG label maps."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from swin_moe.config import Config
from swin_moe.data.batch import Batch, to_device
from swin_moe.data.dense.augment import build_planner
from swin_moe.data.dense.collate import collate, padded_size
from swin_moe.data.dense.loader import build_dense_dataset
from swin_moe.data.dense.masks import rle_area, rles_of
from swin_moe.data.dense.sample import DenseSample
from swin_moe.data.pixels import BrokenImage, opened, unreadable
from swin_moe.engine.precision import autocast
from swin_moe.run.session import Session, build_local_model
from swin_moe.tasks.base import StepContext, Task
from swin_moe.tasks.dense import Found, LooksAtImages
from swin_moe.tasks.drawing import colour_of, draw
from swin_moe.weights.load import load_weights
from swin_moe.weights.sources import Source


@dataclass(frozen=True)
class PixelOptions:
    """out: Folder that pictures and files go to. threshold: Lowest score of an object that is kept."""

    out: Path
    threshold: float
    json: bool


def predict_pixels(
    session: Session,
    task: Task,
    images: Sequence[str],
    names: Sequence[str],
    options: PixelOptions,
    stored: Source | None,
) -> None:
    """Draws and stores what the task finds in every image file, and prints a line for each.

    Raises:
        ValueError: Some images cannot be read, after all others were looked at; not with data.on_broken=skip.
    """
    assert isinstance(task, LooksAtImages)
    config = session.config
    model = build_local_model(session, task)
    print(f"weights: {load_weights(model, session, stored)}", file=sys.stderr)
    model.eval()
    context = StepContext(config, 0, 1, 0, lambda: autocast(config.engine.precision, session.device))
    out, objects = _Output(options, names, _category_ids(config, names)), 0
    broken: list[BrokenImage] = []
    for number, name in enumerate(images, 1):
        image = opened(name, exif=config.data.exif)
        if isinstance(image, BrokenImage):
            broken.append(image)
            if len(images) > 1:
                print(image, file=sys.stderr)
            continue
        batch = to_device(batch_of(config, image, number), session.device, config.engine.precision)
        with torch.inference_mode():
            (found,) = task.look(model, batch, context)
        objects += out.add(number, name, image, found)
    out.close()
    seen = len(images) - len(broken)
    print(f"{seen} images{f', {objects} objects' if out.has_objects else ''}: {options.out}", file=sys.stderr)
    if broken and config.data.on_broken != "skip":
        raise ValueError(unreadable(broken, len(images)))


def batch_of(config: Config, image: Image.Image, image_id: int) -> Batch:
    """Returns one image, resized and padded as evaluation does, as a batch without its truth."""
    sample = DenseSample(image, image_id, (image.height, image.width))
    sample = build_planner(config.data, train=False)(image.height, image.width, 0).apply(sample)
    size = padded_size(np.asarray([sample.size]), config.data.dense.divisor)
    fields: dict[str, Any] = collate([sample], size, boxes=False, label_maps=False)
    return cast(Batch, fields | {"sample": torch.zeros(1, dtype=torch.int64), "epoch": 0, "step": 0})


def _category_ids(config: Config, names: Sequence[str]) -> list[int]:
    """Returns the data's own number of every class, where the data is there and has all of them, or 1, 2, ..."""
    with contextlib.suppress(ValueError, OSError):
        dataset = build_dense_dataset(config.data, "val", boxes=True, label_maps=False)
        own = dict(zip(dataset.classes, dataset.category_ids))
        return [own[name] for name in names] if own.keys() >= set(names) else list(range(1, len(names) + 1))
    return list(range(1, len(names) + 1))


class _Output:
    """The files of a call: <image>.png drawn, <image>_labels.png, predictions.json."""

    def __init__(self, options: PixelOptions, names: Sequence[str], category_ids: Sequence[int]) -> None:
        self._options, self._names, self._ids = options, names, category_ids
        self._images: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self.has_objects = False
        self._taken: set[str] = set()
        options.out.mkdir(parents=True, exist_ok=True)

    def add(self, number: int, name: str, image: Image.Image, found: Found) -> int:
        """Stores what was found in an image and prints a line about it; returns its objects."""
        stem = self._stem(Path(name).stem)
        drawn = draw(np.asarray(image), found, self._names, threshold=self._options.threshold)
        Image.fromarray(drawn).save(self._options.out / f"{stem}.png")
        self._images.append({"id": number, "file_name": name, "height": image.height, "width": image.width})
        rows = self._objects(number, found)
        self._rows += rows
        shares = self._store_map(stem, found)
        if self._options.json:
            said = [{"name": row.pop("name"), "box": row["bbox"], "score": row["score"]} for row in rows]
            print(json.dumps({"image": name} | ({"objects": said} if self.has_objects else {}) | shares))
        else:
            words = [f"{row.pop('name')} {row['score']:.2f}" for row in rows]
            parts = [f"{key} {share:.1%}" for key, share in shares.get("classes", {}).items()]
            print(f"{name}: {', '.join(words + parts) or 'nothing'}")
        return len(rows)

    def _stem(self, stem: str) -> str:
        """Returns a name of files that no image before has taken: those of two folders may be called alike."""
        taken, number = stem, 2
        while taken in self._taken:
            taken, number = f"{stem}_{number}", number + 1
        self._taken.add(taken)
        return taken

    def _objects(self, number: int, found: Found) -> list[dict[str, Any]]:
        if found.boxes is None or found.scores is None or found.labels is None:
            return []
        self.has_objects = True
        kept = found.scores >= self._options.threshold
        rles = [] if found.masks is None else rles_of(found.masks[kept].cpu().numpy())
        rows: list[dict[str, Any]] = []
        corners, scores, labels = (value[kept].tolist() for value in (found.boxes, found.scores, found.labels))
        for place, ((x1, y1, x2, y2), score, label) in enumerate(zip(corners, scores, labels)):
            row = {
                "id": len(self._rows) + place + 1,
                "image_id": number,
                "category_id": self._ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "score": score,
                "name": self._names[label],
            }
            if rles:
                rle = rles[place]
                row |= {"segmentation": {**rle, "counts": rle["counts"].decode()}, "area": float(rle_area(rle))}
            rows.append(row)
        return rows

    def _store_map(self, stem: str, found: Found) -> dict[str, Any]:
        """Stores a label map, numbers with a palette, and returns the share of every class in it, largest first."""
        if found.label_map is None:
            return {}
        numbers = found.label_map.cpu().numpy().astype(np.uint8)
        image = Image.fromarray(numbers).convert("P")
        image.putdata(numbers.ravel().tolist())
        image.putpalette([part for label in range(256) for part in colour_of(label)])
        image.save(self._options.out / f"{stem}_labels.png")
        count = np.bincount(numbers.ravel(), minlength=len(self._names))
        shares = {self._names[label]: float(count[label] / count.sum()) for label in np.argsort(-count, kind="stable")}
        return {"classes": {name: share for name, share in shares.items() if share > 0}}

    def close(self) -> None:
        """Writes the json, where objects were asked for."""
        if not self.has_objects:
            return
        categories = [{"id": number, "name": name} for number, name in zip(self._ids, self._names)]
        tree = {"images": self._images, "annotations": self._rows, "categories": categories}
        (self._options.out / "predictions.json").write_text(json.dumps(tree))
