"""What is loaded at once, and how: the images of a micro-batch, of data sets that label whole images.

Shape legend: B images of a micro-batch (0 is legal), X extra partner images (at most 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from swin_moe.data.base import Dataset
from swin_moe.data.batch import Batch
from swin_moe.data.pixels import BrokenImage
from swin_moe.data.transforms import Transform, augment_key
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

    def __getitem__(self, request: Request) -> tuple[Batch, list[tuple[str, str]]]:
        """Returns (batch, (path, reason) of each broken image).

        The batch lacks its broken images, whichever rank or process meets them, so skipping depends on no layout.
        """
        views: list[list[Tensor]] = [[] for _ in self._transforms]
        images, (targets, samples, broken) = views[0], ([], [], [])
        own = 0
        for place, (sample, index) in enumerate(zip(request.sample, request.index)):
            try:
                image, target = self._dataset.sample(int(index))
            except BrokenImage as error:
                broken.append((error.path, error.reason))
                continue
            for number, view in enumerate(views):
                view.append(self._augment(image, request.epoch, int(index), number))
            targets.append(target)
            samples.append(int(sample))
            own += place < request.own
        pixels = torch.stack(images) if images else torch.empty(0, 3, *self._img_size)
        labels = torch.tensor(targets, dtype=torch.int64)
        batch: Batch = {
            "image": pixels[:own],
            "target": labels[:own],
            "sample": torch.tensor(samples[:own], dtype=torch.int64),
            "epoch": request.epoch,
            "step": request.step,
        }
        if len(views) > 1:
            batch["view"] = torch.stack(views[1])[:own] if images else pixels
        if self.needs_partners:
            row = {sample: place for place, sample in enumerate(samples)}
            neighbours = [row.get(sample ^ 1, place) for place, sample in enumerate(samples[:own])]
            batch["partner"] = torch.tensor(neighbours, dtype=torch.int64)
            batch["extra_image"], batch["extra_target"] = pixels[own:], labels[own:]
        return batch, broken

    def unpack(self, batch: Batch) -> Batch:
        """Returns the batch: nothing of it was packed for the way between processes."""
        return batch

    def shares(self, rank: int, world_size: int, batch: int) -> list[np.ndarray]:
        """Returns the data set's indices of each evaluation batch of a rank; as many batches on every rank."""
        images = len(self._dataset)
        mine, most = np.arange(rank, images, world_size), -(-images // world_size)
        batches = (most + batch - 1) // batch
        return [mine[step * batch : (step + 1) * batch] for step in range(batches)]

    def _augment(self, image: Image, epoch: int, index: int, view: int) -> Tensor:
        key = augment_key(self._seed, epoch, index)
        try:
            return self._transforms[view](image, derive_key(key, view) if view else key)
        except Exception as error:
            error.add_note(f"while transforming {self._dataset.path(index)}")
            raise
