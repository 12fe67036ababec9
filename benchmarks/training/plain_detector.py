"""Mask R-CNN on a small Swin, written plainly in torch: what detector_step.py measures ours against.

Functions of a dict of parameters under the official names, whose stages have one block each, so that no window is
shifted. Nothing here is imported from this project. tests/benchmarks/test_plain_detector.py holds that losses,
gradients and detections are those of ours where both learn from all candidates.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
LARGEST_STEP = abs(math.log(16 / 1000))


@dataclass(frozen=True)
class Numbers:
    """What is not in the parameters' shapes. The defaults are those of configs/debug/canvas_mask_rcnn.yaml."""

    heads: tuple[int, ...] = (1, 2, 4, 8)
    window: int = 4
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    anchor_scale: float = 5.0
    anchors: int = 64
    boxes: int = 32
    proposals_per_level: int = 150
    proposals: int = 50
    finest_scale: float = 14.0
    classes: int = 10


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def norm(p: Params, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def conv(p: Params, name: str, x: Tensor) -> Tensor:
    weight = p[f"{name}.weight"]
    return F.conv2d(x, weight, p[f"{name}.bias"], padding=weight.shape[2] // 2)


def attend(p: Params, name: str, x: Tensor, heads: int, window: int) -> Tensor:
    """Returns (B, H, W, C): attention inside windows, the map padded to whole ones."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns, tokens = x.shape[1] // window, x.shape[2] // window, window * window
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3).reshape(-1, tokens, channels)
    qkv = linear(p, f"{name}.qkv", x).view(-1, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    apart = place[:, :, None] - place[:, None] + window - 1
    table = p[f"{name}.relative_position_bias_table"]
    bias = table[apart[0] * (2 * window - 1) + apart[1]].permute(2, 0, 1)
    scores = (qkv[0] * (channels // heads) ** -0.5) @ qkv[1].transpose(2, 3) + bias
    x = (scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(-1, tokens, channels)
    x = linear(p, f"{name}.proj", x).view(batch, rows, columns, window, window, channels)
    return x.transpose(2, 3).reshape(batch, rows * window, columns * window, channels)[:, :height, :width]


def pyramid(p: Params, n: Numbers, image: Tensor) -> list[Tensor]:
    """Returns the maps of all levels of the feature pyramid."""
    patch = p["backbone.patch_embed.proj.weight"]
    x = F.conv2d(image, patch, p["backbone.patch_embed.proj.bias"], stride=patch.shape[2])
    x = norm(p, "backbone.patch_embed.norm", x.permute(0, 2, 3, 1))
    maps = []
    for stage, heads in enumerate(n.heads):
        block = f"backbone.layers.{stage}.blocks.0"
        x = x + attend(p, f"{block}.attn", norm(p, f"{block}.norm1", x), heads, n.window)
        x = x + linear(p, f"{block}.mlp.fc2", F.gelu(linear(p, f"{block}.mlp.fc1", norm(p, f"{block}.norm2", x))))
        maps.append(norm(p, f"backbone.norm{stage}", x).permute(0, 3, 1, 2))
        if stage + 1 < len(n.heads):
            merge = f"backbone.layers.{stage}.downsample"
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
            x = linear(p, f"{merge}.reduction", norm(p, f"{merge}.norm", x))
    sums = [conv(p, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in range(len(sums) - 1, 0, -1):
        sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[2:], mode="nearest")
    levels = [conv(p, f"neck.fpn_convs.{i}.conv", x) for i, x in enumerate(sums)]
    return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Returns intersections over unions (A, B)."""
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(1) for x in (a, b))
    shared = (torch.min(a[:, None, 2:], b[:, 2:]) - torch.max(a[:, None, :2], b[:, :2])).clamp(min=0).prod(2)
    return shared / (area_a[:, None] + area_b - shared).clamp(min=1e-6)


def encode(boxes: Tensor, targets: Tensor, stds: Tensor) -> Tensor:
    side, wanted = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    steps = ((targets[:, :2] + targets[:, 2:]) - (boxes[:, :2] + boxes[:, 2:])) / 2 / side
    return torch.cat([steps, (wanted / side).log()], 1) / stds


def decode(boxes: Tensor, codes: Tensor, stds: Tensor, size: Tensor) -> Tensor:
    """Returns boxes (R, ..., 4) of codes (R, ..., 4), clipped to an image of this (height, width)."""
    while boxes.dim() < codes.dim():
        boxes = boxes[:, None]
    codes = codes * stds
    side, centre = boxes[..., 2:] - boxes[..., :2], (boxes[..., :2] + boxes[..., 2:]) / 2
    half = side * codes[..., 2:].clamp(-LARGEST_STEP, LARGEST_STEP).exp() / 2
    centre = centre + side * codes[..., :2]
    limit = size.flip(0).repeat(2).to(boxes)
    return torch.min(torch.cat([centre - half, centre + half], -1).clamp(min=0), limit)


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Returns the boxes that stay, best first: no worse one of the same group overlaps by more."""
    order = scores.argsort(descending=True, stable=True)
    apart = boxes[order] + groups[order, None].to(boxes) * (boxes.max() + 1 if len(boxes) else 0)
    meets, gone = overlaps(apart, apart) > threshold, torch.zeros(len(order), dtype=torch.bool)
    for row in range(len(order)):
        if not gone[row]:
            gone[row + 1 :] |= meets[row, row + 1 :]
    return order[~gone]


def bins(low: Tensor, high: Tensor, count: int, cells: int) -> Tensor:
    """Returns (R, count, cells), what every cell of an axis weighs in the mean of every bin of a box."""
    low, high = low - 0.5, high - 0.5
    side = (high - low) / count
    samples = side.ceil().clamp(min=0)
    k = torch.arange(int(samples.max()) if len(samples) else 0)
    start = low[:, None] + torch.arange(count) * side[:, None]
    place = start[:, :, None] + (k + 0.5) * (side / samples.clamp(min=1))[:, None, None]
    counts = (place >= -1) & (place <= cells) & (k < samples[:, None, None])
    place = place.clamp(0, cells - 1)
    hats = (1 - (place[..., None] - torch.arange(cells)).abs()).clamp(min=0) * counts[..., None]
    return hats.sum(2) / samples.clamp(min=1)[:, None, None]


def align(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """Returns (R, C, size, size): RoIAlign by two matrices for every box."""
    box = rois[:, 1:] * scale
    down = bins(box[:, 1], box[:, 3], size, x.shape[2])[:, None]
    along = bins(box[:, 0], box[:, 2], size, x.shape[3])[:, None]
    return down @ x[rois[:, 0].long()] @ along.transpose(2, 3)


def regions(n: Numbers, maps: list[Tensor], rois: Tensor, size: int) -> Tensor:
    side = (rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt()
    level = (side / n.finest_scale + 1e-6).log2().floor().clamp(0, len(maps) - 2)
    out = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for i, stride in enumerate(n.strides[:-1]):
        rows = (level == i).nonzero().flatten()
        out = out.index_add(0, rows, align(maps[i], rois[rows], size, 1 / stride))
    return out


def assign(candidates: Tensor, objects: Tensor, positive: float, negative: float, low: float) -> Tensor:
    """Returns 1 + the object of every candidate, 0 for background and -1 for neither."""
    if not len(objects):
        return torch.zeros(len(candidates), dtype=torch.long)
    overlap = overlaps(objects, candidates)
    best, which = overlap.max(0)
    assigned = torch.where(best >= positive, which + 1, torch.where(best < negative, 0, -1))
    for number, row in enumerate(overlap):
        if len(row) and row.max() >= low:
            assigned[row == row.max()] = number + 1
    return assigned


def sample(assigned: Tensor, count: int, share: float) -> tuple[Tensor, Tensor]:
    """Returns indices of positive and of negative candidates, drawn at random where there are more."""
    positive, negative = (assigned > 0).nonzero().flatten(), (assigned == 0).nonzero().flatten()
    if len(positive) > int(count * share):
        positive = positive[torch.randperm(len(positive))[: int(count * share)]]
    if len(negative) > count - len(positive):
        negative = negative[torch.randperm(len(negative))[: count - len(positive)]]
    return positive, negative


class Scored:
    """What the proposal network says of every anchor."""

    def __init__(self, p: Params, n: Numbers, maps: list[Tensor]) -> None:
        logits, codes, anchors, level = [], [], [], []
        for i, (x, stride) in enumerate(zip(maps, n.strides)):
            hidden = F.relu(conv(p, "rpn_head.rpn_conv", x))
            logits.append(conv(p, "rpn_head.rpn_cls", hidden).permute(0, 2, 3, 1).flatten(1))
            codes.append(conv(p, "rpn_head.rpn_reg", hidden).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
            root, base = torch.tensor([0.5, 1.0, 2.0]).sqrt(), stride * n.anchor_scale
            half = torch.stack([base / root, base * root], 1) / 2
            y, x_ = torch.meshgrid(*(torch.arange(side) * stride for side in x.shape[2:]), indexing="ij")
            centre = torch.stack([x_, y], 2).view(-1, 1, 2).float()
            anchors.append(torch.cat([centre - half, centre + half], 2).view(-1, 4))
            level.append(torch.full((len(anchors[-1]),), i))
        self.logits, self.codes = torch.cat(logits, 1), torch.cat(codes, 1)
        self.anchors, self.level = torch.cat(anchors), torch.cat(level)

    @torch.no_grad()
    def proposals(self, n: Numbers, image: int, size: Tensor) -> Tensor:
        scores, kept = self.logits[image].sigmoid(), []
        for level in range(len(n.strides)):
            rows = (self.level == level).nonzero().flatten()
            best = scores[rows].argsort(descending=True, stable=True)[: n.proposals_per_level]
            kept.append(rows[best] if len(rows) > n.proposals_per_level else rows)
        rows = torch.cat(kept)
        boxes = decode(self.anchors[rows], self.codes[image, rows], torch.ones(4), size)
        return boxes[suppress(boxes, scores[rows], self.level[rows], 0.7)[: n.proposals]]


STDS = torch.tensor([0.1, 0.1, 0.2, 0.2])


def boxes_of(p: Params, n: Numbers, maps: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
    x = regions(n, maps, rois, 7).flatten(1)
    for i in (0, 1):
        x = F.relu(linear(p, f"roi_head.bbox_head.shared_fcs.{i}", x))
    return linear(p, "roi_head.bbox_head.fc_cls", x), linear(p, "roi_head.bbox_head.fc_reg", x).view(len(x), -1, 4)


def masks_of(p: Params, n: Numbers, maps: list[Tensor], rois: Tensor) -> Tensor:
    x = F.relu(conv(p, "roi_head.mask_head.convs.0.conv", regions(n, maps, rois, 14)))
    weight, bias = (p[f"roi_head.mask_head.upsample.{kind}"] for kind in ("weight", "bias"))
    return conv(p, "roi_head.mask_head.conv_logits", F.relu(F.conv_transpose2d(x, weight, bias, stride=2)))


def losses(p: Params, n: Numbers, image: Tensor, size: Tensor, truth: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Returns the sum of all losses of a batch; truth: boxes, labels and masks of every image."""
    maps = pyramid(p, n, image)
    scored = Scored(p, n, maps)
    total, count = image.new_zeros(()), 0
    for i, (objects, _, _) in enumerate(truth):
        assigned = assign(scored.anchors, objects, 0.7, 0.3, 0.3)
        found, empty = sample(assigned, n.anchors, 0.5)
        count += max(len(found), 1) + max(len(empty), 1)
        rows = torch.cat([found, empty])
        label = torch.cat([torch.ones(len(found)), torch.zeros(len(empty))])
        total = total + F.binary_cross_entropy_with_logits(scored.logits[i, rows], label, reduction="sum")
        wanted = encode(scored.anchors[found], objects[assigned[found] - 1], torch.ones(4))
        total = total + (scored.codes[i, found] - wanted).abs().sum()
    total = total / count
    rois, labels, targets, wanted_masks = [], [], [], []
    for i, (objects, label, masks) in enumerate(truth):
        candidates = torch.cat([objects, scored.proposals(n, i, size[i])])
        assigned = assign(candidates, objects, 0.5, 0.5, 0.5)
        assigned[: len(objects)] = torch.arange(len(objects)) + 1
        found, empty = sample(assigned, n.boxes, 0.25)
        rows, own = torch.cat([found, empty]), assigned[found] - 1
        rois.append(torch.cat([torch.full((len(rows), 1), float(i)), candidates[rows]], 1))
        labels.append(torch.cat([label[own], torch.full((len(empty),), n.classes)]))
        targets.append(torch.cat([objects[own], candidates[empty]]))
        of_mask = torch.cat([own[:, None].float(), candidates[found]], 1)
        wanted_masks.append(align(masks[:, None].float(), of_mask, 28, 1.0)[:, 0] >= 0.5)
    roi, label, target = torch.cat(rois), torch.cat(labels), torch.cat(targets)
    logits, codes = boxes_of(p, n, maps, roi)
    total = total + F.cross_entropy(logits, label)
    found = (label < n.classes).nonzero().flatten()
    wanted = encode(roi[found, 1:], target[found], STDS)
    total = total + (codes[found, label[found]] - wanted).abs().sum() / len(roi)
    drawn = masks_of(p, n, maps, roi[found])[torch.arange(len(found)), label[found]]
    return total + F.binary_cross_entropy_with_logits(drawn, torch.cat(wanted_masks).float())


@torch.no_grad()
def detect(p: Params, n: Numbers, image: Tensor, size: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Returns boxes, scores, labels and masks (as probabilities in the box) of every image."""
    maps = pyramid(p, n, image)
    scored, results = Scored(p, n, maps), []
    for i in range(len(image)):
        boxes = scored.proposals(n, i, size[i])
        logits, codes = boxes_of(p, n, maps, torch.cat([torch.full((len(boxes), 1), float(i)), boxes], 1))
        scores, boxes = logits.softmax(1)[:, :-1], decode(boxes, codes, STDS, size[i])
        rows, labels = (scores > 0.05).nonzero(as_tuple=True)
        boxes, scores = boxes[rows, labels], scores[rows, labels]
        kept = suppress(boxes, scores, labels, 0.5)[:100]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        drawn = masks_of(p, n, maps, torch.cat([torch.full((len(boxes), 1), float(i)), boxes], 1))
        results.append((boxes, scores, labels, drawn[torch.arange(len(labels)), labels].sigmoid()))
    return results


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Returns (D, height, width) bool, all masks stretched over their boxes at once."""
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    y = (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    x = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5
