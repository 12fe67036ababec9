"""What is loaded at once, and how: the images of a micro-batch, of data sets that label whole images.

Shape legend: B images of a micro-batch (0 is legal), X extra partner images (at most 2), H height, W width.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from swin_moe.data.base import Dataset, encoded
from swin_moe.data.batch import Batch
from swin_moe.data.buffers import Buffer, Buffers, Place
from swin_moe.data.pixels import BrokenImage
from swin_moe.data.transforms import Patch, PixelTransform, Transform, augment_key, generators_kept, normalized
from swin_moe.data.workers import pin, under_way
from swin_moe.randomness import derive_key

_PATCH_BYTES = 4  # per pixel of an image: random erasing writes to at most a third of it, 3 channels of float32

Broken = list[tuple[str, str]]  # (path, reason) of each broken image


@dataclass(frozen=True)
class Request:
    """One micro-batch to load. The first `own` samples are its images, the rest extra partners."""

    epoch: int
    step: int
    sample: np.ndarray  # (B + X,) int64, index in the global batch (training) or in the data set (evaluation)
    index: np.ndarray  # (B + X,) int64, index in the data set
    own: int
    peers: np.ndarray | None = None  # (P,) int64, index of every image of the step, where the source asks for it


@dataclass
class _Rows:
    """What is known of the images of a request that could be loaded.

    A batch lacks its broken images, whichever rank or process meets them, so skipping depends on no layout.
    """

    request: Request
    targets: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    broken: Broken = field(default_factory=list)
    own: int = 0

    def add(self, place: int, target: int) -> None:
        self.targets.append(target)
        self.samples.append(int(self.request.sample[place]))
        self.own += place < self.request.own

    def fields(self, *, partners: bool) -> dict[str, Any]:
        """Returns everything of a batch but images; arrays, as each tensor would be a file between processes."""
        labels, samples = np.asarray(self.targets, dtype=np.int64), np.asarray(self.samples, dtype=np.int64)
        fields = {
            "target": labels[: self.own],
            "sample": samples[: self.own],
            "epoch": self.request.epoch,
            "step": self.request.step,
        }
        if partners:
            row = {sample: place for place, sample in enumerate(self.samples)}
            neighbours = [row.get(sample ^ 1, place) for place, sample in enumerate(self.samples[: self.own])]
            fields["partner"] = np.asarray(neighbours, dtype=np.int64)
            fields["extra_target"] = labels[self.own :]
        return fields


def _batch(fields: dict[str, Any], images: Tensor, extra: Tensor) -> Batch:
    made = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    if "partner" in made:
        made["extra_image"] = extra
    return cast(Batch, {"image": images, **made})


class ImageSource:
    """Loads and transforms one Request; picklable, used in this process or in a loader process."""

    needs_peers = False

    def __init__(
        self, dataset: Dataset, transforms: Sequence[Transform], *, img_size: tuple[int, int], seed: int, partners: bool
    ) -> None:
        """transforms: One for each view of an image."""
        self._dataset = dataset
        self._transforms = transforms
        self._img_size = img_size
        self._seed = seed
        self.needs_partners = partners

    def __getitem__(self, request: Request) -> tuple[Batch, Broken]:
        """Returns (batch, its broken images, which it lacks)."""
        views: list[list[Tensor]] = [[] for _ in self._transforms]
        rows = _Rows(request)
        for place, index in enumerate(request.index.tolist()):
            try:
                image, target = self._dataset.sample(index)
            except BrokenImage as error:
                rows.broken.append((error.path, error.reason))
                continue
            key = augment_key(self._seed, request.epoch, index)
            for number, (view, transform) in enumerate(zip(views, self._transforms)):
                with self._names(index):
                    view.append(transform(image, derive_key(key, number) if number else key))
            rows.add(place, target)
        # In a loader process it stacks into shared memory, not into memory that is copied there.
        pixels = [default_collate(view) if view else torch.empty(0, 3, *self._img_size) for view in views]
        fields = rows.fields(partners=self.needs_partners)
        if len(views) > 1:
            fields["view"] = pixels[1][: rows.own]
        return _batch(fields, pixels[0][: rows.own], pixels[0][rows.own :]), rows.broken

    def unpack(self, batch: Batch) -> Batch:
        """Returns a batch as tasks get it, of one that __getitem__ gave, maybe in another process."""
        return batch

    def shares(self, rank: int, world_size: int, batch: int) -> list[np.ndarray]:
        """Returns the data set's indices of each evaluation batch of a rank; as many batches on every rank."""
        images = len(self._dataset)
        mine, most = np.arange(rank, images, world_size), -(-images // world_size)
        batches = (most + batch - 1) // batch
        return [mine[step * batch : (step + 1) * batch] for step in range(batches)]

    def _names(self, index: int) -> "_Named":
        return _Named(self._dataset, index)


class _Named:
    """Says of an error in a transform which image it was."""

    def __init__(self, dataset: Dataset, index: int) -> None:
        self._dataset, self._index = dataset, index

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, BrokenImage):
            error.add_note(f"while transforming {self._dataset.path(self._index)}")


class Loaded(NamedTuple):
    """A micro-batch on its way to the process that trains: pixels of 8 bits lie in a buffer."""

    buffer: int
    levels: Place | np.ndarray  # (B + X or more, H, 3, W) uint8
    patches: list[list[tuple[int, int, Place | np.ndarray]]]  # of each image: top, left and values of each Patch
    own: int
    fields: dict[str, Any]


class PixelSource(ImageSource):
    """Loads images as pixels of 8 bits; `stream` makes batches of them."""

    def __init__(
        self,
        dataset: Dataset,
        transform: PixelTransform,
        *,
        img_size: tuple[int, int],
        seed: int,
        partners: bool,
        erased: float,
    ) -> None:
        """erased: The share of images with patches."""
        super().__init__(dataset, [transform], img_size=img_size, seed=seed, partners=partners)
        self._transform = transform
        self._erased = erased

    def stream(self, *, most: int, workers: int, pin_memory: bool) -> "PixelStream":
        """Returns what loads requests of `most` images, extra partners with them, in so many processes."""
        height, width = self._img_size
        size = int(most * height * width * (3 + _PATCH_BYTES * self._erased))
        return PixelStream(self, Buffers(under_way(workers), size), pin_memory=pin_memory)

    def load(self, request: Request, number: int, buffer: Buffer) -> tuple[Loaded, Broken]:
        """Returns (batch in this buffer, its broken images, which it lacks)."""
        buffer.clear()
        height, width = self._img_size
        levels, sent = buffer.put_empty((len(request.index), height, 3, width), np.uint8)
        patches: list[list[tuple[int, int, Place | np.ndarray]]] = []
        rows = _Rows(request)
        with generators_kept():
            for place, index in enumerate(request.index.tolist()):
                try:
                    image, target = encoded(self._dataset, index)
                    with self._names(index):
                        made = self._transform.pixels(image, augment_key(self._seed, request.epoch, index))
                except BrokenImage as error:
                    rows.broken.append((error.path, error.reason))
                    continue
                levels[len(patches)] = made.levels
                patches.append([(top, left, buffer.put(values)) for top, left, values in made.patches])
                rows.add(place, target)
        return Loaded(number, sent, patches, rows.own, rows.fields(partners=self.needs_partners)), rows.broken


class PixelStream:
    """Loads requests, each with the number of a buffer, and makes batches of what was loaded, in order.

    A buffer is written again only after the batch before it was unpacked: there is one for each that is under way.
    """

    def __init__(self, source: PixelSource, buffers: Buffers, *, pin_memory: bool) -> None:
        self._source, self._buffers, self._pin_memory = source, buffers, pin_memory

    def numbered(self, requests: Iterable[Request]) -> Iterator[tuple[int, Request]]:
        """Yields requests with their buffers."""
        return zip(itertools.cycle(range(len(self._buffers))), requests)

    def __getitem__(self, item: tuple[int, Request]) -> tuple[Loaded, Broken]:
        """Returns (batch in its buffer, its broken images, which it lacks)."""
        number, request = item
        return self._source.load(request, number, self._buffers[number])

    def unpack(self, loaded: Loaded) -> Batch:
        """Returns a batch as tasks get it: normalized, in memory of its own, page-locked with pin_memory."""
        buffer, own, total = self._buffers[loaded.buffer], loaded.own, len(loaded.patches)
        levels = torch.from_numpy(buffer.at(loaded.levels))
        patches = [[Patch(top, left, buffer.at(sent)) for top, left, sent in one] for one in loaded.patches]
        images = self._normalized(levels[:own], patches[:own])
        extra = self._normalized(levels[own:total], patches[own:])
        batch = _batch(loaded.fields, images, extra)
        return pin(batch) if self._pin_memory else batch

    def _normalized(self, levels: Tensor, patches: Sequence[Sequence[Patch]]) -> Tensor:
        """Returns (B, 3, H, W) float32 of (B, H, 3, W) uint8."""
        # Here, as data is to be read where the kernels are missing.
        from swin_moe.ops.reused_memory import empty_like_reused

        shape = len(levels), 3, levels.shape[1], levels.shape[3]
        # Else in memory of an earlier batch: the first write to fresh pages takes longer than all that is done here.
        out = torch.empty(shape, pin_memory=True) if self._pin_memory else empty_like_reused(torch.empty(shape))
        for image, one, made in zip(levels, patches, out):
            normalized(image, one, made)
        return out
