"""Plans: what is drawn, from which ranges, and that a plan's size is the size it ends with."""

import collections

import numpy as np
import pytest

from swin_moe.data.dense.augment import build_planner
from swin_moe.data.dense.geometry import Crop, Flip, Resize, scaled_size
from swin_moe.data.transforms import augment_key
from tests.data.dense.files import dense
from tests.data.dense.test_geometry import blocks

SHORT = tuple(range(480, 801, 32))
DETECTION = {"short": SHORT, "long": 1333, "crop_short": (400, 500, 600), "crop_sides": (384, 600)}
SEGMENTATION = {"short": (512,), "long": 2048, "ratio": (0.5, 2.0), "crop": (512, 512), "distort": True}


def plans(options: dict, size: tuple[int, int], count: int = 300, **data) -> list:
    planner = build_planner(dense(**options, data=data), train=True)
    return [planner(*size, augment_key(0, 0, index)) for index in range(count)]


@pytest.mark.parametrize("options", [{}, DETECTION, SEGMENTATION, {"short": (40,), "long": 50}], ids=str)
def test_a_plan_knows_the_size_it_ends_with(options):
    small = {
        k: tuple(v // 10 for v in value) if k in ("short", "crop_short", "crop_sides", "crop") else value
        for k, value in options.items()
    }
    planner = build_planner(dense(**small), train=True)
    for index in range(30):
        before = blocks(seed=index % 4)
        plan = planner(*before.size, augment_key(1, 2, index))
        height, width = plan.apply(before).size
        if "crop" in small:  # padded to it by the batch
            assert height <= plan.size[0] and width <= plan.size[1] and plan.size == small["crop"]
        else:
            assert (height, width) == plan.size


def test_a_plan_is_a_function_of_seed_epoch_and_image():
    planner = build_planner(dense(**SEGMENTATION), train=True)
    keys = [augment_key(s, e, i) for s in range(2) for e in range(2) for i in range(2)]
    assert len({planner(480, 640, key) for key in keys}) == 8
    assert planner(480, 640, keys[0]) == planner(480, 640, keys[0])


def test_detection_draws_what_the_official_recipe_says():
    drawn = plans(DETECTION, (480, 640), 2000)
    kinds = collections.Counter(tuple(type(move) for move in plan.moves) for plan in drawn)
    assert set(kinds) == {(Resize,), (Flip, Resize), (Resize, Crop, Resize), (Flip, Resize, Crop, Resize)}
    assert min(kinds.values()) > 400  # a quarter each
    plain = [plan.moves[-1].size for plan in drawn if not any(isinstance(m, Crop) for m in plan.moves)]
    counts = collections.Counter(plain)
    assert set(counts) == {scaled_size(480, 640, short, 1333) for short in SHORT} and min(counts.values()) > 50
    crops = [next(m for m in plan.moves if isinstance(m, Crop)) for plan in drawn if len(plan.moves) > 2]
    sizes = np.asarray([crop.size for crop in crops])
    assert sizes.min() == 384 and sizes.max() == 600 and len({tuple(size) for size in sizes}) > 500
    assert sizes[:, 0].min() == 384 and sizes[:, 0].max() == 600  # the short side of 600
    firsts = {plan.moves[-3].size for plan in drawn if len(plan.moves) > 2}
    assert firsts == {scaled_size(480, 640, short, 1333) for short in (400, 500, 600)}
    for plan in drawn:
        if len(plan.moves) > 2:
            first, crop = plan.moves[-3:-1]
            ((top, left),) = crop.places
            assert 0 <= top <= first.size[0] - crop.size[0] and 0 <= left <= first.size[1] - crop.size[1]
            assert plan.size[0] <= 1333 and plan.size[1] <= 1333


def test_segmentation_draws_what_the_official_recipe_says():
    drawn = plans(SEGMENTATION, (500, 700), 500, hflip=0.5)
    sizes = [next(m for m in plan.moves if isinstance(m, Resize)).size for plan in drawn]
    short = np.asarray(sizes).min(1)
    assert short.min() < 270 and short.max() > 1000 and 256 <= short.min() and short.max() <= 1024
    assert abs(np.mean(short) - 512 * 1.25) < 20  # uniform in the ratio
    for plan, size in zip(drawn, sizes):
        crop = next(m for m in plan.moves if isinstance(m, Crop))
        assert crop.size == (min(512, size[0]), min(512, size[1])) and len(crop.places) == 10
        assert crop.max_share == 0.75 and plan.size == (512, 512)
    flips = sum(isinstance(plan.moves[0], Flip) for plan in drawn)
    assert 200 < flips < 300


def test_affine_moves_stay_in_their_ranges():
    drawn = plans({"rotate": 30.0, "shear": 20.0, "translate": 0.1}, (400, 600), 500)
    matrices = np.asarray([plan.moves[-1].matrix for plan in drawn])
    assert all(plan.size == (400, 600) for plan in drawn)
    turned = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert 28 < abs(turned).max() <= 30 and abs(turned.mean()) < 3
    middle = matrices @ [300, 200, 1] - [300, 200]
    assert 55 < abs(middle[:, 0]).max() <= 60 and 36 < abs(middle[:, 1]).max() <= 40
    shifted = plans({"translate": 0.1}, (400, 600), 50)
    assert all(np.allclose(np.asarray(plan.moves[-1].matrix)[:, :2], np.eye(2)) for plan in shifted)


def test_one_option_does_not_move_the_draws_of_another():
    plain, flipped = plans(DETECTION, (480, 640)), plans(DETECTION, (480, 640), hflip=1.0)
    assert [plan.size for plan in plain] == [plan.size for plan in flipped]
    without = plans(DETECTION | {"crop_short": ()}, (480, 640))
    same = [(a.size, b.size) for a, b in zip(plain, without) if len(a.moves) < 3]
    assert len(same) > 100 and all(a == b for a, b in same)


def test_evaluation_resizes_and_no_more():
    planner = build_planner(dense(eval_short=800, eval_long=1333), train=False)
    assert planner(480, 640, 5).size == (800, 1067) and planner(480, 640, 5).moves == (Resize((800, 1067)),)
    assert build_planner(dense(), train=False)(480, 640, 0).moves == ()


def test_short_sides_between_two_are_all_drawn():
    drawn = plans({"short": (40, 44), "short_between": True, "long": 999}, (100, 100), 400)
    counts = collections.Counter(plan.size[0] for plan in drawn)
    assert set(counts) == {40, 41, 42, 43, 44} and min(counts.values()) > 50
    assert {plan.size[0] for plan in plans({"short": (40, 44), "long": 999}, (100, 100), 50)} == {40, 44}
