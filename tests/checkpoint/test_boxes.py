"""Box arithmetic against masks of the elements."""

import numpy as np
import pytest

from swin_moe.checkpoint.boxes import (
    BoxFinder,
    find_gap,
    find_overlap,
    split_runs,
    split_slabs,
    splits_rows,
    subtract_all,
)
from swin_moe.layout import Chunk


def random_box(random, shape):
    low = [int(random.integers(0, n)) for n in shape]
    return Chunk(tuple(low), tuple(int(random.integers(1, n - a + 1)) for a, n in zip(low, shape)))


def mask(shape, boxes):
    count = np.zeros(shape, int)
    for box in boxes:
        count[box.within(Chunk.whole(shape))] += 1
    return count


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (3, 4, 5)])
def test_subtraction_overlap_and_gap_agree_with_masks(shape):
    random = np.random.default_rng(0)
    for _ in range(100):
        boxes = [random_box(random, shape) for _ in range(3)]
        rest = subtract_all(Chunk.whole(shape), boxes)
        assert np.array_equal(mask(shape, rest), (mask(shape, boxes) == 0).astype(int))
        assert (find_overlap(boxes) is not None) == bool((mask(shape, boxes) > 1).any())
        gap = find_gap(shape, rest)
        assert (gap is None) == bool(mask(shape, rest).all())
        assert gap is None or not mask(shape, rest)[gap.within(Chunk.whole(shape))].any()


@pytest.mark.parametrize("shape", [(), (9,), (6, 5), (4, 4, 3)])
def test_the_finder_finds_what_comparing_with_every_box_does(shape):
    random = np.random.default_rng(2)
    for count in (0, 1, 3, 12):
        for _ in range(40):
            boxes = sorted(random_box(random, shape) for _ in range(count))
            if shape and count == 12:  # also empty ones, as of ranks without experts
                boxes = sorted([*boxes, Chunk((2, *(0 for _ in shape[1:])), (0, *shape[1:]))])
            box = random_box(random, shape)
            slow = [(i, box.overlap(other)) for i, other in enumerate(boxes) if box.overlap(other) is not None]
            assert list(BoxFinder(boxes).overlapping(box)) == slow


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 2, 2)])
def test_rows_that_follow_each_other_are_recognized_without_arithmetic(shape):
    random = np.random.default_rng(3)
    said = 0
    for _ in range(300):
        cuts = sorted({0, *(int(n) for n in random.integers(0, (shape or (1,))[0] + 1, 2)), (shape or (1,))[0]})
        boxes = [Chunk((a, *(0 for _ in shape[1:])), (b - a, *shape[1:])) for a, b in zip(cuts, cuts[1:])]
        boxes = boxes if shape else [Chunk((), ())]
        if boxes and random.random() < 0.5:  # one that is lost, stands twice or is cut
            number = int(random.integers(len(boxes)))
            boxes[number : number + 1] = [[], [boxes[number]] * 2, [random_box(random, shape)]][int(random.integers(3))]
        whole = find_overlap(boxes) is None and find_gap(shape, boxes) is None
        assert whole or not splits_rows(shape, boxes)
        said += splits_rows(shape, boxes)
    assert said > 100


def test_a_grid_of_boxes_is_compared_within_its_rows_only(monkeypatch):
    calls = []
    monkeypatch.setattr(Chunk, "overlap", lambda *_: calls.append(1))
    grid = [Chunk((e, h, 0), (1, 1, 4)) for e in range(8) for h in range(256)]  # 8 experts, each on 256 ranks
    assert find_overlap(grid) is None and not calls
    assert find_overlap([*grid, grid[7]]) == (grid[7], grid[7])


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (3, 4, 5), (2, 1, 3, 2)])
def test_runs_and_slabs_address_the_elements_of_a_part(shape):
    random = np.random.default_rng(1)
    outer = Chunk(tuple(10 * (d + 1) for d in range(len(shape))), shape)
    memory = np.arange(outer.numel).reshape(shape)
    for _ in range(50):
        local = random_box(random, shape)
        part = Chunk(tuple(a + b for a, b in zip(local.offset, outer.offset)), local.size)
        expected = memory[part.within(outer)]
        starts, length = split_runs(part, outer)
        assert np.array_equal((starts[:, None] + np.arange(length)).reshape(part.size), expected)
        assert mask(shape, [local]).sum() == len(starts) * length
        spans = list(split_slabs(part, outer, 6))
        assert all(last - first <= 6 for _, first, last in spans)
        assert [first for _, first, _ in spans] == sorted(first for _, first, _ in spans)
        for box, first, last in spans:
            values = memory[box.within(outer)]
            assert (values.min(), values.max() + 1) == (first, last)
        assert sum(box.numel for box, _, _ in spans) == part.numel


def test_runs_are_as_long_as_they_can_be():
    outer = Chunk((0, 0, 0), (4, 6, 8))
    assert split_runs(Chunk((1, 0, 0), (2, 6, 8)), outer)[1] == 96
    assert split_runs(Chunk((1, 2, 0), (1, 3, 8)), outer)[1] == 24
    assert split_runs(Chunk((0, 0, 2), (4, 6, 3)), outer)[1] == 3
