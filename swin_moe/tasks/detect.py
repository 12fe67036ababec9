"""Object detection and instance segmentation: boxes, classes and masks, by a detector on any Swin network.

A loss is a mean over what it counts (sampled anchors, sampled boxes, masks) on all ranks of a step, so nothing depends
on which rank has which image; batch norm in heads sees the boxes of all ranks.

Shape legend: B images of this micro-batch, n objects of an image, H x W the padded batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_moe.config import Config
from swin_moe.data.batch import Batch
from swin_moe.models.dense.norms import move_running, norms_of
from swin_moe.models.detection.detections import Detections
from swin_moe.models.detection.heads.mask_head import paste_masks
from swin_moe.models.detection.network import Learned
from swin_moe.models.detection.targets import LossSums, Targets, split_crowd
from swin_moe.models.network import Network
from swin_moe.parallel.groups import Groups
from swin_moe.parallel.rank_exchange import RankExchange
from swin_moe.randomness import RandomContext
from swin_moe.tasks.base import MicroLoss, Parts, StepContext, StepDone, Task, micro_loss
from swin_moe.tasks.dense import Found, most_forwards
from swin_moe.tasks.detectors import build_detector
from swin_moe.tasks.drawing import PictureBook
from swin_moe.tasks.measures.coco import CocoEvaluation

Detects = Callable[..., list[Detections]]  # (image, size, original=) as ObjectNetwork.forward without targets


class Detect(Task):
    """The losses of a detector (SwinTransformer/Swin-Transformer-Object-Detection)."""

    higher_is_better = True
    needs_boxes = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.options = config.task.detect
        self.metric = "mask_AP" if self.options.masks else "box_AP"
        self.changes_weights = self.options.box_norm
        self.needs_label_maps = self.options.semantic_classes > 0
        self._pictures: dict = {}

    def build_network(self) -> Network:
        """See Task."""
        return build_detector(self.config)

    def connect(self, model: nn.Module, groups: Groups) -> None:
        """See Task."""
        self._norms = norms_of(model)
        for module in self._norms.values():
            module.exchange = None if groups.world is None else RankExchange(groups.world)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> MicroLoss:
        """See Task. With compat.official every rank divides by what it counts itself."""
        image = batch["image"]
        random = RandomContext(self.config.run.seed, context.step, batch["sample"])
        with context.autocast():
            learned = model(image, batch["size"], self.targets_of(batch), random=random)
        return self.divided(learned, len(image), image.device, context)

    def divided(self, learned: Learned, images: int, device: torch.device, context: StepContext) -> MicroLoss:
        """Returns the loss of a micro-batch of so many images from the sums of its losses."""
        if self.config.compat.official:
            share = images / context.num_samples
            task = _total(learned.losses, learned.losses.counts) * share
        else:
            task = _total(learned.losses, self._everywhere(learned.losses.counts, device, context))
        return micro_loss(task, learned.aux, images, context)

    def after_step(self, parts: Parts, done: StepDone) -> None:
        """See Task. Moves the running statistics of batch norms."""
        move_running(self._norms, parts)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], context: StepContext) -> dict[str, float]:
        """See Task: COCO's average precision, in pixels of the stored images."""
        (result,) = self.measured([model], batches, context)
        return result

    def measured(
        self, detectors: Sequence[Detects], batches: Iterable[Batch], context: StepContext
    ) -> list[dict[str, float]]:
        """Returns the average precision of several detectors on the same images; pictures are of the first one."""
        options = self.options
        classes, official = self.config.model.num_classes, self.config.compat.official
        found_by = [CocoEvaluation(classes, masks=options.masks, official=official) for _ in detectors]
        names = [str(label) for label in range(classes)]
        book = PictureBook(names, count=options.pictures, threshold=options.picture_score)
        for batch in batches:
            for detector, evaluation in zip(detectors, found_by):
                found = self.look(detector, batch, context)
                if evaluation is found_by[0]:
                    book.add(batch, found)
                for row, one in enumerate(found):
                    height, width = batch["original_size"][row].tolist()
                    assert one.boxes is not None and one.scores is not None and one.labels is not None, "objects"
                    rows = (batch["truth"][row], one.boxes, one.scores, one.labels, one.masks)
                    evaluation.add(int(batch["image_id"][row]), (height, width), *rows)
        self._pictures = book.result(context.world_size)
        return [evaluation.result(context.world_size) for evaluation in found_by]

    def pictures(self) -> dict:
        """See Task: truth beside what was found."""
        return self._pictures

    @torch.no_grad()
    def look(self, model: Detects, batch: Batch, context: StepContext) -> list[Found]:
        """See LooksAtImages. An image is looked at as padded by itself, so that no other image changes what is found;
        the images of one padded size are one forward. Collective: every rank makes as many forwards."""
        image, size, original = batch["image"], batch["size"], batch["original_size"]
        groups = list(groups_of(size, self.config.data.dense.divisor))
        if self.options.flip or self.options.scales != (1.0,):  # views are of one image
            groups = [([row], padded) for rows, padded in groups for row in rows]
        results: list[Found | None] = [None] * len(image)
        # Asked before any: forwards may be collectives.
        more = most_forwards(len(groups), image.device, context.world_size) - len(groups)
        for rows, (height, width) in groups:
            with context.autocast():
                found = model(fitted(image[rows], height, width), size[rows], original=original[rows])
            for row, one in zip(rows, found):
                masks = one.drawn
                if one.masks is not None:
                    stored = (int(original[row, 0]), int(original[row, 1]))
                    masks = paste_masks(one.masks, one.boxes, stored, self.options.mask_threshold)
                results[row] = Found(one.boxes, one.scores, one.labels, masks)
        for _ in range(more):
            with context.autocast():
                model(image[:0], size[:0], original=original[:0])
        return [one for one in results if one is not None]

    def targets_of(self, batch: Batch) -> Targets:
        """Returns the objects of a batch; crowd regions are none."""
        boxes, crowd, single = split_crowd(batch["boxes"], batch.get("crowd"))
        labels = [label[rows] for label, rows in zip(batch["labels"], single)]
        masks = None
        if self.options.masks:
            masks = [mask[rows] for mask, rows in zip(batch["masks"], single)]
        return Targets(boxes, labels, crowd, masks, batch.get("label_map") if self.needs_label_maps else None)

    def _everywhere(self, counts: dict[str, float], device: torch.device, context: StepContext) -> dict[str, float]:
        """Returns the counts of all ranks."""
        if context.world_size == 1:
            return counts
        total = torch.tensor(list(counts.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return dict(zip(counts, total.tolist()))


def _total(losses: LossSums, counts: dict[str, float]) -> Tensor:
    """Returns the sum of all losses, each divided by its count; those that count nothing are 0."""
    return torch.stack([value.sum() / max(counts[name], 1.0) for name, value in losses.sums.items()]).sum()


def fitted(image: Tensor, height: int, width: int) -> Tensor:
    """Returns (B, 3, height, width), images with less or more of the zeros on the right and at the bottom."""
    image = image[:, :, :height, :width]
    return nn.functional.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]))


def groups_of(size_B2: Tensor, divisor: int) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yields (rows, padded (height, width)) of images whose sizes round up to the same multiples of `divisor`."""
    found: dict[tuple[int, int], list[int]] = {}
    for row, (height, width) in enumerate(size_B2.tolist()):
        found.setdefault((-(-height // divisor) * divisor, -(-width // divisor) * divisor), []).append(row)
    for padded, rows in found.items():
        yield rows, padded
