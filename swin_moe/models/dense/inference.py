"""How a segmentor's logits of crops and scales become class probabilities of an image.

Facts: open-mmlab/mmsegmentation 0.11.0, mmseg/models/segmentors/{encoder_decoder,base}.py. Everything here is of images
of one size; the network is a function, so that a caller may count its calls.

Shape legend: B images of one size, K classes, H x W of an image, h x w of what it was made from (its label map).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from swin_moe.models.dense.upernet import resized

LogitsOf = Callable[[Tensor], Tensor]  # (B, channels, H, W) -> (B, K, any, any)
Size = tuple[int, int]


def scaled(size: Size, ratio: float) -> Size:
    """Returns an image's size times a ratio, halves rounded up, as the official pipeline does."""
    return (int(size[0] * ratio + 0.5), int(size[1] * ratio + 0.5))


def windows(size: Size, crop: Size, stride: Size) -> Iterator[tuple[slice, slice]]:
    """Yields the (rows, columns) of crops that cover a map, row by row; the last ones are moved inside."""
    starts = []
    for side, extent, step in zip(size, crop, stride):
        count = -(-max(side - extent, 0) // step) + 1
        starts.append([max(min(i * step + extent, side) - extent, 0) for i in range(count)])
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, min(top + crop[0], size[0])), slice(left, min(left + crop[1], size[1]))


def whole(logits_of: LogitsOf, image: Tensor) -> Tensor:
    """Returns logits (B, K, H, W) of whole images."""
    return resized(logits_of(image), image.shape[2:])


def slide(logits_of: LogitsOf, image: Tensor, *, crop: Size, stride: Size) -> Tensor:
    """Returns logits (B, K, H, W): at every pixel the mean over the crops that hold it."""
    height, width = image.shape[2:]
    total, count = None, image.new_zeros(1, 1, height, width)
    for rows, columns in windows((height, width), crop, stride):
        part = whole(logits_of, image[:, :, rows, columns])
        total = part.new_zeros(len(image), part.shape[1], height, width) if total is None else total
        total[:, :, rows, columns] += part
        count[:, :, rows, columns] += 1
    assert total is not None, "an image has a crop"
    return total / count


def probabilities(logits_of: LogitsOf, image: Tensor, original: Size) -> Tensor:
    """Returns (B, K, h, w): logits at the image's size, resized to the original's, softmax. See whole and slide."""
    return torch.softmax(resized(logits_of(image), original), dim=1)


def averaged(logits_of: LogitsOf, image: Tensor, original: Size, *, sizes: Sequence[Size], flip: bool) -> Tensor:
    """Returns (B, K, h, w), the mean of the probabilities of an image at several sizes, with `flip` mirrored ones too.

    logits_of: As whole or slide give them, at the size of what they get.
    """
    total, count = None, 0
    for size in sizes:
        scaled = resized(image, size)
        for mirrored in (False, True) if flip else (False,):
            found = probabilities(logits_of, scaled.flip(3) if mirrored else scaled, original)
            found = found.flip(3) if mirrored else found
            total, count = found if total is None else total + found, count + 1
    assert total is not None, "there is a size"
    return total / count
