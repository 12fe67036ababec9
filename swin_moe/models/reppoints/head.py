"""What RepPoints V2 says of every cell: a set of points, twice, classes, corners nearby and what it lies in.

Facts: arXiv:2007.08508; SwinTransformer/Swin-Transformer-Object-Detection, mmdet/models/dense_heads/
reppoints_v2_head.py; names are those of its checkpoints.

Shape legend: B images, C channels, H x W cells of a level, N cells of all levels, K classes, P points of a set; X, S
as in masks.py.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import ConvModule, with_initial
from swin_moe.models.detection.anchors import grid_anchors
from swin_moe.models.layers import ModuleList, widened
from swin_moe.models.reppoints.corners import CornerPool
from swin_moe.models.reppoints.masks import SAID, PointMasks
from swin_moe.models.reppoints.spec import POINTS, PointSpec
from swin_moe.ops.detection.deform_conv import deform_conv2d

RARE = -math.log(99)  # logit of a probability of 0.01, with which logits begin
GRADIENT = 0.1  # share of what moves points that reaches the first set from what looks at them
VERIFIED = 6  # maps of both corners: a logit each, and two coordinates each


class Said(NamedTuple):
    """What the network says, in at least float32; levels follow each other, and in a level rows."""

    classes: Tensor  # (B, N, K) logits
    first: Tensor  # (B, N, 2 P), y and x of every point from its cell, in strides
    refined: Tensor  # (B, N, 2 P)
    corners: Tensor  # (B, N, 2) logits of an upper left and a lower right corner
    steps: Tensor  # (B, N, 4), x and y from the cell to each corner, in strides
    inside: Tensor  # (B, N, K) logits of lying in a box of a class
    cells: Tensor  # (N, 2), x and y in pixels
    level: Tensor  # (N,) int64
    stride: Tensor  # (N,), pixels
    sizes: list[tuple[int, int]]  # height and width of every level's map
    masks: Tensor | None = None  # (B, N, X), what draws the mask of the cell's object (masks.py)
    features: Tensor | None = None  # (B, S, H, W), from which masks are drawn

    def boxes(self, points: Tensor) -> Tensor:
        """Returns (B, N, 4) in pixels: the first two points of a set are the corners of its box.

        points: `first` or `refined`.
        """
        corners = points[..., [1, 0, 3, 2]] * self.stride[:, None]
        return corners + self.cells.repeat(1, 2)

    def middles(self) -> Tensor:
        """Returns (B, N, 2) in pixels, x and y of the mean of the first set's points."""
        points = self.first.unflatten(2, (POINTS, 2)).mean(dim=2).flip(2)
        return self.cells + points * self.stride[:, None]


class DeformedConv(nn.Module):
    """A 3 x 3 convolution without bias that reads at the points of each cell's set."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = None
        with_initial(self, 0.01)

    def reset_parameters(self) -> None:
        """Fills the weight as a convolution's; init_weights does it by its mark."""
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: Tensor, points: Tensor) -> Tensor:
        """Returns (B, out_channels, H, W); points: (B, 2 P, H, W), y and x of each from its cell."""
        taps = torch.arange(-1, 2, device=x.device, dtype=points.dtype)
        usual = torch.stack(torch.meshgrid(taps, taps, indexing="ij"), dim=2).view(1, -1, 1, 1)
        return deform_conv2d(x, points - usual, self.weight, padding=1)


class PointHead(nn.Module):
    """The head of all levels, which share it."""

    def __init__(self, spec: PointSpec) -> None:
        super().__init__()
        self.spec = spec
        channels, classes = spec.channels, spec.num_classes

        def conv(kernel: int = 3) -> ConvModule:
            initial: Literal["he"] | float = 0.01 if kernel > 1 else "he"
            return ConvModule(channels, channels, kernel, group_norm=spec.groups, initial=initial)

        def out(count: int, kernel: int, bias: float = 0.0) -> nn.Conv2d:
            return with_initial(nn.Conv2d(channels, count, kernel, padding=kernel // 2), 0.01, bias=bias)

        self.cls_convs = ModuleList(conv() for _ in range(spec.convs))
        self.reg_convs = ModuleList(conv() for _ in range(spec.convs))
        self.shared_convs = ModuleList(conv() for _ in range(spec.shared_convs))
        self.hem_tl = CornerPool(channels, spec.corner_channels, spec.groups, lower=False)
        self.hem_br = CornerPool(channels, spec.corner_channels, spec.groups, lower=True)
        self.reppoints_cls_conv = DeformedConv(channels + VERIFIED, channels)
        self.reppoints_cls_out = out(classes, 1, RARE)
        self.reppoints_pts_init_conv = out(channels, 3)
        self.reppoints_pts_init_out = out(2 * POINTS, 1)
        self.reppoints_pts_refine_conv = DeformedConv(channels + VERIFIED, channels)
        self.reppoints_pts_refine_out = out(2 * POINTS, 1)
        self.reppoints_hem_tl_score_out = out(1, 3, RARE)
        self.reppoints_hem_br_score_out = out(1, 3, RARE)
        self.reppoints_hem_tl_offset_out = out(2, 3)
        self.reppoints_hem_br_offset_out = out(2, 3)
        self.reppoints_sem_out = out(classes, 1, RARE)
        self.reppoints_sem_embedding = conv(1)
        if spec.masks is not None:
            self.mask_head = PointMasks(channels, spec.masks)
            self.controller = out(SAID, 3)

    def forward(self, maps: Sequence[Tensor]) -> Said:
        """Returns what is said of every cell; maps: (B, C, H, W) of every level."""
        levels = [self._level(x) for x in maps]
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        columns = zip(*levels)
        flat = [torch.cat([widened(x).flatten(2).transpose(1, 2) for x in column], dim=1) for column in columns]
        like = flat[0]
        origin = like.new_zeros(1, 4)
        cells = [grid_anchors(origin, *size, stride)[:, :2] for size, stride in zip(sizes, self.spec.strides)]
        counts = torch.tensor([len(own) for own in cells], device=like.device)
        level = torch.arange(len(cells), device=like.device).repeat_interleave(counts)
        stride = like.new_tensor(self.spec.strides)[level]
        classes, first, refined, corners, steps, inside, *masks = flat
        said = Said(classes, first, refined, corners, steps, inside, torch.cat(cells), level, stride, sizes)
        if self.spec.masks is None:
            return said
        return said._replace(masks=masks[0], features=self.mask_head.branch(maps))

    def _level(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the maps of Said's first six fields, and of its masks where there are any."""
        seen = points = x
        for conv in self.cls_convs:
            seen = conv(seen)
        for conv in self.reg_convs:
            points = conv(points)
        shared = points
        for conv in self.shared_convs:
            shared = conv(shared)
        inside, embedded = self.reppoints_sem_out(shared), self.reppoints_sem_embedding(shared)
        seen, points, shared = seen + embedded, points + embedded, shared + embedded
        upper, lower = self.hem_tl(shared), self.hem_br(shared)
        corners = torch.cat([self.reppoints_hem_tl_score_out(upper), self.reppoints_hem_br_score_out(lower)], dim=1)
        steps = torch.cat([self.reppoints_hem_tl_offset_out(upper), self.reppoints_hem_br_offset_out(lower)], dim=1)
        first = self.reppoints_pts_init_out(F.relu(self.reppoints_pts_init_conv(points)))
        places = widened(first)
        places = (1 - GRADIENT) * places.detach() + GRADIENT * places
        seen, points = torch.cat([seen, corners, steps], dim=1), torch.cat([points, corners, steps], dim=1)
        seen = F.relu(self.reppoints_cls_conv(seen, places))
        refined = self.reppoints_pts_refine_out(F.relu(self.reppoints_pts_refine_conv(points, places)))
        masks = () if self.spec.masks is None else (self.controller(seen),)
        return self.reppoints_cls_out(seen), first, refined + first.detach(), corners, steps, inside, *masks
