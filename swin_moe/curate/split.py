"""One set of images into train and val: the same files in each, wherever and however often it is done."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from swin_moe.curate.find import Found
from swin_moe.data.sets.lists import write_list

How = Literal["lists", "links", "copies"]


def in_val(names: Sequence[str], labels: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Returns (N,) bool, which images are for validation: of every class its share, to the nearest image.

    Within a class those come first whose BLAKE2b digest of seed and name is lowest, so it depends on neither the order
    nor the place of the files; a class of two images or more has at least one on either side.

    Args:
        names: Of the images, below their folder, with "/"; each once.
        share: Of a class, in (0, 1).
    """
    key = np.asarray([_number(name, seed) for name in names], dtype=np.uint64)
    order = np.lexsort((key, labels))
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    wanted = np.clip(np.floor(count * share + 0.5), 1, np.maximum(count - 1, 1)) * (count > 1)
    place = np.arange(len(order)) - np.repeat(start, count)
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order] = place < np.repeat(wanted, count)
    return chosen


def split(
    found: Found,
    out: Path,
    *,
    share: float,
    seed: int,
    how: How = "lists",
    shrink: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, int]:
    """Returns split -> its images, after writing them below `out`, whole or not at all; the images stay as they are.

    lists are train.csv and val.csv, with paths relative to `out`; links and copies are train/<class>/ and val/<class>/.
    Training reads all of them with data.name=folder data.path=OUT.

    Args:
        shrink: Pixels, of copies: images with a longer shorter side are written again at that one. 0 = as they are.

    Raises:
        ValueError: They are split already, `out` is there or among them, or a class has a name that no folder can have.
        OSError: It cannot be written.
    """
    if list(found.splits) != [""]:
        raise ValueError(f"{found.path} is split already ({found.layout}); give the folder of one part, such as train")
    if out.resolve().is_relative_to(Path(found.path).resolve()):
        raise ValueError(
            f"--out {out} lies in {found.path}, where it would be a class of its own; choose another place"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already; choose another, or remove it")
    if how != "lists":
        for name in found.classes:
            if name in (".", "..") or "/" in name or "\0" in name:
                raise ValueError(f"class {name!r} cannot be the name of a folder; use --how lists")
    dataset = found.splits[""]
    paths = [dataset.path(index) for index in range(len(dataset))]
    names = [os.path.relpath(path, found.path).replace(os.sep, "/") for path in paths]
    for_val = in_val(names, dataset.labels(), share=share, seed=seed)
    rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "val": []}
    for path, name, label, is_val in zip(paths, names, dataset.labels(), for_val):
        rows["val" if is_val else "train"].append((path, name, found.classes[label]))
    if not rows["val"]:
        raise ValueError(f"{found.path}: every class has a single image, so there is nothing for validation")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write(partial, out, rows, how, shrink, progress)
        if out.exists():
            out.rmdir()  # it is empty
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {part: len(images) for part, images in rows.items()}


def _number(name: str, seed: int) -> int:
    text = f"{seed}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def copy_smaller(source: str | Path, target: Path, pixels: int) -> None:
    """Writes an image with a shorter side of at most so many pixels, in its own format; its EXIF (orientation) and
    colour profile stay. What is small already, is broken, or has more than one frame or 8 bits is copied as it is.

    A camera's JPEG of 12 megapixels takes a tenth of a second to decode, in every epoch; as 256 pixels 2 ms.
    """
    try:
        with Image.open(source) as image:
            factor = pixels / min(image.size)
            if factor < 1 and image.mode in ("L", "RGB", "RGBA") and getattr(image, "n_frames", 1) == 1:
                size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
                kept = {key: image.info[key] for key in ("exif", "icc_profile") if image.info.get(key)}
                quality = {"quality": 92} if image.format in ("JPEG", "WEBP") else {}
                small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
                small.save(target, format=image.format, **kept, **quality)
                return
    except (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError):
        target.unlink(missing_ok=True)  # `data check` says what is wrong with it
    shutil.copy2(source, target)


def _write(
    partial: Path,
    out: Path,
    rows: dict[str, list[tuple[str, str, str]]],
    how: How,
    shrink: int,
    progress: Callable[[int], None],
) -> None:
    done = 0
    for part, images in rows.items():
        if how == "lists":
            write_list(partial / f"{part}.csv", [(os.path.relpath(path, out), label) for path, _, label in images])
        for path, name, label in images if how != "lists" else ():
            folder = partial / part / label
            folder.mkdir(parents=True, exist_ok=True)
            flat = name.removeprefix(f"{label}/").replace("/", "__")  # two folders of a class may have one name twice
            if how == "links":
                (folder / flat).symlink_to(os.path.relpath(path, out / part / label))
            elif shrink:
                copy_smaller(path, folder / flat, shrink)
            else:
                shutil.copy2(path, folder / flat)
            done += 1
            progress(done)
