"""Images with labels and without in one batch: their order, the two views of an image, and what is refused."""

import collections
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from swin_moe.data.dense.augment import TrainingPlanner
from swin_moe.data.dense.geometry import Affine, Flip, Resize, moved_boxes
from swin_moe.data.dense.mixed import mixed_order
from swin_moe.data.dense.strong import GREY, Erase, Operation, Recolour
from swin_moe.data.transforms import augment_key
from swin_moe.models.soft_teacher.pseudo import moved
from tests.data.dense.files import dense, write_coco
from tests.data.dense.test_geometry import blocks
from tests.data.dense.test_loader import assert_same, rows_of, train_loader

STRONG: dict[str, Any] = {"rotate": 30.0, "shear": 30.0, "translate": 0.1, "recolour": True, "erase": (1, 4)}
MIXED: dict[str, Any] = {"canvases": 24, "labelled": 0.2, "unlabelled": "keep", "group_shapes": False}


@pytest.mark.parametrize("ratio", [(1, 4), (1, 1), (2, 3), (7, 1)], ids=str)
def test_kinds_are_mixed_by_the_ratio_and_every_image_comes_as_often(ratio):
    """Defect 12: there the first image was never drawn. One image a step is legal, which there could not work."""
    is_labelled = np.zeros(30, dtype=bool)
    is_labelled[[0, 3, 4, 9, 20, 21, 29]] = True
    epochs = [mixed_order(is_labelled, ratio, seed=5, epoch=epoch) for epoch in range(8)]
    images = np.concatenate(epochs)
    kinds = is_labelled[images]
    assert kinds[0]
    for start in range(len(images) - sum(ratio) + 1):  # any images in a row, over the ends of epochs too
        assert kinds[start : start + sum(ratio)].sum() == ratio[0]
    for kind in (True, False):
        counts = collections.Counter(images[kinds == kind].tolist())
        assert set(counts) == set(np.flatnonzero(is_labelled == kind)) and 0 in np.flatnonzero(is_labelled)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert all((a == mixed_order(is_labelled, ratio, seed=5, epoch=e)).all() for e, a in enumerate(epochs))
    assert (epochs[0] != mixed_order(is_labelled, ratio, seed=6, epoch=0)).any() and (epochs[0] != epochs[1]).any()


def test_which_images_have_labels_depends_on_nothing_but_data_subset(monkeypatch):
    """Defect 12: there the split used an offset that the shell's environment set."""
    config = dense(**MIXED, data={"global_batch": 4})
    found = []
    for seed, offset in ((1, "0"), (2, "7")):
        monkeypatch.setenv("OFFSET", offset)
        with train_loader(config, views=True, label_maps=False, seed=seed) as loader:
            found.append(loader._source.is_labelled.tolist())  # type: ignore[union-attr]
    assert found[0] == found[1] and sum(found[0]) == 5


def test_the_teacher_sees_a_weak_view_of_images_without_labels_alone():
    config = dense(**MIXED, **STRONG, short=(40, 48, 56), long=90, data={"global_batch": 10, "hflip": 0.5})
    with train_loader(config, views=True, label_maps=False) as loader:
        (batch,) = next(loader.batches(0)).batches
    bare = ~batch["labelled"]
    assert bare.tolist() == [False, *[True] * 4] * 2
    assert len(batch["view"]) == len(batch["view_size"]) == len(batch["view_matrix"]) == 8
    for row, (size, matrix) in enumerate(zip(batch["view_size"], batch["view_matrix"])):
        height, width = size.tolist()
        assert not batch["view"][row, :, height:].any() and not batch["view"][row, :, :, width:].any()
        assert matrix[0, 1] == matrix[1, 0] == 0 and abs(matrix[0, 0]) == width / 64  # resized, maybe mirrored
    assert not torch.equal(batch["size"][bare], batch["view_size"])  # drawn apart
    turned = batch["matrix"][bare]
    assert (turned[:, 0, 1] != 0).any() and not batch["matrix"][~bare][:, 0, 1].any()
    assert [len(boxes) > 0 for boxes in batch["boxes"]] == batch["labelled"].tolist()


def test_world_and_accumulation_change_no_view():
    config = dense(**MIXED, **STRONG, short=(40, 48, 56), long=90, data={"global_batch": 8})

    def views_of(world: int) -> tuple[dict, dict]:
        """Returns what the student's view and what the teacher's is of every (step, sample)."""
        own: dict = {}
        views: dict = {}
        for rank in range(world):
            with train_loader(config, rank=rank, world=world, views=True, label_maps=False) as loader:
                for item in loader.batches(1, 4):
                    fields: Any = item.batches[0]
                    view = {key: fields.pop(key) for key in ("view", "view_size", "view_matrix")}
                    bare = fields["sample"][~fields["labelled"]].tolist()
                    own |= {(item.step, int(row["sample"])): row for row in rows_of(fields)}
                    views |= {(item.step, s): {k: v[place] for k, v in view.items()} for place, s in enumerate(bare)}
        return own, views

    for one, other in zip(views_of(1), views_of(8)):
        assert one
        assert_same(one, other)


def test_an_image_that_comes_twice_in_an_epoch_is_moved_twice_differently():
    config = dense(**MIXED, short=(40, 48, 56), long=90, sample_ratio=(1, 1), data={"global_batch": 6, "hflip": 0.5})
    seen = collections.defaultdict(set)
    with train_loader(config, views=True, label_maps=False) as loader:
        for item in loader.batches(0, loader.steps_per_epoch):
            for row in rows_of(item.batches[0]):
                if row["labelled"]:
                    seen[int(row["image_id"])].add((tuple(row["size"].tolist()), float(row["matrix"][0, 0])))
    assert len(seen) == 5 and sum(map(len, seen.values())) > 7


@pytest.mark.parametrize("key", range(12))
def test_boxes_come_from_one_view_to_the_other_exactly(key):
    """Back through the teacher's matrix and on through the student's: what the stored boxes become directly."""
    before = blocks(seed=key % 4)
    config = dense(**STRONG, short=(40, 56), long=90, data={"hflip": 0.5})
    weak, strong = (TrainingPlanner(config, view) for view in ("teacher", "student"))  # type: ignore[arg-type]
    plans = [plan(*before.size, augment_key(0, 0, key)) for plan in (weak, strong)]
    teacher, student = (plan.apply(before) for plan in plans)
    assert len(teacher.boxes) == len(before.boxes)
    across = torch.from_numpy(student.matrix @ np.linalg.inv(teacher.matrix))
    size = torch.tensor(student.size)
    got = moved(torch.from_numpy(teacher.boxes), across, size)
    height, width = student.size
    direct = moved_boxes(before.boxes, student.matrix).clip(0, [width, height, width, height])
    np.testing.assert_allclose(got.numpy(), direct, rtol=0, atol=1e-9)
    inside = (direct[:, 2] > direct[:, 0]) & (direct[:, 3] > direct[:, 1])
    assert len(student.boxes) == inside.sum()


def test_the_student_sees_what_the_official_recipe_says():
    config = dense(**STRONG, short=(40,), long=90, data={"hflip": 0.5})
    planner = TrainingPlanner(config, "student")
    moves = [planner(48, 60, augment_key(0, 0, index)).moves for index in range(600)]
    kinds = collections.Counter(tuple(type(m) for m in own if not isinstance(m, Flip)) for own in moves)
    assert set(kinds) == {(Resize, Recolour, Affine, Erase), (Resize, Affine, Recolour, Erase)}
    assert min(kinds.values()) > 200
    operations = collections.Counter(m.operation for own in moves for m in own if isinstance(m, Recolour))
    assert len(operations) == 9 and min(operations.values()) > 30
    assert {m.step for own in moves for m in own if isinstance(m, Recolour)} == set(range(1, 10))
    linear = [np.asarray(m.matrix)[:, :2] for own in moves for m in own if isinstance(m, Affine)]
    shifted = [np.allclose(a, np.eye(2)) for a in linear]
    assert 220 < sum(shifted) < 380  # two of four
    turned = [a for a, plain in zip(linear, shifted) if not plain and np.allclose(a @ a.T, np.eye(2))]
    assert 90 < len(turned) < 210 and max(abs(a[1, 0]) for a in turned) <= 0.5  # 30 degrees
    erased = [m.places for own in moves for m in own if isinstance(m, Erase)]
    assert {len(places) for places in erased} == {1, 2, 3, 4}
    assert all(b - t <= 8 and r - le <= 10 for places in erased for t, le, b, r in places)
    labelled = TrainingPlanner(config, "labelled")(48, 60, 1).moves
    assert not any(isinstance(m, Affine | Erase) for m in labelled) and isinstance(labelled[-1], Recolour)
    assert all(isinstance(m, Flip | Resize) for m in TrainingPlanner(config, "teacher")(48, 60, 1).moves)


@pytest.mark.parametrize("operation", get_args(Operation))
def test_colours_change_and_nothing_else(operation):
    before = blocks(seed=1)
    after = Recolour(operation, 3)(before)
    same = np.array_equal(np.asarray(after.image), np.asarray(before.image))
    assert same == (operation == "identity") or operation in ("autocontrast", "equalize", "color")  # it is grey
    assert after.boxes is before.boxes and after.matrix is before.matrix and after.size == before.size


def test_colour_operations_by_hand():
    image = Image.fromarray(np.asarray([[[10, 100, 200]]], dtype=np.uint8))

    def levels(operation: Any, step: int) -> list[int]:
        sample = blocks()
        changed = Recolour(operation, step)(sample.__class__(image, 0, (1, 1)))
        return np.asarray(changed.image)[0, 0].tolist()

    assert levels("solarize", 4) == [10, 100, 55]  # inverted from 102 on
    assert levels("posterize", 5) == [0, 64, 192]  # two bits are left
    assert levels("brightness", 5) == [10, 100, 200]  # times 1
    assert levels("brightness", 9) == [17, 172, 255] and levels("brightness", 1) == [2, 28, 56]


def test_erased_places_are_grey_and_objects_stay():
    before = blocks()
    after = Erase(((2, 3, 8, 12), (40, 50, 48, 60)))(before)
    pixels, old = np.asarray(after.image), np.asarray(before.image)
    assert (pixels[2:8, 3:12] == GREY).all() and (pixels[40:48, 50:60] == GREY).all()
    untouched = np.ones(before.size, dtype=bool)
    untouched[2:8, 3:12] = untouched[40:48, 50:60] = False
    assert (pixels[untouched] == old[untouched]).all()
    assert after.boxes is before.boxes and after.masks is before.masks


def with_folder(tmp_path: Path, **options: Any) -> Any:
    """Returns a config of 8 images with labels, and the folder `bare` of 6 without."""
    write_coco(tmp_path, images=8)
    (tmp_path / "bare" / "below").mkdir(parents=True)
    for number in range(6):
        folder = tmp_path / "bare" / ("below" if number % 2 else "")
        Image.fromarray(np.full((40 + number, 50, 3), 40 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    return dense("coco", tmp_path, unlabelled_images="bare", group_shapes=False, min_side=1, **options)


def test_images_of_a_folder_stand_beside_a_json(tmp_path):
    pytest.importorskip("pycocotools")
    config = with_folder(tmp_path, data={"global_batch": 7}, sample_ratio=(1, 6))
    with train_loader(config, views=True, label_maps=False) as loader:
        dataset: Any = loader.dataset
        assert len(loader) == 14 and dataset.path(8).endswith("bare/0.png") and not dataset.truth(9)
        (batch,) = next(loader.batches(0)).batches
        assert dataset.sizes()[8:].tolist() == [[40 + n, 50] for n in (0, 2, 4, 1, 3, 5)]
    assert batch["labelled"].tolist() == [True, *[False] * 6] and len(batch["view"]) == 6
    assert sorted(batch["image_id"][1:].tolist()) == list(range(8, 14))


def refuse(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words), train_loader(config, views=True, label_maps=False) as loader:
        next(loader.batches(0))


def test_what_is_wrong_with_images_without_labels_is_one_sentence(tmp_path, caplog):
    pytest.importorskip("pycocotools")
    refuse(dense(canvases=8, group_shapes=False, data={"global_batch": 4}), "all 8 images of training have labels")
    config = with_folder(tmp_path, data={"global_batch": 4})
    (tmp_path / "bare" / "x.png").write_bytes(b"no image")
    refuse(config, r"unlabelled_images: .*bare/x\.png is no image that can be read .*data\.on_broken=skip")
    skip = {"global_batch": 4, "on_broken": "skip"}
    skipping = dense("coco", tmp_path, unlabelled_images="bare", min_side=1, data=skip)
    with train_loader(skipping, views=True, label_maps=False) as loader:
        assert len(loader) == 14
    refuse(dense("coco", tmp_path, unlabelled_images="nowhere", data={"global_batch": 4}), "no folder at .*nowhere")
    (tmp_path / "empty").mkdir()
    refuse(dense("coco", tmp_path, unlabelled_images="empty", data={"global_batch": 4}), "no image in .*empty")


def test_labels_without_an_object_are_refused():
    """Defect 13: there training on nothing was silent."""
    pytest.importorskip("pycocotools")
    config = dense(**MIXED, canvas_digits=(0, 0), keep_empty=True, data={"global_batch": 4})
    refuse(config, "none of the 5 images with labels has an object")
