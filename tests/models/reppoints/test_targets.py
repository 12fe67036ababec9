"""What the cells of RepPoints V2 learn, and from what losses: each against a plain loop or a number by hand."""

import math

import pytest
import torch
from torch import Tensor

from swin_moe.models.detection.boxes import intersection_over_union
from swin_moe.models.reppoints.assign import bump_radius, by_middle, by_overlap, corners_of, weights_inside
from swin_moe.models.reppoints.corners import pooled_from
from swin_moe.models.reppoints.losses import Wanted, bump_focal, losses_of, quality_focal, set_loss

SIZES, STRIDES = [(6, 8), (3, 4), (2, 2)], (8, 16, 32)


def grid() -> tuple[Tensor, Tensor, Tensor]:
    """Returns cells, levels and strides."""
    cells, level = [], []
    for number, ((height, width), stride) in enumerate(zip(SIZES, STRIDES)):
        cells += [[x * stride, y * stride] for y in range(height) for x in range(width)]
        level += [number] * (height * width)
    levels = torch.tensor(level)
    return torch.tensor(cells, dtype=torch.float64), levels, torch.tensor(STRIDES, dtype=torch.float64)[levels]


def objects(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator).double() * 40
    return torch.cat([low, low + 3 + torch.rand(count, 2, generator=generator).double() * 45], dim=1)


def usable(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed + 100)) < 0.9


@pytest.mark.parametrize("dim, forward", [(2, False), (2, True), (3, False), (3, True)])
def test_pooling_is_the_largest_from_a_cell_on(dim, forward):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    pooled = pooled_from(x, dim, forward=forward)
    for i in range(x.shape[dim]):
        seen = x.narrow(dim, 0, i + 1) if forward else x.narrow(dim, i, x.shape[dim] - i)
        assert torch.equal(pooled.select(dim, i), seen.amax(dim=dim))
    assert torch.autograd.gradcheck(lambda y: pooled_from(y, dim, forward=forward), (x,))


@pytest.mark.parametrize("seed", range(10))
def test_an_object_has_the_cell_nearest_to_its_middle(seed):
    cells, level, _ = grid()
    boxes, on = objects(seed, seed % 5), usable(seed, len(cells))
    found = by_middle(cells, level, on, boxes, smallest=8.0, levels=3)
    best: dict[int, tuple[float, int]] = {}
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        own = min(max(int((math.log2((x2 - x1) / 8) + math.log2((y2 - y1) / 8)) / 2), 0), 2)
        rows = [i for i in range(len(cells)) if level[i] == own and on[i]]
        far = {
            i: math.hypot((cells[i, 0] - (x1 + x2) / 2) / (x2 - x1), (cells[i, 1] - (y1 + y2) / 2) / (y2 - y1))
            for i in rows
        }
        cell = min(far, key=lambda i: far[i])
        if cell not in best or far[cell] < best[cell][0]:
            best[cell] = (far[cell], number + 1)
    assert found.tolist() == [best.get(i, (0, 0))[1] for i in range(len(cells))]


@pytest.mark.parametrize("seed", range(10))
def test_an_object_has_boxes_above_mean_and_deviation(seed):
    cells, level, stride = grid()
    noise = torch.randn(len(cells), 4, generator=torch.Generator().manual_seed(seed)).double()
    found = torch.cat([cells - stride[:, None] * 2, cells + stride[:, None] * 2], dim=1) + noise * 4
    boxes, on = objects(seed, seed % 5), usable(seed, len(cells))
    got = by_overlap(found, level, on, boxes, nearest=4, levels=3)
    overlap = intersection_over_union(found, boxes)
    best: dict[int, tuple[float, int]] = {}
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        candidates = []
        for own in range(3):
            rows = [i for i in range(len(cells)) if level[i] == own and on[i]]
            middle = {i: ((found[i, 0] + found[i, 2]) / 2, (found[i, 1] + found[i, 3]) / 2) for i in rows}
            far = {i: math.hypot(middle[i][0] - (x1 + x2) / 2, middle[i][1] - (y1 + y2) / 2) for i in rows}
            candidates += sorted(rows, key=lambda i: far[i])[:4]
        values = overlap[candidates, number]
        for i in candidates:
            x, y = (float(found[i, 0] + found[i, 2]) / 2, float(found[i, 1] + found[i, 3]) / 2)
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            value = float(overlap[i, number])
            if inside and value >= values.mean() + values.std() and value > best.get(i, (-1.0, 0))[0]:
                best[i] = (value, number + 1)
    assert got.tolist() == [best.get(i, (0, 0))[1] for i in range(len(cells))]
    if len(boxes):
        assert got.any()


@pytest.mark.parametrize("seed", range(6))
def test_corners_have_a_cell_on_every_level_and_a_bump_around(seed):
    cells, level, stride = grid()
    boxes, on = objects(seed, seed), usable(seed, len(cells))
    radius = bump_radius(boxes, 0.7) * 5  # so that cells lie within it
    found = corners_of(cells, level, stride, on, boxes[:, 2:], radius, levels=3)
    bump, step = [0.0] * len(cells), [[0.0, 0.0] for _ in cells]
    for number, corner in enumerate(boxes[:, 2:].tolist()):
        sigma = (2 * float(radius[number]) + 1) / 6
        for i, cell in enumerate(cells.tolist()):
            far = math.dist(cell, corner)
            if on[i] and far < radius[number]:
                bump[i] = max(bump[i], math.exp(-(far**2) / (2 * sigma**2)))
    for corner in boxes[:, 2:].tolist():
        for own in range(3):
            rows = [i for i in range(len(cells)) if level[i] == own and on[i]]
            i = min(rows, key=lambda i: math.dist(cells[i].tolist(), corner))
            bump[i] = 1.0
            step[i] = [(corner[k] - float(cells[i, k])) / float(stride[i]) for k in (0, 1)]
    torch.testing.assert_close(found.bump, torch.tensor(bump).double())
    torch.testing.assert_close(found.step, torch.tensor(step).double())


def test_within_the_radius_boxes_overlap_enough():
    boxes = objects(3, 6)
    radius = bump_radius(boxes, 0.7)
    least = []
    for dx in (-1, 0, 1):
        for sign in (-1, 1):
            moved = boxes.clone()
            moved[:, :2] += radius[:, None] * sign  # one corner
            moved[:, 2:] += radius[:, None] * dx  # the other one too, or not
            least.append(intersection_over_union(boxes, moved).diagonal())
    assert torch.stack(least).amin(dim=0).sub(0.7).abs().max() < 1e-9  # the worst is what was asked for


def test_weights_are_of_the_smallest_box_and_levels_are_looked_up():
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [8.0, 8.0, 16.0, 16.0], [40.0, 24.0, 60.0, 44.0]]).double()
    weights = weights_inside(boxes, torch.tensor([1, 1, 0]), 2, SIZES, 8)
    finest = weights[: 6 * 8].view(6, 8, 2)
    assert finest[0, 0].tolist() == [0.0, 64 / 400] and finest[1, 1].tolist() == [0.0, 1.0]
    assert finest[2, 2].tolist() == [0.0, 1.0] and finest[2, 3].tolist() == [0.0, 0.0]
    assert finest[3, 5].tolist() == [64 / 400, 0.0] and finest[5, 7].tolist() == [64 / 400, 0.0]
    assert torch.equal(weights[48:60].view(3, 4, 2), finest[::2, ::2])


def test_focal_losses_by_hand():
    logit = torch.tensor([0.0, math.log(3)])  # chances 0.5 and 0.75
    torch.testing.assert_close(
        quality_focal(logit, torch.tensor([0.0, 0.0])), torch.tensor([0.25, 0.5625]) * -torch.tensor([0.5, 0.25]).log()
    )
    half = quality_focal(logit, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(half[1], torch.tensor(0.0625 * -0.5 * (math.log(0.75) + math.log(0.25))))
    assert half[0] == 0
    bumps = bump_focal(logit, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(bumps, torch.tensor([-math.log(0.5) * 0.25, -math.log(0.25) * 0.5625 * 0.5**4]))


def test_corners_in_the_wrong_order_are_no_box_and_find_back():
    """Both wrong: by the formula alone a box of sides -16 would have a loss of about -2."""
    target = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).double()
    for found, loss in (([0.0, 0.0, 8.0, 8.0], 0.0), ([12.0, 12.0, -4.0, -4.0], 5.0), ([6.0, 0.0, 2.0, 8.0], 1.5)):
        box = torch.tensor([found]).double().requires_grad_()
        value = set_loss(box, target)
        assert value.item() > loss - 1e-9 and (loss != 0.0 or value.item() == pytest.approx(0.0, abs=1e-7))
        if loss:
            (slope,) = torch.autograd.grad(value.sum(), box)
            assert slope[0, 0] > 0 > slope[0, 2]  # the left side moves left, the right one right


def test_sides_of_boxes_are_a_unit_longer():
    found, target = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).double(), torch.tensor([[1.0, 0.0, 2.0, 4.0]]).double()
    shared, union, outer = 2 * 2, 4 * 2 + 2 * 5 - 2 * 2, 4 * 5
    expected = 1 - shared / union + (outer - union) / outer
    assert set_loss(found, target).item() == pytest.approx(expected, abs=1e-6)


def test_losses_count_what_they_are_means_over():
    """Two images of four cells, one class; the second image has nothing and counts one of each all the same."""
    first = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]])
    refined = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    box = torch.tensor([0.0, 0.0, 8.0, 8.0]).double()
    boxes = torch.stack([box * 0.5, box, box, box]).expand(2, 4, 4)
    zeros = torch.zeros(2, 4, 1).double()
    bump = torch.zeros(2, 4, 2).double()
    bump[0, 0] = 1
    step = torch.full((2, 4, 4), 0.5).double()
    inside = torch.zeros(2, 4, 1).double()
    inside[0, :2] = 1.5
    on = torch.tensor([[True, True, True, False], [True, True, True, True]])
    target = box.expand(2, 4, 4)
    wanted = Wanted(on, first, refined, target, target, torch.zeros_like(first), bump, step, inside)
    losses = losses_of(
        zeros, (boxes, boxes), torch.zeros(2, 4, 2).double(), torch.zeros(2, 4, 4).double(), zeros, wanted, box[2:3]
    )
    log2 = math.log(2)
    expected = {
        "loss_pts_init": (0.0, 2),  # its one cell has the object's box
        "loss_pts_refine": (2 * (1 - 1.5**2 / 2**2), 3),  # sides of a half and one unit and one more, and all
        "loss_cls": (log2 * (0.25**2 + 0.5**2 + 5 * 0.5**2), 3),  # qualities 0.25 and 1, five others
        "loss_heatmap_tl": (0.25 / 2 * log2 * 0.25 * 7, 2),
        "loss_offset_br": (0.5 * 2 * (0.5 - 1 / 18), 2),
        "loss_sem_inside": (0.1 * log2 * 0.25 * 0.25 * 3, 3.0),
        "loss_sem_outside": (0.1 * log2 * 0.25 * 0.75 * 5, 2.0),
    }
    for name, (total, count) in expected.items():
        assert losses.sums[name].item() == pytest.approx(total, abs=1e-6), name
        assert losses.counts[name] == count, name
