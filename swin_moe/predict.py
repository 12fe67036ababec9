"""Prediction: `swin-moe predict CONFIG [key=value ...] IMAGE ...` prints what is in each image."""

import argparse
import contextlib
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from swin_moe.config import Config
from swin_moe.data.datasets import IMAGE_SUFFIXES, build_dataset
from swin_moe.data.pixels import decode, read_image
from swin_moe.data.transforms import build_transform
from swin_moe.engine.graphs import check_graphs, with_graphs
from swin_moe.engine.precision import autocast
from swin_moe.predict_pixels import PixelOptions, predict_pixels
from swin_moe.run.session import build_classifier, open_session, parse_arguments, run_main
from swin_moe.tasks.base import build_task
from swin_moe.tasks.dense import LooksAtImages
from swin_moe.weights.load import load_weights, open_stored
from swin_moe.weights.sources import is_own

USAGE = """usage: swin-moe predict CONFIG [checkpoint.load=PATH] [key=value ...] [--top N] [--json] [--names FILE]
       [--out FOLDER] [--score S] IMAGE|FOLDER|GLOB ...

Prints the N (5) most likely classes and their probabilities for every image file, and for every image below a folder;
with --json one object per line. Class names are the checkpoint's; those of an official file are numbers unless FILE
names them, one a line. No training data is needed.

Detectors and segmentation networks draw what they find over the images, into FOLDER (predictions): objects with a score
of at least S (0.3), which predictions.json has as COCO's rows, and a class per pixel, as IMAGE_labels.png."""
OPTIONS = ("--top", "--json", "--names", "--out", "--score")


def main(argv: list[str]) -> None:
    """Prints class probabilities for image files, or draws what is found in them."""
    path, rest = parse_arguments(argv, USAGE, OPTIONS)
    words, options = _parse_options(rest)
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]
    images = _image_files([word for word in words if word not in overrides])
    session = open_session(path, overrides)
    if session.world_size > 1:
        raise ValueError(f"predict runs in one process, got {session.world_size} ranks; start it without a launcher")
    config = session.config
    check_graphs(config, session.device.type, session.world_size)
    stored = open_stored(session)
    classes = _class_names(config, options.names, () if stored is None else stored.classes)
    task = build_task(config)
    if isinstance(task, LooksAtImages):
        pixels = PixelOptions(Path(options.out), options.score, options.json)
        predict_pixels(session, task, images, classes, pixels, stored)
        return
    model = build_classifier(session)
    print(f"weights: {load_weights(model, session, stored)}", file=sys.stderr)
    transform = build_transform(config.data, config.model.img_size, train=False)
    dtype = next(model.parameters()).dtype
    graphed = with_graphs(model.eval(), config)
    for name in images:
        image = transform(decode(read_image(name), name, exif=config.data.exif), 0).to(session.device, dtype)
        with torch.inference_mode(), autocast(config.engine.precision, session.device):
            output = graphed(image[None])
        logits = output[0] if isinstance(output, tuple) else output
        best = logits.float().softmax(1)[0].topk(min(options.top, logits.shape[1]))
        found = [(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist())]
        if options.json:
            print(json.dumps({"image": name, "classes": [{"name": c, "probability": p} for c, p in found]}))
        else:
            print(f"{name}: {', '.join(f'{c} {p:.1%}' for c, p in found)}")


def _parse_options(words: list[str]) -> tuple[list[str], argparse.Namespace]:
    """Returns (the other words, options)."""
    parser = argparse.ArgumentParser("swin-moe predict", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--names", default="")
    parser.add_argument("--out", default="predictions")
    parser.add_argument("--score", type=float, default=0.3)
    try:
        options, others = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(f"predict: {error}") from None
    if options.top < 1:
        raise ValueError(f"predict: --top must be >= 1, got {options.top}")
    if not 0 <= options.score <= 1:
        raise ValueError(f"predict: --score must be in [0, 1], got {options.score}")
    return others, options


def _image_files(words: list[str]) -> list[str]:
    """Returns the files named, and those with an image's suffix below the folders named or that a pattern fits.

    Raises:
        ValueError: There is none, or a name is neither a file nor a folder with images.
    """
    found: list[str] = []
    for word in words:
        if word and Path(word).is_dir():  # Path("") would be the folder we are in
            below = (os.path.join(folder, name) for folder, _, names in sorted(os.walk(word)) for name in sorted(names))
            inside = [name for name in below if name.lower().endswith(IMAGE_SUFFIXES)]
            if not inside:
                raise ValueError(f"no image below the folder {word} ({', '.join(IMAGE_SUFFIXES)})")
            found += inside
        elif Path(word).is_file():
            found.append(word)
        elif matches := sorted(name for name in glob.glob(word, recursive=True) if _is_image(name)):
            found += matches
        else:
            raise ValueError(f"no such image file: {word or repr(word)}")
    if not found:
        raise ValueError("predict needs at least one image file, or a folder of them, after the config")
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(name)


def _class_names(config: Config, file: str, names: Sequence[str]) -> Sequence[str]:
    """Returns a name per output: of the file, the checkpoint, the data set if an older one has none, or numbers.

    names: The checkpoint's; () where it has none.

    Raises:
        ValueError: The file has another number of names than the network has outputs.
    """
    outputs = config.model.num_classes
    if file:
        if not Path(file).is_file():
            raise ValueError(f"--names {file}: no such file")
        try:
            names = tuple(Path(file).read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError:
            raise ValueError(f"--names {file}: is no text of UTF-8, a name a line") from None
        if len(names) != outputs:
            raise ValueError(f"--names {file} has {len(names)} names, the network {outputs} outputs")
        return names
    if not names and (not config.checkpoint.load or is_own(Path(config.checkpoint.load))):
        with contextlib.suppress(ValueError):  # a checkpoint of an older version, away from its data: numbers
            names = build_dataset(config.data, "val", img_size=config.model.img_size, num_classes=outputs).classes
    return tuple(names) + tuple(str(label) for label in range(len(names), outputs))


if __name__ == "__main__":
    run_main(main)
