"""Memory and seconds of the index of a large folder, ours beside torchvision's ImageFolder.

    python benchmarks/training/data_index.py [--images 1281167] [--classes 1000] [--folder /dev/shm]

The files are links to one, below `--folder`, which is to hold that many (a tmpfs does). What a loader process costs in
memory is what it writes to of its parent's pages: a process is forked, asks for path and label of every image in the
order of an epoch, and says how much of its memory is its own before and after. Each row is a process of its own.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from swin_moe.config import DataConfig
from swin_moe.data.datasets import build_dataset
from swin_moe.data.loader import epoch_order
from swin_moe.data.torchvision_compat import import_torchvision

Ask = Callable[[int], Any]  # path and label of an image


def write_links(root: Path, images: int, classes: int) -> None:
    """Writes class folders of links to one file, with names as long as ImageNet's."""
    first = root / "one"
    first.write_bytes(b"")
    for label in range(classes):
        folder = root / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(label, images, classes):
            os.link(first, folder / f"n{label:08d}_{number:08d}.JPEG")


def own_memory() -> float:
    """Returns MiB of this process that no other shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def ours(root: Path) -> Ask:
    """Returns how to ask our data set."""
    dataset = build_dataset(DataConfig(name="folder", path=str(root)), "train", img_size=(224, 224))
    labels = dataset.labels()
    return lambda index: (dataset.path(index), int(labels[index]))


def torchvisions(root: Path) -> Ask:
    """Returns how to ask torchvision's."""
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(root / "train"))
    return lambda index: tuple(folder.samples[index])


def loader_process(ask: Ask, images: int, to: Connection) -> None:
    """Sends MiB of its own before and after an epoch, and microseconds an image."""
    before = own_memory()
    order = epoch_order(images, seed=0, epoch=0).tolist()
    start, own = time.perf_counter(), own_memory()
    for index in order:
        ask(index)
    seconds, after = time.perf_counter() - start, own_memory()
    to.send((before, after - own, seconds / images * 1e6))


def one_row(make: Callable[[Path], Ask], root: Path, images: int, to: Connection) -> None:
    """Sends what a data set costs: (seconds, MiB) of the index, and what a process forked beside it sent."""
    before, start = own_memory(), time.perf_counter()
    ask = make(root)
    seconds, size = time.perf_counter() - start, own_memory() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=loader_process, args=(ask, images, there))
    process.start()
    to.send((seconds, size, peak, *here.recv()))
    process.join()


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--folder", default="/dev/shm")
    options = parser.parse_args()
    import_torchvision()
    import torchvision.datasets  # noqa: F401  # not to be counted as its index

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        write_links(root, options.images, options.classes)
        print("| data set | index, s | index, MiB | peak, MiB | a loader process's own, MiB", end="")
        print(" | more after an epoch | us an image |\n|" + "---|" * 7)
        for name, make in (("ours", ours), ("torchvision", torchvisions)):
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(
                target=one_row, args=(make, root, options.images, there)
            )
            process.start()
            print(f"| {name} | {' | '.join(f'{value:.1f}' for value in here.recv())} |", flush=True)
            process.join()


if __name__ == "__main__":
    main()
