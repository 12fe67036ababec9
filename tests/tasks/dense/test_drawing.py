"""Drawings show what was found where it was found, and the same ones on any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from swin_moe.data.loader import EvalLoader
from swin_moe.data.transforms import to_tensor
from swin_moe.tasks.dense import Found
from swin_moe.tasks.drawing import PictureBook, colour_of, draw, pixels_of, truth_of
from tests.data.dense.files import dense
from tests.ranks import run_ranks

NAMES = [f"class {label}" for label in range(11)]


def rgb(label: int) -> list[int]:
    return list(colour_of(label))


def found(**more) -> Found:
    boxes = torch.tensor([[100.0, 150, 300, 350], [350, 350, 450, 450]])
    masks = torch.zeros(2, 500, 600, dtype=torch.bool)
    masks[0, 200:300, 150:250] = True
    given = {"boxes": boxes, "scores": torch.tensor([0.9, 0.2]), "labels": torch.tensor([1, 2]), "masks": masks}
    return Found(**(given | more))


def test_boxes_and_masks_are_where_they_were_found():
    image = np.full((500, 600, 3), 100, dtype=np.uint8)
    drawn = draw(image, found(), NAMES)
    assert drawn.shape == image.shape
    assert drawn[250, 100].tolist() == drawn[349, 200].tolist() == drawn[250, 299].tolist() == rgb(1)  # its edges
    assert drawn[250, 300].tolist() == drawn[350, 200].tolist() == [100] * 3  # the first pixels outside
    inside = (0.55 * 100 + 0.45 * np.asarray(rgb(1))).astype(np.uint8)
    assert drawn[250, 200].tolist() == inside.tolist() and drawn[200, 200].tolist() == rgb(
        1
    )  # whole at the mask's edge
    assert drawn[180, 120].tolist() == [100] * 3 and drawn[400, 350].tolist() == rgb(2)
    assert (draw(image, found(), NAMES, threshold=0.5)[360:440, 340:460] == 100).all()
    assert (image == 100).all()


def test_small_images_are_enlarged_and_boxes_beyond_the_edge_are_harmless():
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    boxes = torch.tensor([[-10.0, -10, 20, 20], [60, 40, 90, 90], [5, 5, 5, 5], [30, 3, 20, 1]])
    odd = Found(boxes, torch.ones(4), torch.tensor([0, 500, 3, 4]))
    drawn = draw(image, odd, NAMES)
    assert drawn.shape == (48 * 8, 64 * 8, 3) and drawn.any()
    nothing = Found(boxes[:0], torch.ones(0), torch.zeros(0, dtype=torch.int64))
    assert not draw(image, nothing, NAMES).any()


def test_label_maps_tint_all_but_ignored_pixels():
    image = np.full((500, 500, 3), 100, dtype=np.uint8)
    label_map = torch.full((500, 500), 255)
    label_map[:, 250:400] = 3
    drawn = draw(image, Found(label_map=label_map), NAMES)
    assert drawn[400, 300].tolist() == (0.55 * 100 + 0.45 * np.asarray(rgb(3))).astype(np.uint8).tolist()
    assert (drawn[100:, :250] == 100).all() and (drawn[:20, :60] == rgb(3)).all(-1).any()  # and a key to it


def test_colours_differ_also_for_those_who_see_no_red_or_no_green():
    """Of Vienot 1999's projections of linear light for protanopia and deuteranopia; 0..255."""
    blind = {
        "protan": [[0.1124, 0.8876, 0.0], [0.1124, 0.8876, 0.0], [0.004, -0.004, 1.0]],
        "deutan": [[0.2928, 0.7072, 0.0], [0.2928, 0.7072, 0.0], [-0.0223, 0.0223, 1.0]],
        "normal": np.eye(3).tolist(),
    }
    for matrix in blind.values():
        seen = [
            255 * np.clip(np.asarray(matrix) @ (np.asarray(rgb(k)) / 255) ** 2.2, 0, 1) ** (1 / 2.2) for k in range(7)
        ]
        apart = [np.linalg.norm(a - b) for place, a in enumerate(seen) for b in seen[:place]]
        assert min(apart) > 25
    assert len({colour_of(label) for label in range(21)}) == 21


def test_pixels_come_back_from_a_normalized_image():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels_of(to_tensor(Image.fromarray(pixels))), pixels)


def book_of(rank: int, world: int) -> dict[str, np.ndarray]:
    book = PictureBook(NAMES, count=3)
    for batch in EvalLoader(dense(val_canvases=7), 64, rank, world, 2, boxes=True, label_maps=True):
        book.add(batch, [truth_of(batch, row) for row in range(len(batch["image"]))])
    return book.result(world)


def pages(_: object = None) -> dict[str, np.ndarray]:
    return book_of(dist.get_rank(), dist.get_world_size())


def test_ranks_draw_the_same_book(tmp_path: Path):
    pytest.importorskip("pycocotools")
    alone = book_of(0, 1)
    assert list(alone) == ["validation_0", "validation_1", "validation_2"]
    left, right = alone["validation_0"][:, :512], alone["validation_0"][:, 516:]
    np.testing.assert_array_equal(left, right)  # the truth was found
    for own in run_ranks(pages, 2, tmp_path):
        assert list(own) == list(alone)
        for name in own:
            np.testing.assert_array_equal(own[name], alone[name])
