"""Folders of images and label maps: found, read, and what is wrong in them named."""

import numpy as np
import pytest
from PIL import Image

from swin_moe.data.dense.canvases import Canvases
from swin_moe.data.dense.label_maps import LabelMaps, read_classes
from swin_moe.data.pixels import BrokenImage
from tests.data.dense.files import dense, write_label_maps


def test_maps_come_back_as_they_were_written(tmp_path):
    write_label_maps(tmp_path)
    for split in ("train", "val"):
        data = LabelMaps(dense("label_maps", tmp_path), split, num_classes=11)
        canvases = Canvases(dense(), split)
        assert len(data) == 4 and data.num_classes == 11 and data.sizes().tolist() == [[64, 64]] * 4
        for index in range(4):
            sample, wanted = data.dense_sample(index), canvases.dense_sample(index)
            assert sample.image.tobytes() == wanted.image.tobytes()
            np.testing.assert_array_equal(sample.label_map, wanted.label_map)
            assert len(sample.boxes) == 0 and data.truth(index) == []


def test_zero_is_ignored_and_the_others_count_from_zero(tmp_path):
    write_label_maps(tmp_path)
    data = LabelMaps(dense("label_maps", tmp_path, reduce_zero_label=True), "train", num_classes=10)
    wanted = Canvases(dense(), "train").dense_sample(2).label_map
    assert wanted is not None
    np.testing.assert_array_equal(data.dense_sample(2).label_map, np.where(wanted == 0, 255, wanted.astype(int) - 1))
    assert data.category_ids == tuple(range(1, 11))


def test_255_stays_ignored_either_way(tmp_path):
    write_label_maps(tmp_path)
    file = tmp_path / "annotations/training/0.png"
    pixels = np.array(Image.open(file))
    pixels[:5] = 255
    Image.fromarray(pixels).save(file)
    for reduce in (False, True):
        data = LabelMaps(dense("label_maps", tmp_path, reduce_zero_label=reduce), "train", num_classes=11)
        label_map = data.dense_sample(0).label_map
        assert label_map is not None and (label_map[:5] == 255).all()


def test_classes_come_from_a_file_or_are_numbers(tmp_path):
    write_label_maps(tmp_path)
    assert LabelMaps(dense("label_maps", tmp_path), "train", num_classes=11).classes[10] == "10"
    (tmp_path / "classes.txt").write_text("nothing\n" + "".join(f"digit {n}\n" for n in range(10)))
    assert LabelMaps(dense("label_maps", tmp_path), "train", num_classes=3).classes[1] == "digit 0"
    (tmp_path / "own.txt").write_text("a\nb\n")
    data = LabelMaps(dense("label_maps", tmp_path, class_file="own.txt"), "train")
    assert data.classes == ("a", "b")
    with pytest.raises(ValueError, match="class_file: no file"):
        LabelMaps(dense("label_maps", tmp_path, class_file="none.txt"), "train")


def test_ade20k_names_its_classes_in_a_table(tmp_path):
    file = tmp_path / "objectInfo150.txt"
    file.write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall\n2\t0.1\t1\t1\t1\tbuilding, edifice\n")
    assert read_classes(file) == ("wall", "building")


def test_palette_maps_are_numbers_and_coloured_ones_refused(tmp_path):
    write_label_maps(tmp_path)
    file = tmp_path / "annotations/training/0.png"
    grey = Image.open(file)
    numbers = np.array(grey)
    palette = Image.fromarray(numbers, mode="P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    palette.save(file)
    data = LabelMaps(dense("label_maps", tmp_path), "train", num_classes=11)
    np.testing.assert_array_equal(data.dense_sample(0).label_map, numbers)
    grey.convert("RGB").save(file)
    with pytest.raises(BrokenImage, match=r"annotations/training/0\.png: is a label map with colours"):
        data.dense_sample(0)


def test_wrong_maps_are_named(tmp_path):
    write_label_maps(tmp_path)
    maps = tmp_path / "annotations/training"
    data = LabelMaps(dense("label_maps", tmp_path), "train", num_classes=11)
    Image.new("L", (60, 64)).save(maps / "0.png")
    with pytest.raises(BrokenImage, match=r"images/training/0\.png: is 64 x 64 pixels, its label map .*0\.png 60 x 64"):
        data.dense_sample(0)
    Image.new("L", (64, 64), 40).save(maps / "1.png")
    with pytest.raises(BrokenImage, match=r"annotations/training/1\.png: has the number 40, which is none of 11"):
        data.dense_sample(1)
    (maps / "2.png").write_bytes(b"none")
    with pytest.raises(BrokenImage, match=r"annotations/training/2\.png: label map: UnidentifiedImageError"):
        data.dense_sample(2)
    (maps / "3.png").unlink()
    with pytest.raises(ValueError, match=r"1 images have no label map in .*annotations/training, first 3\.png"):
        LabelMaps(dense("label_maps", tmp_path), "train", num_classes=11)
    skipping = dense("label_maps", tmp_path, data={"on_broken": "skip"})
    assert len(LabelMaps(skipping, "train", num_classes=11)) == 3


def test_small_images_are_left_out_of_training_and_counted(tmp_path, caplog):
    write_label_maps(tmp_path)
    for kind, mode in (("images", "RGB"), ("annotations", "L")):
        Image.new(mode, (40, 31)).save(tmp_path / kind / "training/1.png")
    assert len(LabelMaps(dense("label_maps", tmp_path), "train", num_classes=11)) == 3
    told = "1 of 4 images have a side below data.dense.min_side=32 and are left out of training"
    assert caplog.text.count(told) == 1 and caplog.text.count("WARNING") == 1
    assert len(LabelMaps(dense("label_maps", tmp_path), "val", num_classes=11)) == 4
    with pytest.raises(ValueError, match="all 4 images have a side below data.dense.min_side=65"):
        LabelMaps(dense("label_maps", tmp_path, min_side=65), "train", num_classes=11)


def test_what_is_missing_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"no folder of train images in .*looked for images/training"):
        LabelMaps(dense("label_maps", tmp_path), "train", num_classes=2)
    write_label_maps(tmp_path)
    with pytest.raises(ValueError, match=r"no classes.txt or objectInfo150.txt in .*, and model.num_classes=0"):
        LabelMaps(dense("label_maps", tmp_path), "train")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfec\0a\0t\0")
    with pytest.raises(ValueError, match=r"data.path: .*classes.txt is no text of UTF-8, a class a line"):
        LabelMaps(dense("label_maps", tmp_path), "train")
    with pytest.raises(ValueError, match="data.name=label_maps has no boxes"):
        LabelMaps(dense("label_maps", tmp_path), "train", boxes=True, num_classes=2)
