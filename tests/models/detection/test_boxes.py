"""Boxes, anchors, assignment, mask targets and pasting: the official values, and slow obvious forms."""

import ast

import pytest
import torch
from torch import Tensor

from swin_moe.models.detection.anchors import base_anchors, grid_anchors, inside, valid_anchors
from swin_moe.models.detection.assign import BACKGROUND, IGNORED, Assigner
from swin_moe.models.detection.boxes import (
    clip,
    decode,
    encode,
    generalized_iou,
    intersection_over_first,
    intersection_over_union,
)
from swin_moe.models.detection.heads.mask_head import mask_targets, paste_masks
from swin_moe.models.detection.losses import box_loss
from swin_moe.models.detection.sample import Sampled, draw, sample
from swin_moe.randomness import RandomContext
from tests.models.dense.golden import image, load
from tests.models.detection.official import ellipses, unpacked

GOLDEN = load("det_ops")
SOURCE, TARGET = GOLDEN["coder_src"], GOLDEN["coder_dst"]
ASSIGNERS = {
    "rpn": Assigner(0.7, 0.3, low_quality=0.3),
    "rcnn_mask": Assigner(0.5, 0.5, low_quality=0.5),
    "cascade_0.7": Assigner(0.7, 0.7),
}


def random_boxes(count: int, seed: int, *, size: float = 64.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * size
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)


def test_overlaps_are_the_official_ones():
    torch.testing.assert_close(intersection_over_union(SOURCE, TARGET), GOLDEN["iou"])
    torch.testing.assert_close(intersection_over_first(SOURCE, TARGET), GOLDEN["iof"])
    torch.testing.assert_close(generalized_iou(SOURCE, TARGET), GOLDEN["giou_aligned"])


@pytest.mark.parametrize("stds", GOLDEN["coder"])
def test_codes_are_the_official_ones(stds):
    golden, values = GOLDEN["coder"][stds], ast.literal_eval(stds)
    limit = torch.tensor(GOLDEN["coder_max_shape"])
    torch.testing.assert_close(encode(SOURCE, TARGET, values), golden["encoded"])
    torch.testing.assert_close(decode(SOURCE, golden["encoded"], values, limit), golden["decoded"])
    large = 4 * image((30, 12), "det_ops/delta")
    torch.testing.assert_close(decode(SOURCE, large, values, limit), golden["decoded_big"])


def test_boxes_are_decoded_as_they_were_encoded_and_clipped_to_their_own_image():
    boxes, targets = random_boxes(9, 1) + torch.tensor([0.0, 0.0, 1.0, 1.0]), random_boxes(9, 2) + 1
    stds = (0.1, 0.1, 0.2, 0.2)
    codes = encode(boxes, targets, stds)
    torch.testing.assert_close(decode(boxes, codes, stds), targets, rtol=1e-4, atol=1e-3)
    sizes = torch.arange(1, 19).view(9, 2) * 3
    clipped = decode(boxes, codes, stds, sizes)
    for row, (height, width) in enumerate(sizes.tolist()):
        x1, y1, x2, y2 = (float(v) for v in targets[row])
        wanted = [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)]
        torch.testing.assert_close(clipped[row], torch.tensor(wanted).float(), rtol=1e-4, atol=1e-3)
    assert clip(torch.tensor([[-1.0, -2.0, 9.0, 9.0]]), torch.tensor([4, 6])).tolist() == [[0, 0, 6, 4]]


def test_box_losses_are_the_official_ones():
    golden, source = GOLDEN["giou_loss"], SOURCE.clone().requires_grad_()
    loss = 10 * box_loss("giou", source, TARGET).sum() / golden["avg_factor"]
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(golden["loss"]))
    torch.testing.assert_close(source.grad, golden["grad"])
    golden, source = GOLDEN["smooth_l1"], (SOURCE / 50).requires_grad_()
    loss = box_loss("smooth_l1", source, TARGET / 50, beta=1 / 9).sum() / 57
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(golden["loss"]))
    torch.testing.assert_close(source.grad / 50, golden["grad"])
    torch.testing.assert_close(box_loss("l1", SOURCE, TARGET), (SOURCE - TARGET).abs().sum(dim=1))


def test_anchors_are_the_official_ones():
    golden = GOLDEN["anchors"]
    for level, stride in enumerate((4, 8, 16, 32, 64)):
        height, width = golden["feature_sizes"][level]
        base = base_anchors(stride, scale=8, ratios=(0.5, 1.0, 2.0))
        torch.testing.assert_close(base, golden["base"][level])
        torch.testing.assert_close(grid_anchors(base, height, width, stride), golden["grid"][level])
        valid = valid_anchors(height, width, stride, golden["pad_shape"], 3)
        assert torch.equal(valid, golden["valid"][level])
    assert valid_anchors(2, 3, 8, (8, 16), 2).tolist() == [True] * 4 + [False] * 8  # a batch's padding trains nobody
    boxes = torch.tensor([[0.0, 0, 4, 4], [-1, 0, 4, 4], [0, 0, 8, 4], [0, 0, 7.9, 5.9]])
    assert inside(boxes, (6, 8), 0).tolist() == [True, False, False, True]
    assert inside(boxes, (6, 8), 2).tolist() == [True, True, True, True]


@pytest.mark.parametrize("name", ASSIGNERS)
def test_assignment_is_the_official_one(name):
    golden = GOLDEN["assign"]
    assert torch.equal(ASSIGNERS[name](golden["candidates"], golden["gt"]), golden["out"][name]["gt_inds"])


def slow_assignment(assigner: Assigner, candidates: Tensor, objects: Tensor, crowd: Tensor) -> list[int]:
    """Returns what Assigner does, box by box."""
    overlap = intersection_over_union(objects, candidates).tolist()
    result = []
    for column in range(len(candidates)):
        own = [row[column] for row in overlap]
        best = max(own, default=0.0)
        if own and best >= assigner.positive:
            result.append(own.index(best) + 1)
        else:
            result.append(BACKGROUND if best < assigner.negative else IGNORED)
    for number, row in enumerate(overlap):
        if assigner.low_quality is not None and row and max(row) >= assigner.low_quality:
            result = [number + 1 if value == max(row) else old for value, old in zip(row, result)]
    share = intersection_over_first(candidates, crowd).tolist()
    assert assigner.crowd is not None
    return [
        IGNORED if old == BACKGROUND and max(own, default=0.0) >= assigner.crowd else old
        for old, own in zip(result, share)
    ]


@pytest.mark.parametrize("name", ASSIGNERS)
def test_assignment_equals_the_slow_one(name):
    for seed in range(40):
        candidates = random_boxes(seed * 3 % 50, seed).round(decimals=-1)  # ties, boxes twice, boxes without area
        objects, crowd = random_boxes(seed % 5, seed + 1).round(decimals=-1), random_boxes(seed % 3, seed + 2)
        wanted = slow_assignment(ASSIGNERS[name], candidates, objects, crowd)
        assert ASSIGNERS[name](candidates, objects, crowd).tolist() == wanted


def test_samples_are_those_of_the_smallest_draws():
    assigned = torch.tensor([0, 2, -1, 1, 0, 1, 0, -1, 0, 1])
    draws = torch.tensor([5, 9, 0, 3, 1, 7, 2, 0, 8, 3])
    taken = sample(assigned, draws, number=5, positive_share=0.5)
    assert taken.positive.tolist() == [3, 9] and taken.negative.tolist() == [0, 4, 6]
    taken = sample(assigned, draws, number=20, positive_share=0.5)
    assert taken.positive.tolist() == [1, 3, 5, 9] and taken.negative.tolist() == [0, 4, 6, 8]


def test_draws_are_a_function_of_seed_step_sample_and_stage():
    def drawn(seed: int, step: int, sample: int, stage: int, image: int = 1) -> Tensor:
        rows = torch.arange(sample - image, sample - image + 3)
        return draw(RandomContext(seed, step, rows), image, stage, 50)

    assert torch.equal(drawn(1, 2, 7, 1), drawn(1, 2, 7, 1, image=0))  # wherever the image is in a batch
    for other in ((2, 2, 7, 1), (1, 3, 7, 1), (1, 2, 8, 1), (1, 2, 7, 2)):
        assert not torch.equal(drawn(1, 2, 7, 1), drawn(*other))


def test_mask_targets_are_the_official_ones():
    golden = GOLDEN["mask_target"]
    rois = torch.cat([torch.zeros(10, 1), golden["boxes"]], dim=1)
    index = golden["gt_index"]
    positive = Sampled(rois, index, golden["boxes"], index, index < 0)
    targets = mask_targets(positive, [ellipses(GOLDEN["assign"]["gt"], 120, 200)], golden["size"])
    assert torch.equal(targets, unpacked(golden["targets_packed"], 10, 28, 28))


def test_pasted_masks_are_the_official_ones():
    golden = GOLDEN["paste"]
    masks = (3 * image((6, 28, 28), "det_ops/paste")).sigmoid()
    pasted = paste_masks(masks, golden["boxes"], tuple(golden["size"]))
    assert torch.equal(pasted.sum(dim=(1, 2)), golden["area"])
    assert torch.equal(pasted, unpacked(golden["packed"], 6, 120, 200))


def test_a_pasted_mask_is_the_mask_at_every_pixel():
    """Against a loop over pixels, with boxes beyond the image on each side."""
    masks = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[1.0, 2, 7, 9], [-3, -2, 5, 4], [6, 5, 14, 13], [2.3, 2.4, 3.1, 2.9], [0, 0, 10, 8]])
    pasted = paste_masks(masks, boxes, (8, 10))
    for mask, box, got in zip(masks, boxes.tolist(), pasted):
        padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
        for row in range(8):
            for column in range(10):
                x = (column + 0.5 - box[0]) / (box[2] - box[0]) * 4 + 0.5
                y = (row + 0.5 - box[1]) / (box[3] - box[1]) * 4 + 0.5
                if not (0 <= x <= 5 and 0 <= y <= 5):
                    assert not got[row, column]
                    continue
                i, j = min(int(y), 4), min(int(x), 4)
                a, b = y - i, x - j
                upper = padded[i, j] * (1 - b) + padded[i, j + 1] * b
                lower = padded[i + 1, j] * (1 - b) + padded[i + 1, j + 1] * b
                value = float(upper * (1 - a) + lower * a)
                assert bool(got[row, column]) == (value >= 0.5) or abs(value - 0.5) < 1e-5
