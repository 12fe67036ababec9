"""How well label maps are predicted, by integers that are exact on any number of ranks.

Facts: open-mmlab/mmsegmentation 0.11.0, mmseg/core/evaluation/metrics.py.

Shape legend: B images, h x w pixels, K classes.
"""

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = 255  # the label of a pixel that counts for nothing


class Confusion:
    """Pixels per class: of which prediction and label agree, that are predicted, that are labelled."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.count_3K = torch.zeros(3, num_classes, dtype=torch.int64, device=device)

    def add(self, predicted_Bhw: Tensor, label_Bhw: Tensor) -> None:
        """Counts the pixels of some images.

        Raises:
            ValueError: A label is neither a class nor IGNORED.
        """
        classes = self.count_3K.shape[1]
        valid = label_Bhw != IGNORED
        predicted, label = predicted_Bhw[valid], label_Bhw[valid]
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < classes:
            wrong = int(label.max()) if int(label.max()) >= classes else int(label.min())
            raise ValueError(f"a label map holds class {wrong}; allowed: 0 to {classes - 1}, or {IGNORED} = ignored")
        for row, values in enumerate((label[predicted == label], predicted, label)):
            self.count_3K[row] += torch.bincount(values, minlength=classes)

    def result(self, world_size: int = 1) -> dict[str, float]:
        """Returns mIoU, mAcc and aAcc, percent, over the pixels of all ranks, all of which call it.

        A class that occurs in neither predictions nor labels counts in no mean.
        """
        total = self.everywhere(world_size).double()
        agreed, predicted, labelled = total
        iou, accuracy = agreed / (predicted + labelled - agreed), agreed / labelled
        found = {"mIoU": iou.nanmean(), "mAcc": accuracy.nanmean(), "aAcc": agreed.sum() / labelled.sum()}
        return {key: 100 * float(value) for key, value in found.items()}

    def everywhere(self, world_size: int) -> Tensor:
        """Returns (3, K) int64, the counts of all ranks: agreed, predicted, labelled."""
        total = self.count_3K.clone()
        if world_size > 1:
            dist.all_reduce(total)
        return total
