"""What is loaded at once, and how: the images of a micro-batch, of data sets that label whole images.

Shape legend: B images of a micro-batch (0 is legal), X extra partner images (at most 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import default_collate

from swin_moe.data.base import Dataset
from swin_moe.data.batch import Batch
from swin_moe.data.pixels import BrokenImage
from swin_moe.data.transforms import (
    Patch,
    Pixels,
    Transform,
    augment_key,
    generators_kept,
    gives_pixels,
    normalized,
)
from swin_moe.randomness import derive_key


@dataclass(frozen=True)
class Request:
    """One micro-batch to load. The first `own` samples are its images, the rest extra partners."""

    epoch: int
    step: int
    sample: np.ndarray  # (B + X,) int64, index in the global batch (training) or in the data set (evaluation)
    index: np.ndarray  # (B + X,) int64, index in the data set
    own: int
    peers: np.ndarray | None = None  # (P,) int64, index of every image of the step, where the source asks for it


class ImageSource:
    """Loads and transforms one Request; picklable, used in this process or in a loader process."""

    needs_peers = False

    def __init__(
        self, dataset: Dataset, transforms: Sequence[Transform], *, img_size: tuple[int, int], seed: int, partners: bool
    ) -> None:
        self._dataset = dataset
        self._transforms = transforms
        self._img_size = img_size
        self._seed = seed
        self.needs_partners = partners
        self._pixels = transforms[0] if len(transforms) == 1 and gives_pixels(transforms[0]) else None

    def __getitem__(self, request: Request) -> tuple[Batch, list[tuple[str, str]]]:
        """Returns (batch, (path, reason) of each broken image).

        The batch lacks its broken images, whichever rank or process meets them, so skipping depends on no layout.
        """
        with generators_kept():
            return self._load(request)

    def _load(self, request: Request) -> tuple[Batch, list[tuple[str, str]]]:
        views: list[list[Tensor]] = [[] for _ in self._transforms]
        patches: list[Sequence[Patch]] = []  # of each image
        images, (targets, samples, broken) = views[0], ([], [], [])
        own = 0
        for place, (sample, index) in enumerate(zip(request.sample, request.index)):
            try:
                image, target = self._dataset.sample(int(index))
            except BrokenImage as error:
                broken.append((error.path, error.reason))
                continue
            for number, view in enumerate(views):
                made = self._augment(image, request.epoch, int(index), number)
                if isinstance(made, Pixels):
                    patches.append(made.patches)
                    made = torch.from_numpy(made.levels)
                view.append(made)
            targets.append(target)
            samples.append(int(sample))
            own += place < request.own
        # In a loader process it stacks into shared memory, not into memory that is copied there.
        pixels = default_collate(images) if images else self._empty()
        labels = torch.tensor(targets, dtype=torch.int64)
        batch: Batch = {
            "image": pixels[:own],
            "target": labels[:own],
            "sample": torch.tensor(samples[:own], dtype=torch.int64),
            "epoch": request.epoch,
            "step": request.step,
        }
        if len(views) > 1:
            batch["view"] = default_collate(views[1])[:own] if images else pixels
        if self.needs_partners:
            row = {sample: place for place, sample in enumerate(samples)}
            neighbours = [row.get(sample ^ 1, place) for place, sample in enumerate(samples[:own])]
            batch["partner"] = torch.tensor(neighbours, dtype=torch.int64)
            batch["extra_image"], batch["extra_target"] = pixels[own:], labels[own:]
        if self._pixels is not None:
            cast(dict, batch)["patches"] = patches
        return batch, broken

    def unpack(self, batch: Batch) -> Batch:
        """Returns a batch as tasks get it, of one that __getitem__ gave, maybe in another process: normalized."""
        if self._pixels is None:
            return batch
        patches = cast(dict, batch).pop("patches")
        own = len(batch["image"])
        batch["image"] = self._normalized(batch["image"], patches[:own])
        if "extra_image" in batch:
            batch["extra_image"] = self._normalized(batch["extra_image"], patches[own:])
        return batch

    def _normalized(self, levels: Tensor, patches: Sequence[Sequence[Patch]]) -> Tensor:
        """Returns (B, 3, H, W) float32 of (B, H, W, 3) uint8, page-locked where that is."""
        # Here, as data is to be read where the kernels are missing.
        from swin_moe.ops.reused_memory import empty_like_reused

        shape = len(levels), 3, *levels.shape[1:3]
        # Else in memory of an earlier batch: the first write to fresh pages takes longer than all that is done here.
        out = torch.empty(shape, pin_memory=True) if levels.is_pinned() else empty_like_reused(torch.empty(shape))
        for image, one, made in zip(levels, patches, out):
            normalized(image, one, made)
        return out

    def _empty(self) -> Tensor:
        if self._pixels is not None:
            return torch.empty(0, *self._img_size, 3, dtype=torch.uint8)
        return torch.empty(0, 3, *self._img_size)

    def shares(self, rank: int, world_size: int, batch: int) -> list[np.ndarray]:
        """Returns the data set's indices of each evaluation batch of a rank; as many batches on every rank."""
        images = len(self._dataset)
        mine, most = np.arange(rank, images, world_size), -(-images // world_size)
        batches = (most + batch - 1) // batch
        return [mine[step * batch : (step + 1) * batch] for step in range(batches)]

    def _augment(self, image: Image, epoch: int, index: int, view: int) -> Tensor | Pixels:
        key = augment_key(self._seed, epoch, index)
        try:
            if self._pixels is not None:
                return self._pixels.pixels(image, key)
            return self._transforms[view](image, derive_key(key, view) if view else key)
        except Exception as error:
            error.add_note(f"while transforming {self._dataset.path(index)}")
            raise
