"""The head that draws a mask in a box, its targets, and masks of boxes back in their image.

Facts: open-mmlab/mmdetection 2.11.0, mmdet/models/roi_heads/mask_heads (fcn_mask_head.py, htc_mask_head.py).

Shape legend: R boxes, C channels, S bins per side, K classes, M = 2 S pixels per side of a mask.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import ConvModule, with_initial
from swin_moe.models.detection.sample import Sampled
from swin_moe.models.detection.spec import MaskHeadSpec
from swin_moe.models.layers import ModuleList, widened
from swin_moe.ops.detection.roi_align import roi_align

MOST_PIXELS = 1 << 16  # of masks that are drawn in one call
FEW_PIXELS = 1 << 14  # below which it does not matter that half of them are thrown away


class MaskHead(nn.Module):
    """Convolutions, a transposed one that doubles the size, and a logit per class, under the official names.

    residual: With HTC's convolution for the features of the stage before.
    """

    def __init__(self, spec: MaskHeadSpec, channels: int, num_classes: int, *, residual: bool = False) -> None:
        super().__init__()
        self.spec = spec
        widths = [channels] + [spec.channels] * spec.convs
        self.convs = ModuleList(ConvModule(a, b, 3) for a, b in zip(widths, widths[1:]))
        self.upsample = with_initial(nn.ConvTranspose2d(widths[-1], spec.channels, 2, stride=2), "he")
        self.conv_logits = with_initial(nn.Conv2d(spec.channels, num_classes, 1), "he")
        self.conv_res = ConvModule(spec.channels, channels, 1) if residual else None

    def features(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Returns (R, C, S, S).

        before: What this gave in the stage before, for a head with conv_res.
        """
        if self.conv_res is not None and before is not None:
            x = x + self.conv_res(before)
        for conv in self.convs:
            x = conv(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (R, K, M, M), in at least float32; x: what `features` gave."""
        return widened(self.conv_logits(F.relu(self.upsample(x), inplace=True)))


def mask_targets(positive: Sampled, masks: list[Tensor], size: int) -> Tensor:
    """Returns (R, size, size) bool: each row's object as its box shows it.

    masks: (G, H, W) bool of every image.
    """
    found = [positive.label.new_zeros((0, size, size)).bool()]
    for image, bitmaps in enumerate(masks):
        rows = positive.rows_of(image)
        boxes = positive.rois[rows, 1:]
        height, width = bitmaps.shape[1:]
        limit = boxes.new_tensor([width, height, width, height])
        rois = torch.cat([positive.object[rows, None].to(boxes), torch.minimum(boxes.clamp(min=0), limit)], dim=1)
        found.append(roi_align(bitmaps[:, None].to(boxes), rois, size, 1.0)[:, 0] >= 0.5)
    return torch.cat(found)


class _Window(NamedTuple):
    """The pixels of an image that a mask can be seen in."""

    row: int  # of the mask
    left: int
    right: int
    top: int
    bottom: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


def paste_masks(masks_RMM: Tensor, boxes_R4: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Returns (R, height, width) bool: masks stretched over their boxes, bilinear at pixel centres, at least threshold.

    Boxes may lie outside the image, in part or wholly, or have no area.

    size: height, width of the image.
    """
    height, width = size
    pasted = torch.zeros((len(boxes_R4), height, width), dtype=torch.bool, device=masks_RMM.device)
    windows = []
    for row, box in enumerate(boxes_R4.tolist()):
        window = _Window(row, *_pixels(box[0], box[2], width), *_pixels(box[1], box[3], height))
        if window.width > 0 and window.height > 0:
            windows.append(window)
    windows.sort(key=lambda window: (window.height * window.width, window.row))
    rows = torch.tensor([window.row for window in windows], dtype=torch.int64, device=boxes_R4.device)
    corners = boxes_R4.new_tensor([[window.left, window.top] for window in windows]).view(-1, 2)
    boxes, masks = boxes_R4[rows], masks_RMM[rows, None].to(boxes_R4.dtype)
    for part, tall, wide in _parts(windows):
        chunk, shape = windows[part], (part.stop - part.start, tall, wide)
        x, y = (_positions(corners[part, i : i + 1], (wide, tall)[i], boxes[part, i::2]) for i in (0, 1))
        grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=3)
        drawn = F.grid_sample(masks[part], grid, align_corners=False)[:, 0] >= threshold
        for window, own in zip(chunk, drawn):
            place = pasted[window.row, window.top : window.bottom, window.left : window.right]
            place.copy_(own[: window.height, : window.width])
    return pasted


def _parts(windows: list[_Window]) -> Iterator[tuple[slice, int, int]]:
    """Yields runs of windows that are drawn in one call, and the height and width that hold each of a run: of small
    ones many, as a call costs more than they do."""
    begin = used = tall = wide = 0
    for index, window in enumerate(windows):
        height, width = window.height, window.width
        pixels = height * width
        drawn = (index + 1 - begin) * max(tall, height) * max(wide, width)
        if index > begin and drawn > min(MOST_PIXELS, max(2 * (used + pixels), FEW_PIXELS)):
            yield slice(begin, index), tall, wide
            begin, used, tall, wide = index, 0, 0, 0
        used, tall, wide = used + pixels, max(tall, height), max(wide, width)
    if windows:
        yield slice(begin, len(windows)), tall, wide


def _pixels(low: float, high: float, limit: int) -> tuple[int, int]:
    """Returns first and end of the pixels of an axis that a mask can be seen in: half a bin beyond its box it is below
    half of itself."""
    if not (low < limit and high > 0):  # also of coordinates that are no numbers
        return 0, 0
    return max(math.floor(low) - 1, 0), min(math.ceil(high) + 1, limit)


def _positions(first_R1: Tensor, count: int, side_R2: Tensor) -> Tensor:
    """Returns (R, count), where the centres of pixels from each first one on lie in a box, -1 to 1; a box without
    extent has them at its middle.

    side: Low and high end of each box.
    """
    centres = first_R1 + torch.arange(count, dtype=side_R2.dtype, device=side_R2.device) + 0.5
    low, high = side_R2[:, :1], side_R2[:, 1:]
    found = (centres - low) / (high - low) * 2 - 1
    return torch.where(found.isinf(), torch.zeros_like(found), found)
