"""What the loaders of data/loader.py are given where a task needs boxes or label maps: data set, source and orders.

Which images a step holds, how they are moved and what they are padded to are functions of (seed, step), as there: the
moves of an image are planned from its stored size (augment.py), so the padded size of a whole step is known without
decoding the images of other ranks.

Shape legend: B images of a micro-batch (0 is legal), H height, W width of the padded batch.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch

from swin_moe.config import DataConfig
from swin_moe.data.batch import Batch
from swin_moe.data.dense.augment import Plan, Planner, TrainingPlanner, View, build_planner
from swin_moe.data.dense.collate import collate, evaluation_fields, pack, padded_size, unpack
from swin_moe.data.dense.mixed import WithUnlabelled, check_mixed, mixed_order
from swin_moe.data.dense.sample import Annotation, DenseDataset, DenseSample
from swin_moe.data.dense.selected import LabelledShare, RelabeledObjects
from swin_moe.data.pixels import BrokenImage
from swin_moe.data.source import Request
from swin_moe.data.transforms import augment_key
from swin_moe.randomness import derive_key
from swin_moe.registry import check_members, lookup

DENSE_DATASETS = {
    "canvases": "swin_moe.data.dense.canvases:Canvases",
    "coco": "swin_moe.data.dense.coco:Coco",
    "label_maps": "swin_moe.data.dense.label_maps:LabelMaps",
}


def build_dense_dataset(
    config: DataConfig, split: str, *, boxes: bool, label_maps: bool, num_classes: int = 0, classes: Sequence[str] = ()
) -> DenseDataset:
    """Returns the data set data.name; `split` is "train" or "val".

    Args:
        boxes, label_maps: What is needed of it. Its classes are the label map's where no boxes are; with both, label
            maps are for training only, and may have classes of their own (HTC's semantic branch).
        num_classes: What label maps without names of their classes have.
        classes: What the network's outputs stand for; () = as the data numbers them.

    Raises:
        ValueError: Something is missing or malformed, or data.name has no boxes or label maps.
    """
    needs = " and ".join(word for word, is_needed in (("boxes", boxes), ("label maps", label_maps)) if is_needed)
    if config.name in ("digits", "folder", "zip", "imagenet22k", "lists", "synthetic"):
        names = ", ".join(DENSE_DATASETS)
        raise ValueError(f"data.name={config.name} has no {needs}, which task.name needs; allowed: {names}")
    if config.images_per_class:
        raise ValueError(
            f"data.images_per_class={config.images_per_class} is not for {needs}; data.dense.labelled takes a part"
        )
    row = lookup(DENSE_DATASETS, config.name, key="data.name")
    dataset: DenseDataset = row(config, split, boxes=boxes, maps=label_maps, num_classes=num_classes)
    check_members(dataset, DenseDataset, chosen=f"data.name={config.name}", where="data/dense/sample.py: DenseDataset")
    if classes and tuple(classes) != dataset.classes:
        dataset = RelabeledObjects(dataset, classes, where=config.path or config.name, maps=not boxes)
    if split == "train" and config.dense.labelled < 1:
        dataset = LabelledShare(dataset, config)
    return WithUnlabelled(dataset, config) if split == "train" and config.dense.unlabelled_images else dataset


class DenseSource:
    """Loads, moves and joins the images of one Request; picklable, as data/source.py: ImageSource."""

    needs_partners = False
    needs_peers = True

    def __init__(
        self,
        dataset: DenseDataset,
        config: DataConfig,
        *,
        seed: int,
        train: bool,
        boxes: bool,
        label_maps: bool,
        views: bool = False,
    ) -> None:
        """views: Images with and without labels are mixed, and of those without a batch has a teacher's view too.

        Raises:
            ValueError: With `views`: there are not both kinds, or nothing is in those with labels.
        """
        self._dataset = dataset
        self._planner = build_planner(config, train=train)
        self.is_labelled = check_mixed(dataset, config) if views else None  # (N,) bool; None = images are not mixed
        views_of: tuple[View, ...] = ("labelled", "student", "teacher")
        self._views: dict[View, Planner] = {view: TrainingPlanner(config, view) for view in views_of} if views else {}
        self._ratio = config.dense.sample_ratio
        self._divisor = config.dense.divisor
        self._over_step, self._group_shapes = config.dense.pad_over == "step", config.dense.group_shapes
        self._seed, self._train = seed, train
        self._boxes, self._label_maps = boxes, label_maps and (train or not boxes)  # objects are evaluated by boxes
        self._sizes = dataset.sizes()
        self.is_wide = self._sizes[:, 1] > self._sizes[:, 0]  # (N,)

    def plan(self, epoch: int, index: int, turn: tuple[int, int] = (0, 0), *, teacher: bool = False) -> Plan:
        """Returns what is done to an image of the data set in this epoch.

        Args:
            turn: (step, place in it), of images that are mixed, as one may come several times in an epoch.
            teacher: For the teacher, of an image without labels.
        """
        height, width = self._sizes[index]
        key, planner = augment_key(self._seed, epoch, index), self._planner
        if self.is_labelled is not None:
            key = derive_key(key, *turn, int(teacher))
            planner = self._views["teacher" if teacher else "labelled" if self.is_labelled[index] else "student"]
        return planner(int(height), int(width), key)

    def order(self, epoch: int, plain: np.ndarray, batch: int) -> np.ndarray:
        """Returns (N,) the images in the order of an epoch, from a `plain` permutation of them.

        batch: Images of a step.
        """
        if self.is_labelled is not None:
            return mixed_order(self.is_labelled, self._ratio, seed=self._seed, epoch=epoch)
        return group_by_shape(plain, self.is_wide, batch) if self._group_shapes else plain

    def _plans(self, request: Request, *, teacher: bool = False) -> list[Plan]:
        """Returns the moves of all images that are padded together, or of all that the teacher sees."""
        index, places = request.index, request.sample
        if self._over_step and request.peers is not None:
            index, places = request.peers, np.arange(len(request.peers))
        seen = zip(index.tolist(), places.tolist())
        return [
            self.plan(request.epoch, image, (request.step, place), teacher=teacher)
            for image, place in seen
            if not (teacher and self.is_labelled is not None and self.is_labelled[image])
        ]

    def _padded(self, plans: list[Plan]) -> tuple[int, int]:
        sizes = np.asarray([plan.size for plan in plans], dtype=np.int64).reshape(-1, 2)
        return padded_size(sizes, self._divisor)

    def padded(self, epoch: int, indices: np.ndarray) -> tuple[int, int]:
        """Returns (H, W) that these images are padded to together, where images are not mixed."""
        return self._padded([self.plan(epoch, int(index)) for index in indices])

    def __getitem__(self, request: Request) -> tuple[Batch, list[tuple[str, str]]]:
        """Returns (packed batch, (path, reason) of each broken image, which the batch lacks)."""
        samples: list[DenseSample] = []
        stored: list[DenseSample] = []
        truths: list[list[Annotation]] = []
        views: list[DenseSample] = []
        numbers: list[int] = []
        broken: list[tuple[str, str]] = []
        for sample, index in zip(request.sample, request.index):
            try:
                loaded = self._dataset.dense_sample(int(index))
            except BrokenImage as error:
                broken.append((error.path, error.reason))
                continue
            turn = request.step, int(sample)
            samples.append(self._move(loaded, request.epoch, int(index), turn))
            numbers.append(int(sample))
            if self.is_labelled is not None and not loaded.labelled:
                views.append(self._move(loaded, request.epoch, int(index), turn, teacher=True))
            if not self._train:
                stored.append(loaded)
                truths.append(self._dataset.truth(int(index)) if self._boxes else [])
        size = self._padded(self._plans(request))
        fields = collate(samples, size, boxes=self._boxes, label_maps=self._label_maps, masks=self._train)
        if not self._train:
            fields |= evaluation_fields(stored, truths, boxes=self._boxes, label_maps=self._label_maps)
        if self.is_labelled is not None:
            seen = collate(views, self._padded(self._plans(request, teacher=True)), boxes=False, label_maps=False)
            fields |= {"view": seen["image"], "view_size": seen["size"], "view_matrix": seen["matrix"]}
        fields |= {"sample": torch.tensor(numbers, dtype=torch.int64), "epoch": request.epoch, "step": request.step}
        return cast(Batch, pack(fields)), broken

    def unpack(self, batch: Batch) -> Batch:
        """Returns a batch as tasks get it, of one that __getitem__ gave, maybe in another process."""
        return cast(Batch, unpack(cast(dict, batch)))

    def _move(
        self, sample: DenseSample, epoch: int, index: int, turn: tuple[int, int], *, teacher: bool = False
    ) -> DenseSample:
        try:
            return self.plan(epoch, index, turn, teacher=teacher).apply(sample)
        except Exception as error:
            error.add_note(f"while moving {self._dataset.path(index)}")
            raise

    def shares(self, rank: int, world_size: int, batch: int) -> list[np.ndarray]:
        """Returns the data set's indices of each evaluation batch of a rank.

        Image i belongs to rank i % world_size. Images share a batch only where each alone would be padded to the same
        size, so that no result depends on who else is in the batch, nor on the number of ranks. Every rank has as many
        batches as the one that needs most; the last may be empty.
        """
        own = [padded_size(np.asarray([self.plan(0, index).size]), self._divisor) for index in range(len(self._sizes))]
        batches = [_one_size(own, range(r, len(own), world_size), batch) for r in range(world_size)]
        mine, most = batches[rank], max(map(len, batches))
        return mine + [np.zeros(0, dtype=np.int64)] * (most - len(mine))


def _one_size(sizes: Sequence[tuple[int, int]], indices: Iterable[int], batch: int) -> list[np.ndarray]:
    groups: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        groups.setdefault(sizes[index], []).append(index)
    cuts = [group[at : at + batch] for _, group in sorted(groups.items()) for at in range(0, len(group), batch)]
    return [np.asarray(cut, dtype=np.int64) for cut in cuts]


def group_by_shape(order: np.ndarray, is_wide: np.ndarray, batch: int) -> np.ndarray:
    """Returns the same indices (N,) in batches of one shape, for images that are wider than high, and others.

    The order is cut into a queue for each shape; a batch comes where its last image stands in `order`. What is left of
    both comes last, so that one batch may be mixed, and the last is smaller.
    """
    wide = is_wide[order]
    batches: list[tuple[int, np.ndarray]] = []
    rest: list[np.ndarray] = []
    for shape in (True, False):
        places = np.flatnonzero(wide == shape)
        whole = len(places) // batch * batch
        batches += [(int(cut[-1]), cut) for cut in places[:whole].reshape(-1, batch)]
        rest.append(places[whole:])
    cuts = [cut for _, cut in sorted(batches, key=lambda pair: pair[0])]
    return order[np.concatenate([*cuts, *rest])] if len(order) else order
