"""The head that draws a mask in a box, its targets, and masks of boxes back in their image.

Facts: open-mmlab/mmdetection 2.11.0, mmdet/models/roi_heads/mask_heads (fcn_mask_head.py, htc_mask_head.py).

Shape legend: R boxes, C channels, S bins per side, K classes, M = 2 S pixels per side of a mask.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import ConvModule, with_initial
from swin_moe.models.detection.sample import Sampled
from swin_moe.models.detection.spec import MaskHeadSpec
from swin_moe.models.layers import ModuleList, widened
from swin_moe.ops.detection.roi_align import roi_align


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
        return widened(self.conv_logits(F.relu(self.upsample(x))))


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


def paste_masks(masks_RMM: Tensor, boxes_R4: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Returns (R, height, width) bool: masks stretched over their boxes, bilinear at pixel centres, at least threshold.

    Boxes may lie outside the image, in part or wholly, or have no area.

    size: height, width of the image.
    """
    height, width = size
    pasted = torch.zeros((len(boxes_R4), height, width), dtype=torch.bool, device=masks_RMM.device)
    for row, (mask, box) in enumerate(zip(masks_RMM, boxes_R4.tolist())):
        left, right = _pixels(box[0], box[2], width)
        top, bottom = _pixels(box[1], box[3], height)
        if left >= right or top >= bottom:
            continue
        x = _positions(left, right, boxes_R4[row, 0], boxes_R4[row, 2])
        y = _positions(top, bottom, boxes_R4[row, 1], boxes_R4[row, 3])
        grid = torch.stack([x[None].expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=2)[None]
        drawn = F.grid_sample(mask[None, None].to(grid.dtype), grid, align_corners=False)[0, 0]
        pasted[row, top:bottom, left:right] = drawn >= threshold
    return pasted


def _pixels(low: float, high: float, limit: int) -> tuple[int, int]:
    """Returns first and end of the pixels of an axis that a mask can be seen in: half a bin beyond its box it is below
    half of itself."""
    if not (low < limit and high > 0):  # also of coordinates that are no numbers
        return 0, 0
    return max(math.floor(low) - 1, 0), min(math.ceil(high) + 1, limit)


def _positions(first: int, end: int, low: Tensor, high: Tensor) -> Tensor:
    """Returns where pixel centres lie in a box, -1 to 1; a box without extent has them at its middle."""
    centres = torch.arange(first, end, dtype=low.dtype, device=low.device) + 0.5
    found = (centres - low) / (high - low) * 2 - 1
    return torch.where(found.isinf(), torch.zeros_like(found), found)
