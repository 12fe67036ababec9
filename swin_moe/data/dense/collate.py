"""Images of different sizes as one batch: normalized, then padded with zeros on the right and at the bottom.

Shape legend: B images, N objects of an image, H height, W width of the padded batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swin_moe.data.dense.sample import IGNORED, Annotation, DenseSample
from swin_moe.data.transforms import to_tensor


def padded_size(sizes: np.ndarray, divisor: int) -> tuple[int, int]:
    """Returns (H, W) that all sizes (B, 2) fit in, multiples of the divisor; that of one pixel without any."""
    height, width = sizes.max(0) if len(sizes) else (1, 1)
    return int(-(-height // divisor) * divisor), int(-(-width // divisor) * divisor)


def _pad(values: np.ndarray, size: tuple[int, int], fill: int | bool) -> np.ndarray:
    """Returns (..., H, W), the values (..., h, w) in its upper left corner."""
    padded = np.full((*values.shape[:-2], *size), fill, dtype=values.dtype)
    padded[..., : values.shape[-2], : values.shape[-1]] = values
    return padded


def _stack(values: Sequence[Any], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(np.asarray(values).reshape(len(values), *shape)).to(dtype)


def label_maps_of(maps: Sequence[np.ndarray | None], size: tuple[int, int]) -> Tensor:
    """Returns (B, H, W) int64, 255 beyond each map and where there is none."""
    rows = np.full((len(maps), *size), IGNORED, dtype=np.int64)
    for row, label_map in zip(rows, maps):
        if label_map is not None:
            row[: label_map.shape[0], : label_map.shape[1]] = label_map
    return torch.from_numpy(rows)


def collate(
    samples: Sequence[DenseSample], size: tuple[int, int], *, boxes: bool, label_maps: bool, masks: bool = True
) -> dict[str, Any]:
    """Returns the fields of a Batch that the samples tell.

    Args:
        size: (H, W) that all of them fit in.
        boxes, label_maps: Which of both to give. masks: With the boxes, where there are any.
    """
    image = torch.zeros(len(samples), 3, *size)
    for row, sample in zip(image, samples):
        row[:, : sample.image.height, : sample.image.width] = to_tensor(sample.image)
    fields: dict[str, Any] = {
        "image": image,
        "target": torch.zeros(len(samples), dtype=torch.int64),
        "size": _stack([sample.size for sample in samples], (2,), torch.int64),
        "original_size": _stack([sample.original_size for sample in samples], (2,), torch.int64),
        "image_id": _stack([sample.image_id for sample in samples], (), torch.int64),
        "matrix": _stack([sample.matrix for sample in samples], (3, 3), torch.float64),
        "labelled": _stack([sample.labelled for sample in samples], (), torch.bool),
    }
    if boxes:
        fields["boxes"] = [torch.from_numpy(sample.boxes).float() for sample in samples]
        fields["labels"] = [torch.from_numpy(sample.labels).clone() for sample in samples]
        fields["crowd"] = [torch.from_numpy(sample.crowd).clone() for sample in samples]
        found = [sample.masks for sample in samples]
        if masks and all(mask is not None for mask in found):
            fields["masks"] = [torch.from_numpy(_pad(mask, size, False)) for mask in found if mask is not None]
    if label_maps:
        fields["label_map"] = label_maps_of([sample.label_map for sample in samples], size)
    return fields


def evaluation_fields(
    samples: Sequence[DenseSample], truths: Sequence[list[Annotation]], *, boxes: bool, label_maps: bool
) -> dict[str, Any]:
    """Returns what replaces a batch's fields in evaluation, from the images as stored: `truth`, and label_map (B, H, W)
    of the largest stored size, of which each image's `original_size` counts."""
    fields: dict[str, Any] = {"truth": list(truths)} if boxes else {}
    if label_maps:
        sizes = np.asarray([sample.original_size for sample in samples]).reshape(-1, 2)
        fields["label_map"] = label_maps_of([sample.label_map for sample in samples], padded_size(sizes, 1))
    return fields


_LISTS = ("boxes", "labels", "crowd", "masks")


def pack(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields with one tensor for all images of each list, and how many rows are whose: "counts".

    A loader process hands over a file descriptor for every tensor, and there are only so many.
    """
    if "boxes" not in fields:
        return fields
    packed = {key: torch.cat(fields[key]) for key in _LISTS if fields.get(key)}
    return fields | packed | {"counts": [len(boxes) for boxes in fields["boxes"]]}


def unpack(packed: dict[str, Any]) -> dict[str, Any]:
    """Returns what was packed, the lists' tensors as views."""
    fields = dict(packed)
    counts = fields.pop("counts", [])
    for key in _LISTS:
        if isinstance(fields.get(key), Tensor):
            fields[key] = list(fields[key].split(counts))
    return fields
