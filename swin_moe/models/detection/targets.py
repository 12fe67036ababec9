"""What a detector learns from, and what its losses are before they are divided.

Shape legend: B images, G objects and C crowd regions of an image, H x W pixels of the padded batch.
"""

from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """The objects of a batch; lists have one entry an image."""

    boxes: list[Tensor]  # (G, 4) float32
    labels: list[Tensor]  # (G,) int64, from 0
    crowd: list[Tensor]  # (C, 4) float32, regions of many objects that are not told apart
    masks: list[Tensor] | None = None  # (G, H, W) bool
    label_map: Tensor | None = None  # (B, H, W) int64, 255 = ignored


class LossSums(NamedTuple):
    """Losses by their official names: sums over this rank's rows, and how many rows they are means over."""

    sums: dict[str, Tensor]  # scalars, or one number per level
    counts: dict[str, float]

    def __or__(self, other: object) -> "LossSums":
        """Returns the losses of both."""
        assert isinstance(other, LossSums)
        return LossSums(self.sums | other.sums, self.counts | other.counts)

    def weighted(self, weight: float, prefix: str = "") -> "LossSums":
        """Returns the losses times a number, under other names."""
        sums = {prefix + name: value * weight for name, value in self.sums.items()}
        return LossSums(sums, {prefix + name: count for name, count in self.counts.items()})


def split_crowd(boxes: list[Tensor], crowd: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns the boxes of single objects, those of crowd regions, and which rows the objects were ((G,) bool)."""
    if crowd is None:
        return boxes, [b[:0] for b in boxes], [b.new_ones(len(b)).bool() for b in boxes]
    return [b[~c] for b, c in zip(boxes, crowd)], [b[c] for b, c in zip(boxes, crowd)], [~c for c in crowd]
