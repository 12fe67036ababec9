"""Boxes of flat ranges, by hand and against brute force."""

import math
import random

import torch

from swin_moe.layout import Chunk, boxes_of_range, even_part, even_split
from swin_moe.parallel.sharding import local_chunk


def test_a_range_that_begins_and_ends_within_rows_by_hand():
    assert boxes_of_range((4, 3), 2, 10) == [Chunk((0, 2), (1, 1)), Chunk((1, 0), (2, 3)), Chunk((3, 0), (1, 1))]
    assert boxes_of_range((4, 3), 3, 9) == [Chunk((1, 0), (2, 3))]
    assert boxes_of_range((4, 3), 4, 5) == [Chunk((1, 1), (1, 1))]
    assert boxes_of_range((4, 3), 5, 5) == []
    assert boxes_of_range((), 0, 1) == [Chunk((), ())]
    assert boxes_of_range((2, 0), 0, 0) == []


def test_boxes_cover_the_range_in_order_and_are_contiguous():
    random.seed(0)
    for _ in range(500):
        shape = tuple(random.randint(1, 5) for _ in range(random.randint(0, 4)))
        numel = math.prod(shape)
        start = random.randint(0, numel)
        stop = random.randint(start, numel)
        whole = torch.arange(numel).view(shape)
        boxes = boxes_of_range(shape, start, stop)
        parts = [whole[tuple(slice(o, o + n) for o, n in zip(b.offset, b.size))] for b in boxes]
        assert all(part.is_contiguous() for part in parts)
        assert [int(v) for part in parts for v in part.flatten()] == list(range(start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_parts_lie_as_torch_cuts_them():
    assert even_split(4, 3) == [(0, 2), (2, 2), (4, 0)]
    assert even_split(10, 4) == [(0, 3), (3, 3), (6, 3), (9, 1)]
    for length, parts in ((4, 3), (8, 8), (3, 8), (10, 4), (17, 5)):
        numbers = torch.arange(length).chunk(parts)
        cut = [(int(part[0]), len(part)) for part in numbers]
        assert even_split(length, parts) == cut + [(length, 0)] * (parts - len(cut))


def test_one_part_costs_nothing_of_the_others():
    for length, parts in ((4, 3), (8, 8), (3, 8), (0, 2), (10, 4)):
        assert [even_part(length, parts, i) for i in range(parts)] == even_split(length, parts)
    # As for every rank of a world: with a whole split for each of them, as many as ranks squared.
    name, coordinates = "layers.0.blocks.1.mlp.experts.fc1_weight", {"expert": (5, 10**12), "expert_shard": (0, 1)}
    assert local_chunk(name, (10**12, 4, 2), coordinates).size[0] == 1
