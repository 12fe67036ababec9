"""Semantic segmentation: a class for every pixel, by UPerNet on a pyramid of any Swin network.

The loss is a mean over the labelled pixels of the whole step, wherever they sit; batch norm sees the pixels of all
ranks, and evaluation counts integers: nothing depends on the layout.

Shape legend: B images of this micro-batch, K classes, H x W the padded batch, h x w an image as stored.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.config import Config
from swin_moe.data.batch import Batch
from swin_moe.models.dense import inference
from swin_moe.models.dense.norms import BatchNorm2d, move_running, norms_of
from swin_moe.models.dense.pyramid import PyramidBackbone
from swin_moe.models.dense.upernet import UPerNet, resized
from swin_moe.models.network import Network
from swin_moe.parallel.groups import Groups
from swin_moe.parallel.rank_exchange import RankExchange
from swin_moe.randomness import RandomContext
from swin_moe.tasks.base import MicroLoss, Parts, StepContext, StepDone, Task, micro_loss
from swin_moe.tasks.dense import Found, most_forwards
from swin_moe.tasks.drawing import PictureBook
from swin_moe.tasks.measures.confusion import IGNORED, Confusion

Size = tuple[int, int]


class Segment(Task):
    """Cross entropy of every labelled pixel (SwinTransformer/Swin-Transformer-Semantic-Segmentation)."""

    metric = "mIoU"
    higher_is_better = True
    needs_label_maps = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.options = config.task.segment
        self.changes_weights = self.options.norm == "batch"
        self._pictures: dict[str, np.ndarray] = {}
        weights = self.options.class_weights
        self.class_weights = torch.tensor(weights, dtype=torch.float64) if weights else None

    def build_network(self) -> Network:
        """See Task."""
        config, options = self.config, self.options
        backbone = PyramidBackbone(
            config.model, frozen_stages=options.frozen_stages, recompute=config.parallel.recompute
        )
        network = UPerNet(
            backbone,
            num_classes=config.model.num_classes,
            channels=options.channels,
            pool_scales=options.pool_scales,
            dropout=options.dropout,
            auxiliary_channels=options.auxiliary_channels,
            auxiliary_index=options.auxiliary_index,
            image_size=config.data.dense.crop if config.data.dense.crop[0] else config.model.img_size,
            official_groups=config.compat.official,
        )
        for module in network.modules():
            if isinstance(module, BatchNorm2d):
                module.frozen = options.norm == "frozen"
        return network

    def connect(self, model: nn.Module, groups: Groups) -> None:
        """See Task."""
        self._norms = norms_of(model)
        for module in self._norms.values():
            module.exchange = None if groups.world is None else RankExchange(groups.world)

    def weigh(self, batch: Batch) -> float:
        """See Task: the pixels that have a label."""
        return float((batch["label_map"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> MicroLoss:
        """See Task. With compat.official every rank divides by all of its pixels, also those without a label."""
        image, label = batch["image"], batch["label_map"]
        random = RandomContext(self.config.run.seed, context.step, batch["sample"])
        with context.autocast():
            out = model(image, random=random, size=batch.get("size"))
        task = self._cross_entropy(out.logits, label)
        if out.auxiliary is not None:
            task = task + self.options.auxiliary_weight * self._cross_entropy(out.auxiliary, label)
        if self.config.compat.official:
            forwards = self.config.accumulation(context.world_size)[1]
            task = task / (max(label.numel(), 1) * context.world_size * forwards)
        else:
            task = task / max(self.weigh(batch) if context.weight is None else context.weight, 1.0)
        return micro_loss(task, out.aux, len(image), context)

    def after_step(self, parts: Parts, done: StepDone) -> None:
        """See Task. Moves the running statistics of batch norms."""
        move_running(self._norms, parts)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], context: StepContext) -> dict[str, float]:
        """See Task: at the images' stored size, every image by itself, without padding."""
        confusion, count = None, 0
        book = PictureBook((), count=self.options.pictures)
        for batch in batches:
            confusion = confusion or Confusion(self.config.model.num_classes, batch["image"].device)
            found = self.look(model, batch, context)
            for label_map, (height, width), one in zip(batch["label_map"], batch["original_size"].tolist(), found):
                assert one.label_map is not None, "as look gives it"
                confusion.add(one.label_map, label_map[:height, :width])
            book.add(batch, found)
            count += len(found)
        assert confusion is not None, "an evaluation has a batch, which may have no image"
        total = torch.tensor([count], device=confusion.count_3K.device)
        if context.world_size > 1:
            dist.all_reduce(total)
        self._pictures = book.result(context.world_size)
        return {**confusion.result(context.world_size), "samples": float(total)}

    @torch.no_grad()
    def look(self, model: nn.Module, batch: Batch, context: StepContext) -> list[Found]:
        """See LooksAtImages. Every rank calls it; it may have no image."""
        image, groups = batch["image"], list(groups_of(batch))
        forwards = sum(self._forwards(size) for _, size, _ in groups)
        # Asked before any: a forward is a collective where ranks hold each other's experts or weights.
        more = most_forwards(forwards, image.device, context.world_size) - forwards
        found: dict[int, Found] = {}
        for rows, (height, width), original in groups:
            maps = self.probabilities(model, image[rows, :, :height, :width], original, context).argmax(dim=1)
            found |= {row: Found(label_map=label_map) for row, label_map in zip(rows, maps)}
        for _ in range(more):
            with context.autocast():
                model(image[:0])
        return [found[row] for row in range(len(image))]

    def pictures(self) -> dict[str, np.ndarray]:
        """See Task: the first validation images, what is known on the left and what was found on the right."""
        return self._pictures

    def probabilities(self, model: nn.Module, image: Tensor, original: Size, context: StepContext) -> Tensor:
        """Returns (B, K, h, w) of images of one size, as task.segment.inference, scales and flip say."""

        def logits_of(part: Tensor) -> Tensor:
            with context.autocast():
                return model(part).logits

        options = self.options
        if options.inference == "slide":
            at_size = partial(inference.slide, logits_of, crop=options.slide_crop, stride=options.slide_stride)
        else:
            at_size = partial(inference.whole, logits_of)
        size = (image.shape[2], image.shape[3])
        sizes = [inference.scaled(size, ratio) for ratio in options.scales]
        return inference.averaged(at_size, image, original, sizes=sizes, flip=options.flip)

    def _cross_entropy(self, logits: Tensor, label_BHW: Tensor) -> Tensor:
        """Returns the sum over labelled pixels, 0 without any."""
        logits = resized(logits, label_BHW.shape[1:])
        weight = None if self.class_weights is None else self.class_weights.to(logits)
        return F.cross_entropy(logits, label_BHW, weight=weight, ignore_index=IGNORED, reduction="sum")

    def _forwards(self, size: Size) -> int:
        """Returns the forwards that `probabilities` of images of this size takes."""
        options, count = self.options, 0
        for ratio in options.scales:
            scaled = inference.scaled(size, ratio)
            slides = options.inference == "slide"
            count += len(list(inference.windows(scaled, options.slide_crop, options.slide_stride))) if slides else 1
        return count * (2 if options.flip else 1)


def groups_of(batch: Batch) -> Iterator[tuple[list[int], Size, Size]]:
    """Yields (rows, size, original size) of the images of a batch that are of the same sizes, in order."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, sizes in enumerate(torch.cat([batch["size"], batch["original_size"]], dim=1).tolist()):
        found.setdefault(tuple(sizes), []).append(row)
    for (height, width, *original), rows in found.items():
        yield rows, (height, width), (original[0], original[1])
