"""Images per second and core of training data: ours beside torchvision's folder, timm's loader and a turbo decoder.

    python benchmarks/training/data.py [--images 256] [--rounds 5] [--workers 0,1,2] [--batch 64]

The same JPEG files of 500 x 400 pixels (smoothed noise of about 95 KiB), the same augmentation: random crop to 224,
bicubic, flip, rand-m9-mstd0.5-inc1, erasing of a quarter of the images. What comes out is the same, too: normalized
float32 batches in this process.

- ours: swin_moe.data.loader.TrainLoader.
- torchvision: ImageFolder and timm's transform in torch's DataLoader.
- timm: ImageFolder, timm's transform for its prefetcher, its collation of uint8 batches, PrefetchLoader.
- timm, draft: the same with Pillow's draft mode (JPEG decoded at half the size where that is still above 224).
- timm, turbo: the same with simplejpeg (left out where it is not installed).

CPU seconds are of this process and of loader processes, from before these start until they have ended. Rounds take
turns; medians, and ratios as medians over rounds.
"""

import argparse
import io
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def write_images(root: Path, images: int) -> None:
    """Writes two classes of JPEG files."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
    for number in range(images):
        image = photograph(rng, 400, 500)
        image.save(root / "train" / "ab"[number % 2] / f"{number}.jpg", quality=94)


def drafted(path: str) -> Image.Image:
    """Returns an image decoded at half or a quarter of its size, where both sides stay above the crop's."""
    with open(path, "rb") as file:
        image = Image.open(file)
        image.draft("RGB", (SIZE, SIZE))
        return image.convert("RGB")


def turbo(path: str) -> Image.Image:
    """Returns an image decoded by simplejpeg."""
    import simplejpeg

    return Image.fromarray(simplejpeg.decode_jpeg(Path(path).read_bytes(), fastdct=False, fastupsample=False))


def plain(path: str) -> Image.Image:
    """Returns an image as torchvision's folder reads it."""
    return Image.open(io.BytesIO(Path(path).read_bytes())).convert("RGB")


def ours(root: Path, batch: int, workers: int) -> Iterator[torch.Tensor]:
    """Yields our batches of one epoch."""
    config = DataConfig(name="folder", path=str(root), global_batch=batch, micro_batch=batch, workers=workers, **POLICY)
    arguments: dict[str, Any] = {"seed": 0, "rank": 0, "world_size": 1, "accumulation": 1}
    with TrainLoader(config, SIZE, micro_batch=batch, **arguments) as loader:
        for step in loader.batches(0, loader.steps_per_epoch):
            yield step.batches[0]["image"]


def others(root: Path, batch: int, workers: int, *, read: Callable, prefetcher: bool) -> Iterator[torch.Tensor]:
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


def seconds(batches: Iterator[torch.Tensor]) -> tuple[float, int]:
    """Returns CPU seconds of an epoch, and its images."""

    def used() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in both)

    start, images = used(), 0
    for batch in batches:
        assert batch.dtype == torch.float32 and batch.shape[1:] == (3, SIZE, SIZE)
        images += len(batch)
    del batches
    return used() - start, images


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", default="0,1,2", help="loader processes, comma-separated")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, options.images)
        size = sum(path.stat().st_size for path in root.rglob("*.jpg")) / options.images / 1024
        print(f"{options.images} images of {size:.0f} KiB, batches of {options.batch}, {options.rounds} rounds\n")
        rows: dict[str, Callable[[int], Iterator[torch.Tensor]]] = {
            "ours": lambda workers: ours(root, options.batch, workers),
            "torchvision": lambda workers: others(root, options.batch, workers, read=plain, prefetcher=False),
            "timm": lambda workers: others(root, options.batch, workers, read=plain, prefetcher=True),
            "timm, draft": lambda workers: others(root, options.batch, workers, read=drafted, prefetcher=True),
        }
        try:
            import simplejpeg  # noqa: F401

            rows["timm, turbo"] = lambda workers: others(root, options.batch, workers, read=turbo, prefetcher=True)
        except ImportError:
            print("simplejpeg is not installed: no row of a turbo decoder\n")
        print("| pipeline | workers | images a CPU second | ours / it |\n|---|---|---|---|")
        for workers in map(int, options.workers.split(",")):
            found: dict[str, list[float]] = {name: [] for name in rows}
            for number in range(options.rounds + 1):
                for name, make in rows.items() if number % 2 else reversed(rows.items()):
                    cost, images = seconds(make(workers))
                    if number:
                        found[name].append(images / cost)
            for name, rates in found.items():
                ratio = statistics.median(a / b for a, b in zip(found["ours"], rates))
                print(f"| {name} | {workers} | {statistics.median(rates):.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
