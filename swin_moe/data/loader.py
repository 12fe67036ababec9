"""Batches of images for training and evaluation, in an order that is a pure function of (seed, step).

A loader keeps no random state: the permutation of an epoch follows from (seed, epoch), and the place in it from the
global step. So a resumed run starts at the very next sample, and the world size and the number of loader processes
decide only who loads an image, never which image or how it is augmented.

Step s covers positions [offset, offset + global_batch) of its epoch's permutation. Sample g of the step, counted from
the offset, is loaded for micro-step m on rank r with g in [(m * world + r) * micro_batch, + micro_batch).

Shape legend: B images of a micro-batch (0 is legal), X extra partner images (at most 2), H height, W width.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from swin_moe.config import DataConfig
from swin_moe.data.base import Listed
from swin_moe.data.batch import Batch
from swin_moe.data.datasets import BrokenImage, build_dataset
from swin_moe.data.dense.loader import DenseSource, build_dense_dataset
from swin_moe.data.sets.listing import Relabeled
from swin_moe.data.source import ImageSource, PixelSource, Request
from swin_moe.data.transforms import build_transform
from swin_moe.data.views import ViewTransform
from swin_moe.data.workers import WorkerPool
from swin_moe.randomness import PURPOSES, derive_key

_log = logging.getLogger(__name__)
_MOST_PARTNERS = 2  # of a micro-batch, that another holds
_MAX_BROKEN_RUN = 256  # broken images in a row, without a good one, that on_broken=skip puts up with


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one optimizer step on this rank.

    num_samples: Images of the step over all ranks as planned. Where data.on_broken=skip left some out, the true number
        is the sum of the batches' lengths over ranks.
    """

    step: int
    epoch: int
    num_samples: int
    batches: list[Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Returns (N,) int64, the data set's indices in the order of this epoch.

    Sorted by raw Philox numbers: unlike numpy's permutation(), the raw stream never changes between versions, so that
    an old checkpoint still resumes at the right image.
    """
    key = derive_key(seed, epoch, PURPOSES.index("order"))
    return np.argsort(np.random.Philox(key).random_raw(num_samples), kind="stable")


def steps_in_epoch(images: int, batch: int, *, drop_last: bool) -> int:
    """Returns the optimizer steps of an epoch; drop_last: images after the last full batch are left out."""
    return images // batch if drop_last else -(-images // batch)


class _Loader:
    """What both loaders share: the data set, the image source and the processes that run it."""

    def __init__(
        self, config: DataConfig, img_size: int | tuple[int, int], *, train: bool, rank: int, world_size: int,
        seed: int, partners: bool, pin_memory: bool, num_classes: int, split: str, views: bool = False,
        classes: Sequence[str] = (), boxes: bool = False, label_maps: bool = False,
    ) -> None:  # fmt: skip
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        size = (height, width)
        assert 0 <= rank < world_size
        self.dataset: Listed
        self._source: ImageSource | DenseSource
        if boxes or label_maps:
            needs = {"boxes": boxes, "label_maps": label_maps}
            dense = build_dense_dataset(config, split, **needs, num_classes=num_classes, classes=classes)
            self.dataset = dense
            self._source = DenseSource(dense, config, seed=seed, train=train, views=views, **needs)
        else:
            dataset = build_dataset(config, split, img_size=size, num_classes=num_classes or 1000)
            if classes and tuple(classes) != dataset.classes:
                dataset = Relabeled(dataset, classes)
            self.dataset = dataset
            shared: dict[str, Any] = {"img_size": size, "seed": seed, "partners": partners}
            if views:
                transforms = [ViewTransform(config, size, view=view) for view in (0, 1)]
                self._source = ImageSource(dataset, transforms, **shared)
            else:
                transform = build_transform(config, size, train=train)
                erased = config.erase_prob if train else 0.0
                self._source = PixelSource(dataset, transform, erased=erased, **shared)
        self.num_classes = self.dataset.num_classes
        self.broken: dict[str, str] = {}  # path -> reason, of every image skipped so far on this rank
        if 0 < num_classes < self.num_classes:
            raise ValueError(
                f"model.num_classes={num_classes} is too small: data.name={config.name} has {self.num_classes} classes"
            )
        self._config = config
        self._rank, self._world_size = rank, world_size
        self._pin_memory = pin_memory
        self._broken_run = 0
        self._pools: list[WorkerPool] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the loader processes; the loader can be iterated again afterwards."""
        while self._pools:
            self._pools.pop().close()

    def _load(self, requests: Iterable[Request], most: int) -> Generator[Batch, None, None]:
        """Yields one batch per request, in order; ends its processes when exhausted, closed or failed.

        most: Images of a request.
        """
        workers, pin_memory = self._config.workers, self._pin_memory
        if isinstance(self._source, PixelSource):
            stream = self._source.stream(most=most, workers=workers, pin_memory=pin_memory)
            pool = WorkerPool(stream, stream.numbered(requests), workers=workers)
            unpack: Callable[[Any], Batch] = stream.unpack
        else:
            pool = WorkerPool(self._source, requests, workers=workers, pin_memory=pin_memory)
            unpack = self._source.unpack
        self._pools.append(pool)
        try:
            for loaded, broken in pool:
                batch = unpack(loaded)
                self._report(broken, loaded=len(batch["image"]))
                yield batch
        finally:
            pool.close()
            if pool in self._pools:
                self._pools.remove(pool)

    def _report(self, broken: list[tuple[str, str]], *, loaded: int) -> None:
        """Logs each broken image once; raises ValueError if they are fatal or nothing else comes any more."""
        for path, reason in broken:
            if self._config.on_broken == "fail":
                raise ValueError(f"{BrokenImage(path, reason)} (data.on_broken=skip leaves broken images out)")
            if path not in self.broken:
                self.broken[path] = reason
                _log.warning("skipping %s", BrokenImage(path, reason))
        self._broken_run = 0 if loaded else self._broken_run + len(broken)
        if self._broken_run >= _MAX_BROKEN_RUN:
            raise ValueError(
                f"data.path={self._config.path!r}: the last {self._broken_run} images were all broken, "
                f"most recently {broken[-1][0]}: {broken[-1][1]}"
            )


class TrainLoader(_Loader):
    """Optimizer steps of augmented training images, from any global step on, without end.

    Args:
        config: global_batch must be world_size x micro_batch x accumulation.
        img_size: (height, width) in pixels, or one number for both.
        seed: run.seed.
        micro_batch: Images per rank and forward.
        accumulation: Forwards per optimizer step.
        partners: Batches also carry what mixing.partners() needs: partner (B,) rows of image + extra_image, extra_image
            (X, 3, H, W) and extra_target (X,), the partners that another micro-batch holds. X is 0 where micro_batch
            is even.
        pin_memory: Put batches in page-locked memory, for CUDA.
        num_classes: Classes of the model, checked against the data; labels synthetic images.
        views: Batches also carry view (B, 3, H, W), a second augmentation of every image (data/views.py); with boxes
            that of the images without labels, which are mixed with those that have some (data/dense/mixed.py).
        boxes, label_maps: Batches carry objects or label maps, moved with their images, of data that has them
            (data/dense/); img_size does not count.

    Raises:
        ValueError: The data is missing or malformed, has more classes than the model, or less than one global batch.
    """

    def __init__(
        self, config: DataConfig, img_size: int | tuple[int, int], *, seed: int, rank: int, world_size: int,
        micro_batch: int, accumulation: int, partners: bool = False, pin_memory: bool = False, num_classes: int = 0,
        views: bool = False, boxes: bool = False, label_maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            config, img_size, train=True, rank=rank, world_size=world_size, seed=seed, partners=partners,
            pin_memory=pin_memory, num_classes=num_classes, split="train", views=views, boxes=boxes,
            label_maps=label_maps,
        )  # fmt: skip
        self.global_batch = world_size * micro_batch * accumulation
        if self.global_batch != config.global_batch:
            raise ValueError(
                f"data.global_batch={config.global_batch} is not {micro_batch} images x {accumulation} forwards "
                f"x {world_size} ranks"
            )
        length = len(self.dataset)
        self.steps_per_epoch = steps_in_epoch(length, self.global_batch, drop_last=config.drop_last)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"data.global_batch={self.global_batch} is larger than the {length} training images; "
                f"allowed: at most {length}, or data.drop_last=false"
            )
        self._seed = seed
        self._micro_batch = micro_batch
        self._accumulation = accumulation
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Returns the number of training images."""
        return len(self.dataset)

    def samples_in(self, step: int) -> int:
        """Returns the images of a step over all ranks: global_batch, or less in the last step of an epoch."""
        return min(self.global_batch, len(self.dataset) - step % self.steps_per_epoch * self.global_batch)

    def samples_before(self, step: int) -> int:
        """Returns the images of all steps before this one, over all ranks: the data position of a checkpoint."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        per_epoch = min(len(self.dataset), self.steps_per_epoch * self.global_batch)
        return epoch * per_epoch + inside * self.global_batch

    def batches(self, step0: int, stop: int | None = None) -> Iterator[StepBatches]:
        """Yields the micro-batches of steps step0, step0 + 1, ...; `stop` is the first step not to load.

        Closing the generator, or an exception in it, ends the loader processes.

        Raises:
            ValueError: An image is broken and data.on_broken is fail.
        """
        batches = self._load(self._requests(step0, stop), self._micro_batch + _MOST_PARTNERS)
        try:
            step = step0
            while step != stop:
                micro = [next(batches) for _ in range(self._accumulation)]
                yield StepBatches(step, step // self.steps_per_epoch, self.samples_in(step), micro)
                step += 1
        finally:
            batches.close()

    def _requests(self, step: int, stop: int | None) -> Iterator[Request]:
        while step != stop:
            for micro_step in range(self._accumulation):
                yield self._request(step, micro_step)
            step += 1

    def _request(self, step: int, micro_step: int) -> Request:
        epoch, inside = divmod(step, self.steps_per_epoch)
        count = self.samples_in(step)
        low = (micro_step * self._world_size + self._rank) * self._micro_batch
        own = np.arange(min(low, count), min(low + self._micro_batch, count))
        # Partners (g XOR 1) outside of [low, high): only where an edge cuts a pair in two.
        edges = {int(g) ^ 1 for g in own} - set(own.tolist()) if self._source.needs_partners else set()
        extra = np.asarray(sorted(g for g in edges if g < count), dtype=np.int64)
        sample = np.concatenate([own, extra])
        order = self._epoch_order(epoch)[inside * self.global_batch :]
        peers = {"peers": order[:count]} if self._source.needs_peers else {}
        return Request(epoch, step, sample, order[sample], len(own), **peers)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(len(self.dataset), seed=self._seed, epoch=epoch)
            if isinstance(self._source, DenseSource):
                order = self._source.order(epoch, order, self.global_batch)
            self._order = epoch, order
        return self._order[1]


class EvalLoader(_Loader):
    """Every validation image exactly once over all ranks, in the same number of batches on every rank.

    Image i goes to rank i % world_size, so ranks differ by at most one image; a rank with fewer ends with smaller or
    empty batches. With boxes or label maps a batch holds images of one padded size. `sample` is the image's index in
    the validation set, epoch is 0, step counts the batches.

    Args:
        img_size: (height, width) in pixels, or one number for both.
        batch: Images per rank and forward.
        pin_memory: Put batches in page-locked memory, for CUDA.
        num_classes: Classes of the model, checked against the data; labels synthetic images.
        split: "train" gives the training images as evaluation sees them.
        classes: What the network's outputs stand for; labels follow the class names. () = as the data numbers them.
        boxes, label_maps: As in TrainLoader.

    Raises:
        ValueError: The data is missing or malformed, has more classes than the model, or one that is none of `classes`.
    """

    def __init__(
        self,
        config: DataConfig,
        img_size: int | tuple[int, int],
        rank: int,
        world_size: int,
        batch: int,
        *,
        pin_memory: bool = False,
        num_classes: int = 0,
        split: str = "val",
        classes: Sequence[str] = (),
        boxes: bool = False,
        label_maps: bool = False,
    ) -> None:
        if batch < 1:
            raise ValueError(f"data.eval_batch must be >= 1 here, got {batch}")
        super().__init__(
            config,
            img_size,
            train=False,
            rank=rank,
            world_size=world_size,
            seed=0,
            partners=False,
            pin_memory=pin_memory,
            num_classes=num_classes,
            split=split,
            classes=classes,
            boxes=boxes,
            label_maps=label_maps,
        )
        self.num_samples = len(self.dataset)
        self._batch = batch
        self._shares = self._source.shares(rank, world_size, batch)

    def __len__(self) -> int:
        """Returns the number of batches, the same on every rank."""
        return len(self._shares)

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches; may be called again for the next evaluation."""
        return self._load(self._requests(), self._batch)

    def _requests(self) -> Iterator[Request]:
        for step, index in enumerate(self._shares):
            yield Request(0, step, index, index, len(index))
