"""A part of the training images with labels, the others without: learning from few."""

from dataclasses import replace

import numpy as np

from swin_moe.config import DataConfig
from swin_moe.data.dense.sample import Annotation, DenseDataset, DenseSample
from swin_moe.randomness import PURPOSES, derive_key


class LabelledShare:
    """A data set of which only data.dense.labelled of the images, at least one, have labels.

    Which ones is a function of (data.subset, index), alike for all runs, seeds and layouts. The others are left out, or
    come without boxes, masks and label map (data.dense.unlabelled=keep).
    """

    def __init__(self, dataset: DenseDataset, config: DataConfig) -> None:
        self._dataset = dataset
        self.classes, self.num_classes = dataset.classes, dataset.num_classes
        self.category_ids = dataset.category_ids
        count = max(1, round(config.dense.labelled * len(dataset)))
        number = np.random.Philox(derive_key(config.subset, PURPOSES.index("subset"))).random_raw(len(dataset))
        self.is_labelled = np.zeros(len(dataset), dtype=bool)
        self.is_labelled[np.argsort(number, kind="stable")[:count]] = True
        keep = config.dense.unlabelled == "keep"
        self._rows = np.arange(len(dataset)) if keep else np.flatnonzero(self.is_labelled)

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> str:
        """Returns what to call this image in messages."""
        return self._dataset.path(int(self._rows[index]))

    def dense_sample(self, index: int) -> DenseSample:
        """Returns the image, with its labels if it is one of the share."""
        row = int(self._rows[index])
        sample = self._dataset.dense_sample(row)
        if self.is_labelled[row]:
            return sample
        bare = DenseSample(sample.image, sample.image_id, sample.original_size, labelled=False)
        masks = None if sample.masks is None else sample.masks[:0]
        return replace(bare, masks=masks)

    def truth(self, index: int) -> list[Annotation]:
        """Returns the image's objects."""
        return self._dataset.truth(int(self._rows[index]))

    def sizes(self) -> np.ndarray:
        """Returns (len, 2) int64, height and width."""
        return self._dataset.sizes()[self._rows]

    def labels(self) -> np.ndarray:
        """Returns (len,) a number per image."""
        return self._dataset.labels()[self._rows]

    def update_listing(self, update: object) -> None:
        """Feeds a digest with the listing chosen from, and what was chosen."""
        assert callable(update)
        if hasattr(self._dataset, "update_listing"):
            self._dataset.update_listing(update)
        update(np.flatnonzero(self.is_labelled).astype("<i8").tobytes())
