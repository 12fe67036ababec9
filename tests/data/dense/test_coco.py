"""A COCO json is read as written, and what is wrong in it is named."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from swin_moe.data.dense.canvases import Canvases
from swin_moe.data.dense.coco import Coco
from swin_moe.data.dense.masks import bitmaps_of, check_segmentation, rle_of, rle_of_segmentation
from swin_moe.data.pixels import BrokenImage
from swin_moe.data.sets.listing import listing_digest
from tests.data.dense.files import dense, save, write_coco

pytest.importorskip("pycocotools")


def test_canvases_come_back_as_they_were_written(tmp_path):
    write_coco(tmp_path)
    data, canvases = Coco(dense("coco", tmp_path), "train"), Canvases(dense(), "train")
    assert data.classes == tuple("0123456789") and data.category_ids == tuple(range(1, 11)) and len(data) == 6
    for index in range(6):
        ours, wanted = data.dense_sample(index), canvases.dense_sample(index)
        assert ours.image.tobytes() == wanted.image.tobytes() and ours.image_id == 10 + index
        for name in ("boxes", "labels", "crowd", "ids", "masks"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(wanted, name), err_msg=name)
        assert data.truth(index) == canvases.truth(index)
    np.testing.assert_array_equal(data.sizes(), canvases.sizes()[:6])


def test_own_category_ids_count_as_labels(tmp_path):
    ids = (900, 3, 77, 5, 6, 70, 80, 90, 100, 1)
    write_coco(tmp_path, ids=ids)
    data, canvases = Coco(dense("coco", tmp_path), "train"), Canvases(dense(), "train")
    assert data.category_ids == tuple(sorted(ids)) and data.classes == tuple(str(ids.index(n)) for n in sorted(ids))
    for index in range(6):
        names = [data.classes[label] for label in data.dense_sample(index).labels]
        assert names == [str(label) for label in canvases.dense_sample(index).labels]


def test_polygons_and_plain_runs_are_drawn_as_the_api_draws_them(tmp_path):
    tree = write_coco(tmp_path, images=1)
    square = [10.0, 10, 20, 10, 20, 20, 10, 20]
    runs = {"size": [64, 64], "counts": [64 * 2, 64, 64 * 61]}  # the third column
    triangle = [30.2, 5.1, 50.7, 9.3, 41.0, 30.9]
    row = tree["annotations"][0]
    tree["annotations"] = [
        {**row, "id": 1, "segmentation": [square], "bbox": [10, 10, 10, 10]},
        {**row, "id": 2, "segmentation": runs, "bbox": [2, 0, 1, 64], "iscrowd": 1},
        {**row, "id": 3, "segmentation": [square, triangle], "bbox": [10, 5, 41, 26]},
    ]
    save(tmp_path, tree)
    sample = Coco(dense("coco", tmp_path), "train").dense_sample(0)
    assert sample.masks is not None and sample.crowd.tolist() == [False, True, False]
    assert sample.masks[0, 10:20, 10:20].all() and sample.masks[0].sum() == 100
    assert sample.masks[1, :, 2].all() and sample.masks[1].sum() == 64
    from pycocotools import mask

    wanted = mask.decode(mask.merge(mask.frPyObjects([square, triangle], 64, 64))).astype(bool)
    np.testing.assert_array_equal(sample.masks[2], wanted)


BAD = {
    "category": ({"category_id": 99}, r"object 2 of image 10 has category_id 99, which is not in 'categories'"),
    "image": ({"image_id": 5}, r"object 2 of image 5 belongs to an image that is not in 'images'"),
    "outside": ({"bbox": [64, 0, 5, 5]}, r"object 2 of image 10 lies outside of the image, 64 x 64 pixels"),
    "above": ({"bbox": [0, -9, 5, 9]}, r"object 2 of image 10 lies outside of the image"),
    "no_area": ({"bbox": [1, 1, 0, 5]}, r"object 2 of image 10 has no area \(bbox \[1, 1, 0, 5\]"),
    "area_zero": ({"area": 0}, r"object 2 of image 10 has no area .*area 0"),
    "nan": ({"bbox": [1, 1, float("nan"), 5]}, r"object 2 of image 10 has the bbox .*not four numbers"),
    "three": ({"bbox": [1, 1, 5]}, r"object 2 of image 10 has the bbox \[1, 1, 5\]"),
    "size": (
        {"segmentation": {"size": [32, 64], "counts": [32 * 64]}},
        r"object 2 of image 10 has an RLE of 32 x 64 pixels \(height x width\), the image has 64 x 64",
    ),
    "runs": (
        {"segmentation": {"size": [64, 64], "counts": [5000]}},
        r"object 2 .*runs are not the image's 4096 pixels",
    ),
    "packed": ({"segmentation": {"size": [64, 64], "counts": "0" * 9}}, r"object 2 .*not the image's 4096 pixels"),
    "polygon": ({"segmentation": [[1, 2, 3, 4]]}, r"object 2 of image 10 has a polygon that is not at least three"),
    "words": ({"segmentation": "none"}, r"object 2 of image 10 has a segmentation that is neither polygons nor"),
    "no_mask": ({"segmentation": []}, r"object 2 of image 10 has no segmentation, which other objects"),
    "twice": ({"id": 1}, r"object 1 of image 10 has the id of another object"),
    "kind": ({"category_id": [1]}, r"object 2 of image 10 has a value of a wrong type"),
    "word": ({"area": "large"}, r"object 2 of image 10 has a value of a wrong type"),
    "no_id": ({"id": None}, r"object None of image 10 has no id"),
}


@pytest.mark.parametrize("change, said", BAD.values(), ids=list(BAD))
def test_a_wrong_object_is_named_and_left_out_or_refused(tmp_path, change, said, caplog):
    tree = write_coco(tmp_path, images=2, canvas_digits=(3, 3), digit_size=(8, 12))
    tree["annotations"][1] |= change
    tree["annotations"][0]["id"], tree["annotations"][1]["id"] = 1, change.get("id", 2)
    save(tmp_path, tree)
    with pytest.raises(ValueError, match=rf"{tmp_path}/train.json: 1 object is wrong: {said}.*on_bad=skip"):
        Coco(dense("coco", tmp_path, on_bad="fail"), "train")
    with caplog.at_level(logging.WARNING):
        data = Coco(dense("coco", tmp_path), "train")
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == 1 and "1 object is left out" in lines[0]
    assert len(data.dense_sample(0).boxes) == 2 == len(data.truth(0)) and len(data.dense_sample(1).boxes) == 3


def test_many_wrong_objects_are_one_sentence(tmp_path):
    tree = write_coco(tmp_path, canvas_digits=(3, 3), digit_size=(8, 12))
    for row in tree["annotations"]:
        row["category_id"] = 99
    save(tmp_path, tree)
    with pytest.raises(ValueError, match=r"18 objects are wrong: object \d+ .*; object .*; object .*; \.\.\.") as error:
        Coco(dense("coco", tmp_path, on_bad="fail"), "train")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="none of its 6 images"):
        Coco(dense("coco", tmp_path), "train")


NO_COCO = {
    "text": ("no json", r"train.json is no json: "),
    "list": ("[]", r"train.json is no COCO json: its top level is a list"),
    "keys": ('{"images": []}', r"train.json is no COCO json: it has no list 'categories'"),
    "rows": ('{"images": [3], "categories": []}', r"it has no list 'images' of objects"),
    "field": ('{"images": [{"id": 4}], "categories": [], "annotations": []}', r"image 4 has no file_name, height"),
    "empty": (
        '{"images": [{"id": 4, "file_name": "", "height": 1, "width": 1}], "categories": [], "annotations": []}',
        r"train.json: its list 'categories' is empty",
    ),
    "side": (
        '{"images": [{"id": 4, "file_name": "", "height": "9", "width": 1}], "categories": [], "annotations": []}',
        r"train.json: image 4 must have a file_name in quotes and sides of whole pixels, got '', height '9', width 1",
    ),
    "no_images": ('{"images": [], "categories": [{"id": 1, "name": "a"}], "annotations": []}', "'images' is empty"),
    "ids": (
        '{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "annotations": []}',
        r"two of 'categories' have the id 1",
    ),
}


@pytest.mark.parametrize("text, said", NO_COCO.values(), ids=list(NO_COCO))
def test_a_json_that_is_not_coco_is_refused(tmp_path, text, said):
    (tmp_path / "train").mkdir()
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        Coco(dense("coco", tmp_path), "train")
    assert "\n" not in str(error.value)


def test_missing_files_are_named_with_where_they_were_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no COCO json in .*looked for annotations/instances_train2017.json"):
        Coco(dense("coco", tmp_path), "train")
    with pytest.raises(ValueError, match=r"data\.dense\.train_annotations: no COCO json at .*own.json"):
        Coco(dense("coco", tmp_path, train_annotations="own.json"), "train")
    with pytest.raises(ValueError, match="no directory at"):
        Coco(dense("coco", tmp_path / "nowhere"), "train")


def test_missing_images_are_counted_and_left_out_or_refused(tmp_path, caplog):
    write_coco(tmp_path)
    for number in (2, 4):
        (tmp_path / "train" / f"{number}.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 6 images are missing, first .*/2\.png \(data\.on_broken=skip"):
        Coco(dense("coco", tmp_path), "train")
    data = Coco(dense("coco", tmp_path, data={"on_broken": "skip"}), "train")
    assert "2 of 6 images are missing" in caplog.text
    assert len(data) == 4 and [data.dense_sample(index).image_id for index in range(4)] == [10, 11, 13, 15]


def test_an_image_of_another_size_is_broken(tmp_path):
    tree = write_coco(tmp_path, images=1)
    tree["images"][0]["height"] = 60
    for row in tree["annotations"]:
        row["segmentation"] = [[1, 1, 5, 1, 5, 5]]
        row["bbox"] = [1, 1, 4, 4]
    save(tmp_path, tree)
    with pytest.raises(BrokenImage, match=r"0.png: is 64 x 64 pixels, train.json says 64 x 60"):
        Coco(dense("coco", tmp_path), "train").dense_sample(0)


def test_training_leaves_out_empty_and_tiny_images_and_objects_that_evaluation_has(tmp_path, caplog):
    tree = write_coco(tmp_path, images=3, canvas_digits=(2, 2))
    (tmp_path / "val").symlink_to(tmp_path / "train")
    first = tree["images"][0]["id"]
    tree["annotations"] = [row for row in tree["annotations"] if row["image_id"] != first]
    tree["annotations"][0]["bbox"][2:] = [0.5, 9]
    save(tmp_path, tree)
    save(tmp_path, tree, "val")
    train, val = Coco(dense("coco", tmp_path), "train"), Coco(dense("coco", tmp_path), "val")
    assert "categories: " in caplog.text and "no object of" in caplog.text
    assert (len(train), len(val)) == (2, 3)
    assert len(train.dense_sample(0).boxes) == 1 and len(val.dense_sample(1).boxes) == 2 == len(val.truth(1))
    assert len(Coco(dense("coco", tmp_path, keep_empty=True), "train")) == 3
    with pytest.raises(ValueError, match="none of its 3 images"):
        Coco(dense("coco", tmp_path, min_side=65), "train")


def test_boxes_without_masks_are_enough(tmp_path):
    tree = write_coco(tmp_path)
    for row in tree["annotations"]:
        del row["segmentation"]
    save(tmp_path, tree)
    data = Coco(dense("coco", tmp_path), "train")
    assert data.dense_sample(0).masks is None and data.truth(0)[0]["segmentation"] is None
    with pytest.raises(ValueError, match="have no masks"):
        Coco(dense("coco", tmp_path), "train", boxes=False, maps=True).dense_sample(0)


def test_label_maps_are_painted_from_masks(tmp_path):
    tree = write_coco(tmp_path, digit_overlap=True, canvas_digits=(3, 3), digit_size=(8, 12))
    data = Coco(dense("coco", tmp_path), "train", boxes=False, maps=True)
    canvases = Canvases(dense(digit_overlap=True, canvas_digits=(3, 3), digit_size=(8, 12)), "train")
    assert data.classes == canvases.__class__(dense(), "train", boxes=False, maps=True).classes
    for index in range(6):
        np.testing.assert_array_equal(data.dense_sample(index).label_map, canvases.dense_sample(index).label_map)
    tree["annotations"][0]["iscrowd"] = 1
    save(tmp_path, tree)
    sample = Coco(dense("coco", tmp_path), "train", boxes=False, maps=True).dense_sample(0)
    assert (
        sample.masks is not None and sample.label_map is not None and (sample.label_map[sample.masks[0]] == 255).all()
    )


def test_label_maps_of_a_folder_are_taken_where_boxes_are_wanted_too(tmp_path):
    write_coco(tmp_path, images=2)
    painted = Coco(dense("coco", tmp_path), "train", maps=True)
    assert painted.classes == tuple("0123456789")
    np.testing.assert_array_equal(
        painted.dense_sample(0).label_map, Canvases(dense(), "train").dense_sample(0).label_map
    )
    for folder, options in (("stuffthingmaps/train2017", {}), ("own", {"train_maps": "own"})):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (64, 64), 130).save(tmp_path / folder / "0.png")
        Image.new("L", (64, 32), 130).save(tmp_path / folder / "1.png")
        data = Coco(dense("coco", tmp_path, **options), "train", maps=True)
        assert (data.dense_sample(0).label_map == 130).all() and len(data.dense_sample(0).boxes)
        with pytest.raises(BrokenImage, match=r"1\.png: is 64 x 64 pixels, its label map .*1\.png has another size"):
            data.dense_sample(1)
        (tmp_path / folder / "1.png").unlink()
        with pytest.raises(BrokenImage, match=r"1\.png: label map: No such file"):
            data.dense_sample(1)
    with pytest.raises(ValueError, match=r"data\.dense\.train_maps: no folder of label maps at .*none"):
        Coco(dense("coco", tmp_path, train_maps="none"), "train", maps=True)


def test_the_digest_tells_other_objects_and_names_but_no_other_place(tmp_path):
    tree = write_coco(tmp_path / "a")
    write_coco(tmp_path / "b")
    digests = [listing_digest(Coco(dense("coco", tmp_path / name), "train")) for name in "ab"]
    assert digests[0] == digests[1]
    tree["annotations"][0]["bbox"][0] += 1
    save(tmp_path / "b", tree)
    assert listing_digest(Coco(dense("coco", tmp_path / "b"), "train")) != digests[0]


def test_layouts_of_coco_and_of_exports_are_found(tmp_path):
    for name, file, folder in (
        ("coco", "annotations/instances_train2017.json", "train2017"),
        ("export", "train/_annotations.coco.json", "train"),
        ("flat", "annotations/train.json", "images"),
    ):
        root = tmp_path / name
        write_coco(root)
        (root / "annotations").mkdir()
        if folder != "train":
            (root / "train").rename(root / folder)
        (root / "train.json").rename(root / file)
        assert len(Coco(dense("coco", root), "train")) == 6
        assert json.loads((root / file).read_text())["images"]


def test_checked_segmentations_are_what_the_api_takes():
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = rng.integers(1, 40, 2).tolist()
        bitmap = rng.random((height, width)) < rng.random()
        rle = rle_of(bitmap)
        row = {"size": [height, width], "counts": rle["counts"].decode()}
        check_segmentation(row, height, width)
        np.testing.assert_array_equal(bitmaps_of([rle_of_segmentation(row, height, width)], height, width)[0], bitmap)
