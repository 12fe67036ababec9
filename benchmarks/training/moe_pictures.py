"""Draws the pictures of docs/moe_explained.md from a run with experts, its checkpoint and its records.

python benchmarks/training/moe_pictures.py output/moe-short docs/images
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.data.datasets import build_dataset
from swin_moe.demo.draw import experts
from swin_moe.demo.look import Observer
from swin_moe.demo.networks import open_network
from swin_moe.report.charts import layer_figures
from swin_moe.report.records import read_runs

DIGITS = (0, 1, 2, 3)  # places among the validation images


def stacked(pictures: list[Image.Image], gap: int = 8) -> Image.Image:
    """Returns pictures one below the other, on white."""
    size = max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap
    canvas, y = Image.new("RGB", size, (255, 255, 255)), 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height + gap
    return canvas


def patches(run: Path) -> Image.Image:
    """Returns a row per digit: the image, and which expert took which patch in each MoE layer."""
    observer = Observer(open_network(str(run)))
    size = observer.network.backbone.config.img_size
    digits = build_dataset(DataConfig(name="digits"), "val", img_size=size, num_classes=10)
    rows = []
    for place in DIGITS:
        image = digits.sample(place)[0]
        row = experts(observer.look(image))
        assert row is not None, "the run has MoE layers"
        rows.append(row)
    return stacked(rows)


def loads(run: Path) -> Image.Image:
    """Returns the heat map of every MoE layer: tokens of each expert over the steps."""
    figures = [f for f in layer_figures(read_runs([str(run)])[0]) if f.name.endswith("load")]
    return stacked([figure.picture for figure in figures])


def main() -> None:
    """Writes moe_patches.png and moe_load.png, in few colours so that they are small."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    for name, picture in (("moe_patches", patches(options.run)), ("moe_load", loads(options.run))):
        target = options.out / f"{name}.png"
        picture.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)
        print(f"{target}: {np.asarray(picture).shape[1]} x {np.asarray(picture).shape[0]} pixels")


if __name__ == "__main__":
    main()
