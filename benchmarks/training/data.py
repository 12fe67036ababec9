"""Images per second and core of training data: ours beside torchvision's folder, timm's loader and a turbo decoder.

    python benchmarks/training/data.py [--sizes 500x400] [--workers 0,1,2] [--images 256] [--rounds 5]

The same JPEG files (smoothed noise, links to `--images` files), the same augmentation: random crop to 224, bicubic,
flip, rand-m9-mstd0.5-inc1, erasing of a quarter of the images. What comes out is the same, too: normalized float32
batches in this process.

- ours: swin_moe.data.loader.TrainLoader; "ours, draft" with data.draft=true.
- torchvision: ImageFolder and timm's transform in torch's DataLoader.
- timm: ImageFolder, timm's transform for its prefetcher, its collation of uint8 batches, PrefetchLoader.
- timm, draft: the same with Pillow's draft mode (JPEG decoded at half, a quarter or an eighth of its size where that
  is still above 224, whatever is then cut out of it).
- timm, turbo; timm, turbo, draft: the same with simplejpeg (left out where it is not installed).

Two tables. In steady state: `--count` batches after the first `--skip`, while processes run; CPU seconds are of this
process and of the loader processes between these two moments, by their own clocks. And the start: from making the
loader until every process has given an image (batches of 1), and the end. Rounds take turns, the first is not counted;
medians, and ratios as medians over rounds.
"""

import argparse
import io
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from dense_data import photograph
from PIL import Image
from torch.utils.data import DataLoader

from swin_moe.config import DataConfig
from swin_moe.data.loader import TrainLoader
from swin_moe.data.torchvision_compat import import_torchvision
from swin_moe.data.transforms import _repair_posterize

SIZE = 224
POLICY: dict[str, Any] = {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}


def write_images(root: Path, images: int, total: int, width: int, height: int) -> None:
    """Writes two classes of `images` JPEG files, and links to them until there are `total`."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
    for number in range(total):
        path = root / "train" / "ab"[number % 2] / f"{number}.jpg"
        if number < images:
            photograph(rng, height, width).save(path, quality=94)
        else:
            first = number % images
            path.hardlink_to(root / "train" / "ab"[first % 2] / f"{first}.jpg")


def drafted(path: str) -> Image.Image:
    """Returns an image decoded at a half to an eighth of its size, where both sides stay above the crop's."""
    with open(path, "rb") as file:
        image = Image.open(file)
        image.draft("RGB", (SIZE, SIZE))
        return image.convert("RGB")


def turbo(path: str, *, smallest: int = 0) -> Image.Image:
    """Returns an image decoded by simplejpeg; smallest: at a part of its size whose sides are still of these pixels."""
    import simplejpeg

    data = Path(path).read_bytes()
    least = {"min_height": smallest, "min_width": smallest} if smallest else {}
    return Image.fromarray(simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False, **least))


def plain(path: str) -> Image.Image:
    """Returns an image as torchvision's folder reads it."""
    return Image.open(io.BytesIO(Path(path).read_bytes())).convert("RGB")


def ours(root: Path, workers: int, batch: int, **options: Any) -> Iterator[torch.Tensor]:
    """Yields our batches."""
    config = DataConfig(
        name="folder", path=str(root), global_batch=batch, micro_batch=batch, workers=workers, **POLICY, **options
    )
    arguments: dict[str, Any] = {"seed": 0, "rank": 0, "world_size": 1, "accumulation": 1}
    with TrainLoader(config, SIZE, micro_batch=batch, **arguments) as loader:
        for step in loader.batches(0):
            yield step.batches[0]["image"]


def others(root: Path, workers: int, batch: int, *, read: Callable, prefetcher: bool) -> Iterator[torch.Tensor]:
    """Yields the batches of one epoch of torchvision's folder with timm's transform."""
    import_torchvision()
    from timm.data import create_transform
    from timm.data.loader import PrefetchLoader, fast_collate
    from torchvision.datasets import ImageFolder

    transform = create_transform(
        SIZE, is_training=True, re_prob=0.25, re_mode="pixel", use_prefetcher=prefetcher, **POLICY
    )
    _repair_posterize(transform.transforms)  # which Pillow 13 would end by
    folder = ImageFolder(str(root / "train"), transform, loader=read)
    collate: dict[str, Any] = {"collate_fn": fast_collate} if prefetcher else {}
    loader: Any = DataLoader(folder, batch, shuffle=True, num_workers=workers, drop_last=True, **collate)
    if prefetcher:
        loader = PrefetchLoader(loader, device=torch.device("cpu"), re_prob=0.25, re_mode="pixel")
    for images, _ in loader:
        yield images


Make = Callable[[int, int], Iterator[torch.Tensor]]  # (loader processes, images of a batch)


def pipelines(root: Path) -> dict[str, Make]:
    """Returns every pipeline over the files below a folder."""
    peer = partial(others, root, prefetcher=True)
    rows: dict[str, Make] = {
        "ours": partial(ours, root),
        "ours, draft": partial(ours, root, draft=True),
        "torchvision": partial(others, root, read=plain, prefetcher=False),
        "timm": partial(peer, read=plain),
        "timm, draft": partial(peer, read=drafted),
    }
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        print("simplejpeg is not installed: no row of a turbo decoder\n")
    else:
        rows["timm, turbo"] = partial(peer, read=turbo)
        rows["timm, turbo, draft"] = partial(peer, read=partial(turbo, smallest=SIZE))
    return rows


class Used(NamedTuple):
    """Seconds: by the clock, of this process, and of its loader processes that live."""

    wall: float
    parent: float
    processes: float

    @classmethod
    def now(cls) -> "Used":
        """Returns what was used until now; of a process since it began."""
        # clock_getcpuclockid of Linux: the number of a process's CPU clock follows from its own.
        clocks = [(~process.pid << 3) | 2 for process in multiprocessing.active_children() if process.pid]
        return cls(time.perf_counter(), time.process_time(), sum(map(time.clock_gettime, clocks)))

    def since(self, start: "Used") -> "Used":
        return Used(*(now - then for now, then in zip(self, start)))

    @property
    def cpu(self) -> float:
        return self.parent + self.processes


def steady(make: Make, workers: int, options: argparse.Namespace) -> Used:
    """Returns what `count` batches cost after `skip`."""
    batches = make(workers, options.batch)
    for batch in itertools.islice(batches, options.skip):
        assert batch.dtype == torch.float32 and batch.shape == (options.batch, 3, SIZE, SIZE)
    start, images = Used.now(), 0
    for batch in itertools.islice(batches, options.count):
        images += len(batch)
    used = Used.now().since(start)
    assert images == options.count * options.batch
    batches.close()  # type: ignore[attr-defined]
    return used


def start_and_end(make: Make, workers: int) -> tuple[Used, float]:
    """Returns what it costs until every process has given an image, and the seconds until all have ended."""
    before = Used.now()
    batches = make(workers, 1)
    for _ in range(max(workers, 1)):
        next(batches)
    used = Used.now().since(before)
    start = time.perf_counter()
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()
    return used, time.perf_counter() - start


def in_turns(rows: dict[str, Make], rounds: int, measure: Callable[[Make], Any]) -> dict[str, list[Any]]:
    """Returns what each row gave in each round but the first."""
    found: dict[str, list[Any]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, make in rows.items() if number % 2 else reversed(rows.items()):
            result = measure(make)
            if number:
                found[name].append(result)
    return found


def print_steady(rows: dict[str, Make], workers: int, size: str, options: argparse.Namespace) -> None:
    """Prints the rows of one number of loader processes."""
    images = options.count * options.batch
    found = in_turns(rows, options.rounds, lambda make: steady(make, workers, options))
    middle = statistics.median
    for name, all_used in found.items():
        cells = [f"{images / middle(used.cpu for used in all_used):.0f}"]
        for own in ("ours", "ours, draft"):
            if own in found:
                cells.append(f"{middle(it.cpu / us.cpu for us, it in zip(found[own], all_used)):.3f}")
        for part in ("parent", "processes"):
            cells.append(f"{1000 * middle(getattr(used, part) for used in all_used) / images:.3f}")
        cells.append(f"{images / middle(used.wall for used in all_used):.0f}")
        print(f"| {size} | {workers} | {name} | {' | '.join(cells)} |", flush=True)


def print_starts(rows: dict[str, Make], workers: int, options: argparse.Namespace) -> None:
    """Prints the rows of starts and ends of so many processes."""
    found = in_turns(rows, 2 * options.rounds, lambda make: start_and_end(make, workers))
    for name, all_found in found.items():
        used, ends = [used for used, _ in all_found], [end for _, end in all_found]
        cells = [1000 * statistics.median(values) for values in (*zip(*used), ends)]
        print(f"| {workers} | {name} | {' | '.join(f'{cell:.0f}' for cell in cells)} |", flush=True)


def main() -> None:
    """Prints markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="500x400", help="width x height of the files, comma-separated")
    parser.add_argument("--images", type=int, default=256, help="files that differ")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", default="0,1,2", help="loader processes, comma-separated")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--skip", type=int, default=4, help="batches before the measured ones")
    parser.add_argument("--count", type=int, default=32, help="batches that are measured")
    parser.add_argument("--only", default="", help="pipelines, by parts of their names, comma-separated")
    parser.add_argument("--tables", default="steady,start")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            total = options.batch * (options.skip + options.count + 8)  # processes load ahead until the last one
            write_images(root, options.images, total, *map(int, size.split("x")))
            mean = sum(path.stat().st_size for path in root.rglob("*.jpg")) / total / 1024
            print(f"{options.images} files of {size}, {mean:.0f} KiB; {options.rounds} rounds\n")
            rows = pipelines(root)
            if options.only:
                rows = {name: row for name, row in rows.items() if any(o in name for o in options.only.split(","))}
            workers = [int(number) for number in options.workers.split(",")]
            if "steady" in options.tables:
                print(f"{options.count} batches of {options.batch} after {options.skip}\n")
                print("| size | workers | pipeline | images a CPU second | ours / it | ours with draft / it |", end="")
                print(" ms an image: this process | loader processes | images a second |\n|" + "---|" * 9)
                for number in workers:
                    print_steady(rows, number, size, options)
            if "start" in options.tables:
                print("\n| workers | pipeline | start, ms by the clock | CPU, here | CPU, processes | end, ms |")
                print("|" + "---|" * 6)
                for number in filter(None, workers):
                    print_starts(rows, number, options)
            print(flush=True)


if __name__ == "__main__":
    main()
