"""Canvases are functions of their number, and what is said about them is what is drawn."""

import numpy as np
import pytest

from swin_moe.data.dense.canvases import Canvases, _interpolation, tight_box
from swin_moe.data.dense.masks import bitmaps_of
from tests.data.dense.files import dense

LARGE = {"canvas_size": (96, 96), "canvas_digits": (1, 5), "digit_size": (18, 40)}


@pytest.mark.parametrize("options", [{}, LARGE, LARGE | {"digit_overlap": True}, {"canvas_size": (40, 80)}])
def test_boxes_masks_and_label_map_tell_the_same(options):
    data = Canvases(dense(**options), "train")
    counts = []
    for index in range(40):
        sample = data.dense_sample(index)
        assert sample.masks is not None and sample.label_map is not None
        assert sample.size == sample.original_size == sample.label_map.shape == dense(**options).dense.canvas_size
        label_map = np.zeros(sample.size, dtype=np.int64)
        for box, mask, label in zip(sample.boxes.tolist(), sample.masks, sample.labels):
            assert tight_box(mask) == tuple(box)
            assert not label_map[mask].any()  # masks never share a pixel
            label_map[mask] = label + 1
        np.testing.assert_array_equal(sample.label_map, label_map)
        counts.append(len(sample.boxes))
    low, high = dense(**options).dense.canvas_digits
    assert max(counts) <= high and min(counts) >= low and len(set(counts)) > 1


def test_a_mask_is_where_the_digit_is_above_three_tenths():
    sample = Canvases(dense(canvas_digits=(1, 1)), "train").dense_sample(3)
    assert sample.masks is not None
    grey, mask = np.asarray(sample.image)[..., 0], sample.masks[0]
    assert grey[mask].min() > 0.3 * 255 - 0.5  # rounded to 8 bits
    x1, y1, x2, y2 = sample.boxes[0].astype(int)
    outside = grey.copy()
    outside[max(0, y1 - 8) : y2 + 8, max(0, x1 - 8) : x2 + 8] = 0
    assert outside.max() <= 0.25 * 255 + 0.5  # noise alone


def test_digits_stand_apart_unless_they_may_overlap():
    def meet(data: Canvases) -> int:
        pairs = 0
        for index in range(60):
            boxes = data.dense_sample(index).boxes
            for place, (x1, y1, x2, y2) in enumerate(boxes):
                others = boxes[:place]
                inside = (others[:, 0] < x2) & (others[:, 2] > x1) & (others[:, 1] < y2) & (others[:, 3] > y1)
                pairs += inside.sum()
        return pairs

    assert meet(Canvases(dense(**LARGE), "train")) == 0
    assert meet(Canvases(dense(**LARGE, digit_overlap=True), "train")) > 20


def test_a_canvas_is_a_function_of_seed_split_and_number():
    first = [Canvases(dense(), "train").dense_sample(7) for _ in range(2)]
    assert first[0].image.tobytes() == first[1].image.tobytes()
    seen = {first[0].image.tobytes()}
    for options, split, index in (({"canvas_seed": 1}, "train", 7), ({}, "val", 7), ({}, "train", 8)):
        seen.add(Canvases(dense(**options), split).dense_sample(index).image.tobytes())
    assert len(seen) == 4
    assert np.asarray(first[0].image)[0, :8, 0].tolist() == PINNED


PINNED = [35, 14, 39, 60, 36, 33, 26, 43]


def test_validation_has_digits_that_training_has_not():
    train, val = (Canvases(dense(), split) for split in ("train", "val"))
    assert len(train._digits) == 1437 and len(val._digits) == 360
    assert len(train) == 1500 and len(val) == 60


def test_classes_are_those_of_boxes_or_of_label_maps():
    boxes, maps = (Canvases(dense(), "train", boxes=boxes) for boxes in (True, False))
    assert boxes.classes == tuple("0123456789") and maps.classes == ("background", *"0123456789")


def test_truth_is_the_sample_as_coco_has_it():
    pytest.importorskip("pycocotools")
    data = Canvases(dense(**LARGE, digit_overlap=True), "val")
    for index in range(5):
        sample, rows = data.dense_sample(index), data.truth(index)
        masks = bitmaps_of([row["segmentation"] for row in rows if row["segmentation"]], 96, 96)
        np.testing.assert_array_equal(masks, sample.masks)
        assert [row["area"] for row in rows] == masks.sum((1, 2)).tolist()
        assert [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)] == sample.boxes.tolist()
        assert [row["id"] for row in rows] == sample.ids.tolist() and min(sample.ids) > 0


def test_no_digit_is_an_empty_canvas():
    sample = Canvases(dense(canvas_digits=(0, 0)), "train").dense_sample(0)
    assert sample.boxes.shape == (0, 4) and sample.masks is not None and sample.masks.shape == (0, 64, 64)


def test_digits_are_resized_as_bilinear_interpolation_does():
    import torch

    small = np.random.default_rng(0).random((8, 8))
    for side in (3, 8, 16, 31):
        weights = _interpolation(side)
        wanted = torch.nn.functional.interpolate(
            torch.from_numpy(small)[None, None], size=(side, side), mode="bilinear"
        )
        np.testing.assert_allclose(weights @ small @ weights.T, wanted[0, 0].numpy(), rtol=0, atol=1e-12)
