"""Images per second of the data pipelines of detection and segmentation, by loader processes.

    python benchmarks/training/dense_data.py [--steps 40]

Made-up photographs of COCO's and ADE20K's sizes (JPEG files of smoothed noise, objects with polygons of 40 corners) go
through the official augmentations, canvases through theirs. Processor time per image says what one loader process can
give; images per second are what all of them gave on this machine while nothing else was done with them.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.config.options.dense_data import DenseDataConfig
from swin_moe.data.loader import TrainLoader

OBJECTS, CORNERS, CLASSES = 7, 40, 80  # of an image, as COCO has on average
DETECTION: Mapping[str, Any] = {"short": tuple(range(480, 801, 32)), "crop_short": (400, 500, 600), "antialias": False}
SEGMENTATION: Mapping[str, Any] = {
    "short": (512,),
    "long": 2048,
    "ratio": (0.5, 2.0),
    "crop": (512, 512),
    "distort": True,
    "antialias": False,
}


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Returns smooth noise, which a JPEG file holds in about as many bytes as a photograph."""
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_coco(root: Path, images: int) -> None:
    """Writes a COCO json and its JPEG files, 640 x 480."""
    rng, height, width = np.random.default_rng(0), 480, 640
    (root / "train").mkdir(parents=True)
    tree: dict[str, list[dict]] = {"images": [], "annotations": [], "categories": []}
    tree["categories"] = [{"id": number + 1, "name": f"class {number}"} for number in range(CLASSES)]
    for index in range(images):
        photograph(rng, height, width).save(root / "train" / f"{index}.jpg", quality=90)
        tree["images"].append({"id": index, "file_name": f"{index}.jpg", "height": height, "width": width})
        for _ in range(OBJECTS):
            x, y, radius = rng.uniform(60, 580), rng.uniform(60, 420), rng.uniform(10, 60)
            angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
            points = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1).round(2)
            row: dict[str, Any] = {
                "id": len(tree["annotations"]) + 1,
                "image_id": index,
                "category_id": int(rng.integers(1, CLASSES + 1)),
            }
            row |= {"segmentation": [points.ravel().tolist()], "area": 3.14 * radius**2, "iscrowd": 0}
            tree["annotations"].append(row | {"bbox": [x - radius, y - radius, 2 * radius, 2 * radius]})
    (root / "train.json").write_text(json.dumps(tree))


def write_label_maps(root: Path, images: int) -> None:
    """Writes JPEG images of 683 x 512 with label maps of 150 classes."""
    rng = np.random.default_rng(0)
    for folder in ("images/training", "annotations/training"):
        (root / folder).mkdir(parents=True)
    for index in range(images):
        photograph(rng, 512, 683).save(root / "images/training" / f"{index}.jpg", quality=90)
        blocks = Image.fromarray(rng.integers(0, 151, (8, 11), dtype=np.uint8))
        blocks.resize((683, 512), Image.Resampling.NEAREST).save(root / "annotations/training" / f"{index}.png")


def cases(root: Path, images: int) -> dict[str, tuple[DataConfig, dict[str, bool]]]:
    """Returns name -> (config, needs of the task)."""
    write_coco(root / "coco", images)
    write_label_maps(root / "ade", images)
    coco = DenseDataConfig(**DETECTION)
    ade = DenseDataConfig(reduce_zero_label=True, **SEGMENTATION)
    boxes, maps = {"boxes": True, "label_maps": False}, {"boxes": False, "label_maps": True}
    coco_data = DataConfig(name="coco", path=str(root / "coco"), global_batch=2, dense=coco)
    ade_data = DataConfig(name="label_maps", path=str(root / "ade"), global_batch=2, dense=ade)
    return {
        "canvases 64 x 64": (DataConfig(name="canvases", global_batch=4), boxes),
        "COCO, masks, 3x": (coco_data, boxes),
        "ADE20K, 512 x 512": (ade_data, maps),
    }


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(config: DataConfig, needs: dict[str, bool], *, workers: int, steps: int) -> tuple[float, float]:
    """Returns (images per second of wall clock, CPU seconds per image) of a loader alone."""
    config = replace(config, workers=workers)
    loader = TrainLoader(
        config,
        64,
        seed=0,
        rank=0,
        world_size=1,
        micro_batch=config.global_batch,
        accumulation=1,
        num_classes=150,
        **needs,
    )
    images, seconds, cpu = 0, 0.0, 0.0
    with loader:
        for step, batches in enumerate(loader.batches(0, steps + 1)):
            if step == 0:  # processes have started
                started, cpu = time.monotonic(), _cpu_seconds()
                continue
            images += len(batches.batches[0]["image"])
            seconds = time.monotonic() - started
    return images / seconds, (_cpu_seconds() - cpu) / images


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args()
    print("| data | workers | images/s | CPU ms per image |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, needs) in cases(Path(folder), options.images).items():
            for workers in (0, 2):
                rate, seconds = measure(config, needs, workers=workers, steps=options.steps)
                print(f"| {name} | {workers} | {rate:.1f} | {1000 * seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
