"""Box arithmetic against masks of the elements."""

import numpy as np
import pytest

from swin_moe.checkpoint.boxes import find_gap, find_overlap, split_runs, split_slabs, subtract_all
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
