"""Prediction: `swin-moe predict CONFIG [key=value ...] IMAGE ...` prints what is in each image."""

import argparse
import contextlib
import csv
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from swin_moe.config import Config
from swin_moe.config.arguments import near_path, shortened
from swin_moe.config.mistaken import belongs, is_run
from swin_moe.data.datasets import build_dataset
from swin_moe.data.pixels import BrokenImage, opened, unreadable
from swin_moe.data.transforms import build_transform
from swin_moe.engine.graphs import check_graphs, with_graphs
from swin_moe.engine.precision import autocast
from swin_moe.names.files import IMAGE_SUFFIXES
from swin_moe.predict.pixels import PixelOptions, predict_pixels
from swin_moe.run.counter import Counter
from swin_moe.run.session import Session, build_classifier, open_session, parse_arguments
from swin_moe.tasks.base import build_task
from swin_moe.tasks.dense import LooksAtImages
from swin_moe.usage.texts import PREDICT
from swin_moe.weights.load import load_weights, open_stored
from swin_moe.weights.sources import Source, is_own

OPTIONS = ("--top", "--json", "--csv", "--batch", "--names", "--out", "--score")
_BATCH, _TOP, _SCORE = 16, 5, 0.3  # where the options say nothing
_READERS = 4  # threads that read and decode; Pillow lets others run meanwhile


def main(argv: list[str]) -> None:
    """Prints class probabilities for image files, or draws what is found in them."""
    path, rest = parse_arguments(argv, PREDICT, OPTIONS)
    words, options = _parse_options(rest)
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]
    images = _image_files([word for word in words if word not in overrides], path)
    session = open_session(path, overrides)
    if session.world_size > 1:
        raise ValueError(f"predict runs in one process, got {session.world_size} ranks; start it without a launcher")
    check_graphs(session.config, session.device.type, session.world_size)
    session, stored, classes = with_classes(session, options.names)
    task = build_task(session.config)
    if not isinstance(task, LooksAtImages):
        _refuse(options, "out", "score", of="networks that find objects or label maps, and this one classifies")
        _predict_classes(session, images, classes, options, stored)
        return
    _refuse(options, "csv", "batch", "top", of="networks that classify; objects are in predictions.json")
    if session.config.task.name == "segment":
        _refuse(options, "score", of="detectors, and this network gives every pixel a class")
    score = _SCORE if options.score is None else options.score
    pixels = PixelOptions(Path(options.out or "predictions"), score, options.json)
    predict_pixels(session, task, images, classes, pixels, stored)


def _refuse(options: argparse.Namespace, *names: str, of: str) -> None:
    """Raises ValueError for options that were given and would have no effect."""
    given = [f"--{name}" for name in names if getattr(options, name) not in (None, False)]
    if given:
        raise ValueError(f"predict: {' and '.join(given)} {'is' if len(given) == 1 else 'are'} for {of}")


def with_classes(session: Session, names: str = "") -> tuple[Session, Source | None, Sequence[str]]:
    """Returns (the session with as many classes as its checkpoint, the checkpoint or None, a name per output).

    Args:
        names: A file of class names that count instead of the checkpoint's; "" = none.

    Raises:
        ValueError: No checkpoint where one is named, or names that do not fit.
    """
    stored = open_stored(session)
    if session.config.data.count_classes and stored is not None and stored.classes:
        model = replace(session.config.model, num_classes=len(stored.classes))
        session = replace(session, config=replace(session.config, model=model))
    return session, stored, _class_names(session.config, names, () if stored is None else stored.classes)


def _predict_classes(
    session: Session, images: Sequence[str], classes: Sequence[str], options: argparse.Namespace, stored: Source | None
) -> None:
    """Prints the most likely classes of every image.

    Raises:
        ValueError: Some images cannot be read, after all others were printed; not with data.on_broken=skip.
    """
    config = session.config
    model = build_classifier(session)
    print(f"weights: {load_weights(model, session, stored)}", file=sys.stderr)
    dtype = next(model.parameters()).dtype
    graphed = with_graphs(model.eval(), config)
    write, counter = _writer(options), Counter("images", len(images))
    broken: list[BrokenImage] = []
    top, batch = options.top or _TOP, options.batch or (1 if _shares_capacity(config) else _BATCH)
    for done, names, pixels in _batches(config, images, batch, broken):
        if names:
            with torch.inference_mode(), autocast(config.engine.precision, session.device):
                output = graphed(torch.stack(pixels).to(session.device, dtype))
            logits = output[0] if isinstance(output, tuple) else output
            best = logits.float().softmax(1).topk(min(top, logits.shape[1]))
            counter.clear()
            for name, shares, labels in zip(names, best.values.tolist(), best.indices.tolist()):
                write(name, [(classes[label], share) for label, share in zip(labels, shares)])
        counter(done)
    counter.clear()
    if broken and config.data.on_broken != "skip":
        raise ValueError(unreadable(broken, len(images)))


def _shares_capacity(config: Config) -> bool:
    """Returns whether what is said of an image may depend on others of its batch: they compete for experts."""
    moe = config.model.moe
    return moe.has_blocks and (moe.choice != "token" or moe.eval_factor != 0)


def _batches(
    config: Config, images: Sequence[str], size: int, broken: list[BrokenImage]
) -> Iterator[tuple[int, list[str], list[Tensor]]]:
    """Yields (images done after it, names, pixels) of up to `size` images that can be read; others go to `broken`.

    The next batch is read while one is computed.
    """
    transform = build_transform(config.data, config.model.img_size, train=False)

    def prepare(name: str) -> Tensor | BrokenImage:
        image = opened(name, exif=config.data.exif)
        return image if isinstance(image, BrokenImage) else transform(image, 0)

    with ThreadPoolExecutor(_READERS) as readers:

        def submit(start: int) -> list[Future[Tensor | BrokenImage]]:
            return [readers.submit(prepare, name) for name in images[start : start + size]]

        ahead = submit(0)
        for start in range(0, len(images), size):
            results = [future.result() for future in ahead]
            ahead = submit(start + size)
            names, pixels = [], []
            for name, result in zip(images[start : start + size], results):
                if isinstance(result, BrokenImage):
                    broken.append(result)
                    if len(images) > 1:
                        print(result, file=sys.stderr)
                else:
                    names.append(name)
                    pixels.append(result)
            yield start + len(results), names, pixels


def _writer(options: argparse.Namespace) -> Callable[[str, list[tuple[str, float]]], None]:
    """Returns what prints the classes of an image, as the options ask for."""
    if options.csv:
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(("image", "rank", "class", "probability"))
        return lambda name, found: table.writerows((name, k, c, f"{p:.6g}") for k, (c, p) in enumerate(found, 1))
    if options.json:
        return lambda name, found: print(
            json.dumps({"image": name, "classes": [{"name": c, "probability": p} for c, p in found]}), flush=True
        )
    return lambda name, found: print(f"{name}: {', '.join(f'{c} {p:.1%}' for c, p in found)}", flush=True)


def _parse_options(words: list[str]) -> tuple[list[str], argparse.Namespace]:
    """Returns (the other words, options)."""
    parser = argparse.ArgumentParser("swin-moe predict", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--top", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--names", default="")
    parser.add_argument("--out")
    parser.add_argument("--score", type=float)
    try:
        options, others = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(f"predict: {shortened(str(error))}") from None
    if options.json and options.csv:
        raise ValueError("predict: --json and --csv are two ways to print it; give one")
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"predict: --batch must be >= 1, got {options.batch}")
    if options.top is not None and options.top < 1:
        raise ValueError(f"predict: --top must be >= 1, got {options.top}")
    if options.out == "":
        raise ValueError("predict: --out must name a folder, got ''")
    if options.score is not None and not 0 <= options.score <= 1:
        raise ValueError(f"predict: --score must be in [0, 1], got {options.score}")
    return others, options


def _image_files(words: list[str], network: str) -> list[str]:
    """Returns the files named, and those with an image's suffix below the folders named or that a pattern fits.

    network: What stands before them, for errors.

    Raises:
        ValueError: There is none, or a name is neither a file nor a folder with images.
    """
    found: list[str] = []
    named = [name for word in words for name in (_listed_on_input() if word == "-" else [word])]
    for word in named:
        if word and Path(word).is_dir():  # Path("") would be the folder we are in
            below = (os.path.join(folder, name) for folder, _, names in sorted(os.walk(word)) for name in sorted(names))
            inside = [name for name in below if name.lower().endswith(IMAGE_SUFFIXES)]
            if is_run(Path(word)) and not is_run(Path(network)) and belongs(network):
                raise ValueError(f"{word} is a run and comes first: swin-moe predict {word} {network}")
            if not inside:
                raise ValueError(f"no image below the folder {word} ({', '.join(IMAGE_SUFFIXES)})")
            found += inside
        elif Path(word).is_file():
            found.append(word)
        elif matches := sorted(name for name in glob.glob(word, recursive=True) if _is_image(name)):
            found += matches
        else:
            raise ValueError(f"no such image file: {word or repr(word)}{near_path(word)}")
    if not found:
        if clause := "" if is_run(Path(network)) else belongs(network):
            raise ValueError(f"predict needs a run or a config before the images: {network}{clause}")
        raise ValueError(
            f"predict needs at least one image file, or a folder of them: swin-moe predict {network} IMAGE"
        )
    return found


def _listed_on_input() -> list[str]:
    """Returns the paths on standard input, one a line, or with NUL between them as `find -print0` writes."""
    try:
        text = sys.stdin.read() if sys.stdin is not None else ""  # closed by `<&-`
    except UnicodeDecodeError:
        raise ValueError("predict -: standard input is no text; one path a line is read") from None
    found = [name for name in (text.split("\0") if "\0" in text else text.splitlines()) if name]
    if not found:
        raise ValueError("predict -: standard input has no path; one a line is read")
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
