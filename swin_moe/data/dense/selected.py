"""Views of a data set: a part of it with labels, learning from few; or with its classes as a network numbers them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from swin_moe.config import DataConfig
from swin_moe.data.dense.sample import IGNORED, Annotation, DenseDataset, DenseSample
from swin_moe.data.sets.subset import Rows
from swin_moe.randomness import PURPOSES, derive_key


class _View(Rows[DenseDataset]):
    """Images of a data set; all of it but what a view changes."""

    def __init__(self, dataset: DenseDataset, rows: np.ndarray) -> None:
        super().__init__(dataset, rows)
        self.category_ids = dataset.category_ids

    def dense_sample(self, index: int) -> DenseSample:
        """Returns the image as stored."""
        return self._dataset.dense_sample(int(self._rows[index]))

    def truth(self, index: int) -> list[Annotation]:
        """Returns the image's objects as they are evaluated."""
        return self._dataset.truth(int(self._rows[index]))

    def sizes(self) -> np.ndarray:
        """Returns (len, 2) int64, height and width."""
        return self._dataset.sizes()[self._rows]


class LabelledShare(_View):
    """A data set of which only data.dense.labelled of the images, at least one, have labels.

    Which ones is a function of (data.subset, index), alike for all runs, seeds and layouts. The others are left out, or
    come without boxes, masks and label map (data.dense.unlabelled=keep).
    """

    def __init__(self, dataset: DenseDataset, config: DataConfig) -> None:
        count = max(1, round(config.dense.labelled * len(dataset)))
        number = np.random.Philox(derive_key(config.subset, PURPOSES.index("subset"))).random_raw(len(dataset))
        chosen = np.zeros(len(dataset), dtype=bool)
        chosen[np.argsort(number, kind="stable")[:count]] = True
        keep = config.dense.unlabelled == "keep"
        super().__init__(dataset, np.arange(len(dataset)) if keep else np.flatnonzero(chosen))
        self._chosen, self.is_labelled = chosen, chosen[self._rows]  # of all images; of those that are left

    def dense_sample(self, index: int) -> DenseSample:
        """Returns the image, with its labels if it is one of the share."""
        sample = super().dense_sample(index)
        if self.is_labelled[index]:
            return sample
        masks = None if sample.masks is None else sample.masks[:0]
        return DenseSample(sample.image, sample.image_id, sample.original_size, masks=masks, labelled=False)

    def update_listing(self, update: Callable[[bytes], None]) -> None:
        """Feeds a digest with what the data set lists, and which images have labels."""
        super().update_listing(update)
        update(self._chosen.tobytes())


class RelabeledObjects(_View):
    """A data set whose labels are those of `classes`, by class name, as a network numbers them."""

    def __init__(self, dataset: DenseDataset, classes: Sequence[str], *, where: str, maps: bool) -> None:
        """Raises ValueError for a class that is none of `classes`.

        Args:
            where: Names the data set in it. maps: The classes are those of the label maps.
        """
        super().__init__(dataset, np.arange(len(dataset)))
        self._maps = maps
        number = {name: label for label, name in enumerate(classes)}
        unknown = [name for name in dataset.classes if name not in number]
        if unknown:
            raise ValueError(
                f"data.path: class {unknown[0]!r} of {where} is none of the {len(classes)} classes the network has "
                f"({', '.join(map(repr, classes[:4]))}{', ...' if len(classes) > 4 else ''})"
            )
        self._new = np.full(IGNORED + 1, IGNORED, dtype=np.int64)
        self._new[: len(dataset.classes)] = [number[name] for name in dataset.classes]
        ids = dict(zip(dataset.classes, dataset.category_ids))
        spare = max(dataset.category_ids, default=0) + 1
        self.classes, self.num_classes = tuple(classes), len(classes)
        self.category_ids = tuple(ids.get(name, spare + label) for label, name in enumerate(classes))

    def dense_sample(self, index: int) -> DenseSample:
        """Returns the image with labels in the new numbering."""
        sample = super().dense_sample(index)
        label_map = sample.label_map
        if self._maps and label_map is not None:
            label_map = self._new[label_map]
        return replace(sample, labels=self._new[sample.labels], label_map=label_map)

    def truth(self, index: int) -> list[Annotation]:
        """Returns the image's objects with labels in the new numbering."""
        return [{**row, "category_id": int(self._new[row["category_id"]])} for row in super().truth(index)]
