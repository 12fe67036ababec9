"""Every move acts alike on image, boxes, masks, label map and matrix."""

import numpy as np
import pytest
from PIL import Image

from swin_moe.data.dense.canvases import tight_box
from swin_moe.data.dense.colours import Distort
from swin_moe.data.dense.geometry import Affine, Crop, Flip, Resize, affine, moved_boxes, scaled_size
from swin_moe.data.dense.sample import DenseSample


def blocks(height: int = 48, width: int = 60, seed: int = 0, count: int = 3) -> DenseSample:
    """Returns filled rectangles that do not touch: object k is of value 60 k + 60, in the image as in the maps."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width), dtype=np.uint8)
    masks = np.zeros((count, height, width), dtype=bool)
    for number in range(count):
        while not masks[number].any() or (masks[number] & (pixels > 0)).any():
            masks[number] = False
            y, x = rng.integers(0, height - 16), rng.integers(0, width - 16)
            h, w = rng.integers(8, 16, 2)
            masks[number, y : y + h, x : x + w] = True
        pixels[masks[number]] = 60 * number + 60
    boxes = np.asarray([tight_box(mask) for mask in masks], dtype=np.float64)
    return DenseSample(
        image=Image.fromarray(np.repeat(pixels[..., None], 3, -1)),
        image_id=1,
        original_size=(height, width),
        boxes=boxes,
        labels=np.arange(count),
        crowd=np.zeros(count, dtype=bool),
        ids=np.arange(count) + 5,
        masks=masks,
        label_map=np.where(pixels > 0, pixels // 60, 0).astype(np.uint8),
    )


def assert_consistent(sample: DenseSample, before: DenseSample, *, slack: float, exact: bool = True) -> None:
    """Checks that boxes, masks, label map and image still tell the same, and that the matrix tells the move.

    slack: Pixels that a mask's bounds may be off the box, by rounding to whole pixels.
    """
    assert sample.masks is not None and sample.label_map is not None
    height, width = sample.size
    assert sample.masks.shape == (len(sample.boxes), height, width) and sample.label_map.shape == (height, width)
    grey = np.asarray(sample.image)[..., 0].astype(int)
    for box, mask, label, number in zip(sample.boxes, sample.masks, sample.labels, sample.ids):
        assert number == label + 5
        bounds = tight_box(mask)
        if bounds is not None and exact:
            np.testing.assert_allclose(bounds, box, rtol=0, atol=slack)
        np.testing.assert_array_equal(sample.label_map == label + 1, mask)
        inner = np.zeros_like(mask)
        inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        inner[2:-2, 2:-2] &= inner[1:-3, 2:-2] & inner[3:-1, 2:-2] & inner[2:-2, 1:-3] & inner[2:-2, 3:-1]
        if inner.any():  # off the blurred border
            assert abs(grey[inner] - 60 * (label + 1)).max() <= 2
    whole = moved_boxes(before.boxes, sample.matrix).clip(0, [width, height, width, height])
    np.testing.assert_allclose(sample.boxes, whole[sample.labels], rtol=0, atol=1e-9)


MOVES = {
    "flip": (Flip(), 0.0),
    "larger": (Resize((100, 120)), 1.0),
    "smaller": (Resize((31, 37)), 1.0),
    "plain": (Resize((31, 37), antialias=False), 1.0),
    "stretched": (Resize((96, 40)), 1.0),
    "crop": (Crop((30, 30), ((10, 15),)), 0.0),
    "turn": (affine((48, 60), degrees=90, shear=0, shift=(0, 0)), 1.0),
    "shift": (Affine(((1.0, 0.0, 7.0), (0.0, 1.0, -5.0))), 0.0),
}


@pytest.mark.parametrize("move, slack", MOVES.values(), ids=list(MOVES))
def test_all_of_a_sample_moves_alike(move, slack):
    for seed in range(5):
        before = blocks(seed=seed)
        assert_consistent(move(before), before, slack=slack)


def test_moves_one_after_the_other_multiply_their_matrices():
    before = blocks(seed=3)
    sample = before
    for move in (Flip(), Resize((96, 120)), Crop((80, 100), ((8, 12),)), Flip(), Resize((40, 50))):
        sample = move(sample)
    assert_consistent(sample, before, slack=1.0)


def test_a_move_after_others_multiplies_from_the_left():
    before = blocks(seed=2)
    for last in (Affine(((1.0, 0.0, 4.0), (0.0, 1.0, -3.0))), Affine(((0.5, 0.0, 9.0), (0.0, 0.8, 2.0)))):
        sample = last(Resize((96, 90))(Flip()(before)))
        assert_consistent(sample, before, slack=1.0)


def test_a_skewed_box_is_round_its_corners():
    before = blocks(count=1)
    turned = affine((48, 60), degrees=30, shear=10, shift=(2, -1))(before)
    assert_consistent(turned, before, slack=0, exact=False)
    bounds = tight_box(turned.masks[0]) if turned.masks is not None else None
    assert bounds is not None
    x1, y1, x2, y2 = turned.boxes[0]
    assert bounds[0] >= x1 - 1 and bounds[1] >= y1 - 1 and bounds[2] <= x2 + 1 and bounds[3] <= y2 + 1


def test_flip_by_hand():
    sample = blocks(count=1)
    x1, y1, x2, y2 = sample.boxes[0]
    assert Flip()(sample).boxes.tolist() == [[60 - x2, y1, 60 - x1, y2]]
    twice = Flip()(Flip()(sample))
    np.testing.assert_array_equal(twice.matrix, np.eye(3))
    assert twice.image.tobytes() == sample.image.tobytes()


def test_objects_that_a_crop_leaves_out_are_dropped_with_all_they_have():
    sample = blocks(seed=1)
    kept = Crop((48, 20), ((0, 0),))(sample)
    expected = [label for label, box in zip(sample.labels, sample.boxes) if box[0] < 20]
    assert kept.labels.tolist() == expected and len(expected) < 3
    assert kept.masks is not None and len(kept.masks) == len(kept.ids) == len(kept.crowd) == len(expected)


@pytest.mark.parametrize(
    "size, short, long, expected",
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((426, 640), 800, 1333, (800, 1202)),
        ((300, 900), 800, 1333, (444, 1333)),
        ((640, 480), 480, 1333, (640, 480)),
        ((375, 500), 512, 2048, (512, 683)),
        ((500, 1), 800, 1333, (1333, 3)),
    ],
)
def test_sizes_follow_the_official_rounding(size, short, long, expected):
    assert scaled_size(*size, short, long) == expected


@pytest.mark.parametrize("height, width, levels", [(5, 11, 0.51), (20, 15, 1.01)])  # Pillow rounds after each axis
def test_plain_resizing_is_bilinear_at_pixel_centres(height, width, levels):
    """Against a slow one: each new pixel from four old ones round its centre, the border repeated."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    sample = DenseSample(Image.fromarray(pixels), 0, (9, 7))
    got = np.asarray(Resize((height, width), antialias=False)(sample).image).astype(int)
    for y in range(height):
        for x in range(width):
            cy, cx = max(0.0, (y + 0.5) * 9 / height - 0.5), max(0.0, (x + 0.5) * 7 / width - 0.5)
            y0, x0 = min(int(cy), 8), min(int(cx), 6)
            y1, x1, fy, fx = min(y0 + 1, 8), min(x0 + 1, 6), cy - y0, cx - x0
            top = pixels[y0, x0] * (1 - fx) + pixels[y0, x1] * fx
            bottom = pixels[y1, x0] * (1 - fx) + pixels[y1, x1] * fx
            assert abs(got[y, x] - (top * (1 - fy) + bottom * fy)).max() <= levels


def test_the_first_crop_without_a_class_that_covers_too_much_is_taken():
    label_map = np.zeros((10, 20), dtype=np.uint8)
    label_map[:, 10:] = 1
    label_map[:, 18:] = 255
    sample = DenseSample(Image.new("RGB", (20, 10)), 0, (10, 20), label_map=label_map)

    def left(places: list[int], share: float) -> float:
        return -Crop((10, 8), tuple((0, place) for place in places), share)(sample).matrix[0, 2]

    assert left([0, 6, 5], 0.75) == 6  # alone; half and half
    assert left([0, 12, 3], 0.75) == 3  # alone; alone and ignored; none is good: the last
    assert left([4, 0], 0.75) == 0  # 6 of 8 is 0.75, not below; then none is good
    assert left([4, 0], 0.76) == 4
    assert left([0, 6], 1.0) == 0


def test_unknown_pixels_after_a_turn_are_ignored():
    sample = blocks()
    turned = Affine(((1.0, 0.0, 10.0), (0.0, 1.0, 0.0)))(sample)
    assert turned.label_map is not None and (turned.label_map[:, :10] == 255).all()
    assert not (turned.label_map[:, 10:] == 255).any() and not np.asarray(turned.image)[:, :10].any()


def test_affine_moves_by_hand():
    def moved(point: list[float], **move) -> list[float]:
        given = {"degrees": 0.0, "shear": 0.0, "shift": (0.0, 0.0)} | move
        return (np.asarray(affine((48, 60), **given).matrix) @ [*point, 1.0]).round(9).tolist()  # type: ignore[arg-type]

    assert moved([30, 24], degrees=90, shear=20) == [30, 24]  # the middle
    assert moved([40, 24], degrees=90) == [30, 34]  # right goes down: clockwise as seen
    assert moved([30, 34], shear=45) == [40, 34] and moved([40, 24], shear=45) == [40, 24]
    assert moved([0, 0], shift=(3, -2)) == [3, -2]


def colour(pixels: list[int], move: Distort) -> list[int]:
    image = Image.fromarray(np.asarray(pixels, dtype=np.uint8).reshape(1, 1, 3))
    return np.asarray(move(DenseSample(image, 0, (1, 1))).image).ravel().tolist()


def test_colours_by_hand():
    assert colour([10, 100, 250], Distort(20.0, None, None, None, False)) == [30, 120, 255]
    assert colour([10, 100, 250], Distort(None, 1.5, None, None, True)) == [15, 150, 255]
    assert colour([10, 100, 250], Distort(-20.0, 0.5, None, None, False)) == [0, 40, 115]
    assert colour([200, 100, 100], Distort(None, None, 0.5, None, False)) == [200, 151, 151]  # of 256 levels
    red, green, blue = colour([250, 0, 0], Distort(None, None, None, 1 / 3, False))
    assert green >= 248 and max(red, blue) <= 5
    first, last = (colour([200, 40, 100], Distort(None, 1.5, 0.5, None, is_last)) for is_last in (False, True))
    assert first != last  # saturation sees what contrast has clipped
