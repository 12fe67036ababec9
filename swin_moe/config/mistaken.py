"""What a path is that was given in the place of something else, and which command takes it: images, runs, checkpoints.

Every command that refuses a path asks here, so that a first try with a folder of photos is answered with the next step.
"""

import itertools
import os
from pathlib import Path

from swin_moe.names.files import IMAGE_SUFFIXES, RECORDS, RUN_CONFIG, SPLITS

_LOOKED_AT = 4096  # entries below a folder
_NAMED = 3  # runs of a folder
_OF_WEIGHTS = (".json", ".safetensors", ".bin", ".pt", ".pth")  # files in a folder that is a network


def belongs(path: str | Path) -> str:
    """Returns "; it is ..., which COMMAND takes" of an image, a folder of images, a run or a folder of runs; else "".

    A clause to stand behind a sentence that has named the path.
    """
    try:
        path = Path(path)
        if path.is_dir() and is_run(path):
            return f"; it is a run: swin-moe report {path}, swin-moe demo {path}, swin-moe predict {path} IMAGE"
        if path.is_dir() and is_run(path.resolve().parent) and path.resolve().name == "checkpoints":
            return f"; it holds checkpoints of a run, which is {path.parent}"
        return _holds_no_network(path)
    except (OSError, ValueError):  # not ours to read; a NUL in it
        return ""


def misplaced(path: str | Path) -> str:
    """Returns what `belongs` says of images and of folders of images or runs; "" of what a network may be read from, as
    a run, or a folder of weights with pictures beside them."""
    try:
        path = Path(path)
        of_run = is_run(path) or is_run(path.resolve().parent)
        if path.is_dir() and (of_run or any(name.endswith(_OF_WEIGHTS) for name in os.listdir(path))):
            return ""
        return _holds_no_network(path)
    except (OSError, ValueError):
        return ""


def _holds_no_network(path: Path) -> str:
    if path.is_file():
        return _image(path) if path.name.lower().endswith(IMAGE_SUFFIXES) else ""
    return (_runs(path) or _images(path)) if path.is_dir() else ""


def is_run(path: Path) -> bool:
    """Returns whether training has written into a folder."""
    return (path / RUN_CONFIG).is_file() and ((path / RECORDS).is_file() or (path / "checkpoints").is_dir())


def _image(path: Path) -> str:
    return f"; it is an image, for a trained network: swin-moe predict RUN {path}, or the page of swin-moe demo RUN"


def _runs(path: Path) -> str:
    with os.scandir(path) as entries:
        found = sorted(entry.name for entry in itertools.islice(entries, _LOOKED_AT) if is_run(Path(entry.path)))
    if not found:
        return ""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"; it is a folder of runs, name one: {', '.join(str(path / name) for name in found[:_NAMED])}{more}"


def _images(path: Path) -> str:
    """Returns the clause of a folder with an image in it or below."""
    below = itertools.chain.from_iterable(
        [(Path(folder), name) for name in (*folders, *files)] for folder, folders, files in os.walk(path)
    )
    looked = itertools.islice(below, _LOOKED_AT)
    first = next((folder for folder, name in looked if name.lower().endswith(IMAGE_SUFFIXES)), None)
    lists = all((path / f"{split}.csv").is_file() for split in SPLITS)
    if first is None and not lists:
        return ""
    if lists or all((path / split).is_dir() for split in SPLITS):
        return f"; it is a folder of images, on which trains: swin-moe train finetune_photos data.path={path}"
    ready = f"{os.path.normpath(path)}_split"
    seen = f"; a network that is trained looks at them with swin-moe predict RUN {path}"
    if first == path:  # in no class folders
        return f"; it is a folder of images; to train on them a folder for each class is needed{seen}"
    return (
        f"; it is a folder of images; to train on them: swin-moe data split {path} --out {ready}, then "
        f"swin-moe train finetune_photos data.path={ready}{seen}"
    )
