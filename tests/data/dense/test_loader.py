"""Batches with objects and label maps: the same images, moved and padded alike, whatever the layout."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from swin_moe.config import DataConfig
from swin_moe.data.batch import to_device
from swin_moe.data.dense.canvases import Canvases
from swin_moe.data.dense.loader import group_by_shape
from swin_moe.data.loader import EvalLoader, TrainLoader, epoch_order
from swin_moe.data.transforms import to_tensor
from tests.data.dense.files import dense, save, write_coco, write_label_maps

SCALES: dict[str, Any] = {"short": (40, 50, 60), "long": 90, "crop_short": (48, 56), "crop_sides": (32, 48)}
SCALES |= {"canvases": 24}
NEEDS: dict[str, Any] = {"boxes": True, "label_maps": True}


def train_loader(config: DataConfig, *, rank=0, world=1, accumulation=1, seed=3, **options) -> TrainLoader:
    micro = config.global_batch // (world * accumulation)
    needs = NEEDS | options
    return TrainLoader(
        config, 64, seed=seed, rank=rank, world_size=world, micro_batch=micro, accumulation=accumulation, **needs
    )


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """Returns all that a batch says about each of its images."""
    rows = []
    for place in range(len(batch["image"])):
        row = {k: v[place] for k, v in batch.items() if isinstance(v, (Tensor, list)) and len(v) > place}
        rows.append(row)
    return rows


def union(config: DataConfig, steps: range, *, world=1, accumulation=1, **options) -> dict:
    """Returns {(step, sample): what the batches say about it} over all ranks."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for rank in range(world):
        with train_loader(config, rank=rank, world=world, accumulation=accumulation, **options) as loader:
            for item in loader.batches(steps.start, steps.stop):
                for batch in item:
                    for row in rows_of(batch):
                        key = (batch["step"], int(row["sample"]))
                        assert key not in found
                        found[key] = row
    return found


def assert_same(a: dict, b: dict) -> None:
    assert sorted(a) == sorted(b)
    for key, row in a.items():
        assert row.keys() == b[key].keys()
        for name in row:
            assert torch.equal(row[name], b[key][name]), (key, name)


def test_world_accumulation_and_workers_change_nothing():
    config = dense(**SCALES, data={"global_batch": 8})
    steps = range(2, 5)  # across the end of an epoch of 3 steps
    reference = union(config, steps)
    assert len(reference) == 24 and {"image", "boxes", "masks", "label_map", "matrix", "size"} <= reference[2, 0].keys()
    for world, accumulation in ((2, 1), (4, 2), (1, 4)):
        assert_same(reference, union(config, steps, world=world, accumulation=accumulation))
    with_workers = dense(**SCALES, data={"global_batch": 8, "workers": 2})
    assert_same(reference, union(with_workers, steps, world=2))
    resumed = union(config, range(2, 3)) | union(config, range(3, 5))
    assert_same(reference, resumed)


def test_padding_over_one_forward_depends_on_the_layout_and_says_nothing_else_new():
    config = dense(**SCALES, pad_over="forward", divisor=1, data={"global_batch": 8})
    one, four = union(config, range(3)), union(config, range(3), world=4)
    sizes = [{tuple(row["image"].shape) for row in found.values()} for found in (one, four)]
    assert sizes[0] != sizes[1]
    for key, row in one.items():
        assert torch.equal(row["boxes"], four[key]["boxes"]) and torch.equal(row["size"], four[key]["size"])


def test_the_last_smaller_batch_and_an_empty_one():
    config = dense(canvases=21, data={"global_batch": 8, "drop_last": False})
    found = union(config, range(3), world=4)
    assert len(found) == 21
    with train_loader(config, rank=3, world=4) as loader:
        batch = list(loader.batches(0, 3))[2].batches[0]
    assert batch["image"].shape == (0, 3, 64, 64) and batch["boxes"] == [] and batch["label_map"].shape == (0, 64, 64)
    assert batch["matrix"].shape == (0, 3, 3) and batch["size"].shape == (0, 2)


def test_a_batch_is_what_the_data_set_has():
    config = dense(canvases=12, divisor=40, data={"global_batch": 4, "hflip": 0.0})
    canvases = Canvases(config, "train")
    order = epoch_order(12, seed=3, epoch=0)
    with train_loader(config) as loader:
        batch = next(loader.batches(0)).batches[0]
    assert batch["image"].shape == (4, 3, 80, 80) and batch["target"].tolist() == [0] * 4
    for place, index in enumerate(order[:4]):
        sample = canvases.dense_sample(int(index))
        image = batch["image"][place]
        assert torch.equal(image[:, :64, :64], to_tensor(sample.image))
        assert not image[:, 64:].any() and not image[:, :, 64:].any()  # zero after normalization
        assert batch["boxes"][place].dtype == torch.float32
        assert batch["boxes"][place].tolist() == sample.boxes.tolist()
        assert batch["labels"][place].tolist() == sample.labels.tolist()
        np.testing.assert_array_equal(batch["masks"][place][:, :64, :64].numpy(), sample.masks)
        assert not batch["masks"][place][:, 64:].any()
        np.testing.assert_array_equal(batch["label_map"][place, :64, :64].numpy(), sample.label_map)
        assert (batch["label_map"][place, 64:] == 255).all() and (batch["label_map"][place, :, 64:] == 255).all()
        assert batch["image_id"][place] == index and batch["size"][place].tolist() == [64, 64]
        assert torch.equal(batch["matrix"][place], torch.eye(3, dtype=torch.float64))


def test_a_loader_process_hands_over_few_tensors():
    config = dense(canvas_digits=(0, 2), data={"global_batch": 8})
    with train_loader(config) as loader:
        packed, _ = loader._source[loader._request(0, 0)]
        tensors = [value for value in packed.values() if isinstance(value, Tensor)]
        nested = [value for value in packed.values() if isinstance(value, list)]
        assert len(tensors) == 13 and all(not isinstance(item, Tensor) for value in nested for item in value)
        batch = next(loader.batches(0)).batches[0]
    assert [len(boxes) for boxes in batch["boxes"]] == packed["counts"] and 0 in packed["counts"]
    for number, boxes, masks in zip(batch["image_id"].tolist(), batch["boxes"], batch["masks"]):
        sample = Canvases(config, "train").dense_sample(number)
        assert masks.shape == (len(boxes), 64, 64) and len(boxes) == len(sample.boxes)
        assert "counts" not in batch


def test_tasks_get_what_they_need():
    config = dense(data={"global_batch": 4})
    for needs in ({"boxes": True, "label_maps": False}, {"boxes": False, "label_maps": True}):
        with train_loader(config, **needs) as loader:
            batch = next(loader.batches(0)).batches[0]
        assert ("boxes" in batch) == ("masks" in batch) == needs["boxes"]
        assert ("label_map" in batch) == needs["label_maps"]
        assert loader.num_classes == (10 if needs["boxes"] else 11)


def test_lists_of_tensors_are_moved_to_the_device_too():
    with train_loader(dense(data={"global_batch": 2})) as loader:
        batch = next(loader.batches(0)).batches[0]
    moved = to_device(batch, torch.device("meta"), "fp64")
    assert all(box.is_meta and box.dtype == torch.float64 for box in moved["boxes"])
    assert all(mask.is_meta and mask.dtype == torch.bool for mask in moved["masks"])


def mixed_coco(root: Any, images: int = 10) -> None:
    """Writes canvases, every other one cut to 64 x 40 pixels (width x height)."""
    tree = write_coco(root, images=images, canvas_digits=(1, 1))
    for number, image in enumerate(tree["images"]):
        if number % 2:
            file = root / "train" / image["file_name"]
            Image.open(file).crop((0, 0, 64, 40)).save(file)
            image["height"] = 40
    wide = {image["id"] for image in tree["images"] if image["height"] == 40}
    for row in tree["annotations"]:
        if row["image_id"] in wide:
            row |= {"segmentation": [[5, 5, 20, 5, 20, 20]], "bbox": [5, 5, 15, 15], "area": 112.5}
    save(root, tree)
    save(root, tree, "val")
    (root / "val").symlink_to(root / "train")


def evaluated(config: DataConfig, world: int, batch: int) -> tuple[dict[int, dict[str, Any]], list[list[int]]]:
    """Returns (image number -> what its batch says, the batches' lengths per rank)."""
    found: dict[int, dict[str, Any]] = {}
    lengths = []
    for rank in range(world):
        with EvalLoader(config, 64, rank, world, batch, boxes=True) as loader:
            batches = list(loader)
            assert len(loader) == len(batches)
        lengths.append([len(item["image"]) for item in batches])
        for item in batches:
            for row in rows_of(item):
                assert int(row["image_id"]) not in found
                found[int(row["image_id"])] = row
    return found, lengths


@pytest.mark.parametrize("batch", [1, 3])
def test_evaluation_sees_each_image_once_and_alike_on_any_number_of_ranks(tmp_path, batch):
    pytest.importorskip("pycocotools")
    mixed_coco(tmp_path)
    config = dense("coco", tmp_path, divisor=16)
    alone, _ = evaluated(config, 1, 1)
    assert len(alone) == 10 and {row["image"].shape[1:] for row in alone.values()} == {(64, 64), (48, 64)}
    for world in (1, 2, 3, 4):
        found, lengths = evaluated(config, world, batch)
        assert len({len(own) for own in lengths}) == 1  # as many batches on every rank
        assert sorted(found) == sorted(alone)
        for number, row in found.items():
            for name in row.keys() - {"sample", "truth"}:
                assert torch.equal(torch.as_tensor(row[name]), torch.as_tensor(alone[number][name])), name
            assert row["truth"] == alone[number]["truth"]


def test_evaluation_gives_label_maps_as_stored(tmp_path):
    write_label_maps(tmp_path)
    config = dense("label_maps", tmp_path, eval_short=100, divisor=1)
    with EvalLoader(config, 64, 0, 1, 4, label_maps=True, num_classes=11) as loader:
        (batch,) = list(loader)
    assert batch["image"].shape == (4, 3, 100, 100) and batch["label_map"].shape == (4, 64, 64)
    assert batch["original_size"].tolist() == [[64, 64]] * 4 and "boxes" not in batch
    np.testing.assert_array_equal(batch["label_map"][1].numpy(), Canvases(config, "val").dense_sample(1).label_map)


def test_batches_of_training_hold_one_shape(tmp_path):
    pytest.importorskip("pycocotools")
    mixed_coco(tmp_path, images=20)
    config = dense("coco", tmp_path, data={"global_batch": 4})
    with train_loader(config, label_maps=False) as loader:
        shapes = [{tuple(size) for size in item.batches[0]["size"].tolist()} for item in loader.batches(0, 5)]
    assert [len(shape) for shape in shapes] == [1, 1, 1, 1, 2]  # 10 of each: what is left comes last


def test_grouping_keeps_every_image_and_the_order_of_each_shape():
    rng = np.random.default_rng(0)
    for count, batch in ((0, 3), (1, 3), (7, 2), (40, 4), (41, 8)):
        order, wide = rng.permutation(count), rng.random(count) < 0.4
        grouped = group_by_shape(order, wide, batch)
        assert sorted(grouped) == list(range(count))
        for shape in (True, False):
            assert [i for i in grouped if wide[i] == shape] == [i for i in order if wide[i] == shape]
        whole = wide.sum() // batch + (~wide).sum() // batch
        for place in range(whole):
            assert len({wide[i] for i in grouped[place * batch : (place + 1) * batch]}) == 1
    assert group_by_shape(np.arange(6), np.array([1, 0, 1, 1, 0, 1], dtype=bool), 2).tolist() == [0, 2, 1, 4, 3, 5]


def test_a_share_has_labels_and_the_others_are_dropped_or_bare():
    few = dense(canvases=40, labelled=0.1, data={"global_batch": 4})
    kept = dense(canvases=40, labelled=0.1, unlabelled="keep", data={"global_batch": 4})
    with train_loader(few) as loader, train_loader(kept) as whole:
        assert (len(loader), len(whole)) == (4, 40)
        chosen = {int(row["image_id"]) for row in rows_of(next(loader.batches(0)).batches[0])}
        rows = [row for item in whole.batches(0, 10) for row in rows_of(item.batches[0])]
    assert {int(row["image_id"]) for row in rows if row["labelled"]} == chosen and len(rows) == 40
    for row in rows:
        assert (len(row["boxes"]) > 0) == bool(row["labelled"]) == bool((row["label_map"] != 255).any())
        assert row["masks"].shape[0] == len(row["boxes"])
    with train_loader(dense(canvases=40, labelled=0.1, data={"global_batch": 4, "subset": 1})) as loader:
        assert {int(row["image_id"]) for row in rows_of(next(loader.batches(0)).batches[0])} != chosen


def test_broken_images_are_left_out_on_whichever_rank_they_are(tmp_path, caplog):
    pytest.importorskip("pycocotools")
    write_coco(tmp_path, images=8)
    (tmp_path / "train/3.png").write_bytes(b"no image")
    failing = dense("coco", tmp_path, data={"global_batch": 8})
    with (
        pytest.raises(ValueError, match=r"broken image .*/3\.png: not an image"),
        train_loader(failing, label_maps=False) as loader,
    ):
        next(loader.batches(0))
    config = dense("coco", tmp_path, data={"global_batch": 8, "on_broken": "skip"})
    with caplog.at_level(logging.WARNING):
        reference = union(config, range(1), label_maps=False)
    assert len(reference) == 7 and "3.png" in caplog.text
    assert_same(reference, union(config, range(1), world=4, label_maps=False))


def test_classes_follow_their_names_as_the_network_numbers_them(tmp_path):
    pytest.importorskip("pycocotools")
    write_coco(tmp_path, images=3, split="val")
    config = dense("coco", tmp_path)
    names = tuple(str(label) for label in range(9, -1, -1)) + ("other",)
    rows = []
    for classes in ((), names):
        with EvalLoader(config, 64, 0, 1, 3, boxes=True, classes=classes) as loader:
            (batch,) = list(loader)
        rows.append(batch)
    plain, renamed = rows
    assert loader.dataset.classes == names
    for a, b, truth, other in zip(plain["labels"], renamed["labels"], plain["truth"], renamed["truth"]):
        assert (9 - a).tolist() == b.tolist()
        assert [9 - row["category_id"] for row in truth] == [row["category_id"] for row in other]
    with pytest.raises(ValueError, match=r"class '9' of .* is none of the 9 classes the network has \('0', '1'"):
        EvalLoader(config, 64, 0, 1, 3, boxes=True, classes=tuple("012345678"))


@pytest.mark.parametrize(
    "config, needs, said",
    [
        (DataConfig(), {}, r"data\.name=digits has no boxes and label maps, which task\.name needs; allowed: canvases"),
        (DataConfig(), {"label_maps": False}, r"data\.name=digits has no boxes, which"),
        (dense(data={"images_per_class": 3}), {}, r"data\.images_per_class=3 is not for boxes"),
        (dense(canvases=100, data={"global_batch": 128}), {}, r"larger than the 100 training images"),
        (dense(), {"num_classes": 9}, r"model\.num_classes=9 is too small: data\.name=canvases has 10 classes"),
        (dense(), {"boxes": False, "label_maps": False}, r"data\.name: canvases has boxes or label maps"),
    ],
)
def test_user_errors(config, needs, said):
    with pytest.raises(ValueError, match=said) as error:
        train_loader(config, **needs)
    assert "\n" not in str(error.value)
