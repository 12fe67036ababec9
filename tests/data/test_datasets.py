"""Every layout on disk gives the same images, and everything missing or broken is named."""

import json
import multiprocessing
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from swin_moe.config import DataConfig, DatasetName
from swin_moe.data.datasets import BrokenImage, FileDataset, PathTable, build_dataset


def build(name: DatasetName, path: Path, split: str = "train"):
    return build_dataset(DataConfig(name=name, path=str(path)), split, img_size=(16, 24), num_classes=7)


def write_zip(root: Path, split: str, *, prefix: str = "", compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(root / f"{split}.zip", "w", compression) as archive:
        for path in sorted((root / split).rglob("*.*")):
            archive.write(path, prefix + str(path.relative_to(root / split)))


def write_map(root: Path, split: str, labels: dict[str, int]) -> None:
    files = sorted(path.relative_to(root / split) for path in (root / split).rglob("*.*"))
    (root / f"{split}_map.txt").write_text("".join(f"{path}\t{labels[path.parts[0]]}\n" for path in files))


def contents(dataset) -> list[tuple[int, bytes]]:
    return [(label, image.tobytes()) for image, label in map(dataset.sample, range(len(dataset)))]


def test_path_table():
    paths = ["a/b.png", "", "c/\xe4\u4e2d.jpg"]
    table = PathTable(paths)
    assert [table[i] for i in range(len(table))] == paths


def own_kilobytes() -> int:
    """Returns the memory of this process that no other shares."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private_Dirty"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says what memory is shared")
def test_loader_processes_share_paths_and_labels():
    """A process that asks for every path once: of strings, reference counts would copy every page into it."""
    dataset = FileDataset([f"n01440764/n01440764_{n:060d}.JPEG" for n in range(100_000)], range(100_000), ("a",))
    strings = [dataset.path(n) for n in range(len(dataset))]
    grown = {}
    for name, ask in (("ours", dataset.path), ("strings", strings.__getitem__)):
        here, there = multiprocessing.Pipe()

        def child(ask=ask, there=there) -> None:
            for index in range(100):
                ask(index)
            before = own_kilobytes()
            for index in range(len(dataset)):
                ask(index)
            there.send(own_kilobytes() - before)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        grown[name] = here.recv()
        process.join()
    assert grown["ours"] < 1000 and grown["strings"] > 8000  # the paths are 8 MB


def test_folder(image_root):
    train, val = build("folder", image_root), build("folder", image_root, "val")
    assert (len(train), train.num_classes, train.classes) == (13, 3, ("cat", "dog", "eel"))
    image, label = train.sample(1)
    assert (image.mode, image.size, label) == ("RGB", (21, 14), 0)
    assert train.path(1).endswith("train/cat/1.jpg")
    # val has no dog: its eels must keep label 2, not become 1.
    assert [val.sample(i)[1] for i in range(5)] == [0, 0, 2, 2, 2] and val.num_classes == 3


def test_folder_val_alone(image_root):
    shutil.rmtree(image_root / "train")
    assert build("folder", image_root, "val").classes == ("cat", "eel")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("prefix", ["", "train/"], ids=["flat", "nested"])
def test_zip_without_map_equals_folder(image_root, compression, prefix):
    write_zip(image_root, "train", prefix=prefix, compression=compression)
    write_zip(image_root, "val", compression=compression)
    for split in ("train", "val"):
        assert contents(build("zip", image_root, split)) == contents(build("folder", image_root, split))


def test_zip_with_map(image_root):
    labels = {"cat": 2, "dog": 0, "eel": 9}
    for split in ("train", "val"):
        write_zip(image_root, split)
        write_map(image_root, split, labels)
    train, val = build("zip", image_root), build("zip", image_root, "val")
    folder = build("folder", image_root)
    assert (train.num_classes, val.num_classes, train.classes[:3]) == (10, 10, ("0", "1", "2"))
    assert contents(train) == [(labels[folder.classes[label]], image) for label, image in contents(folder)]
    assert train.path(0) == f"{image_root}/train.zip@/cat/0.png"


def test_zip_survives_pickling_with_an_open_file(image_root):
    write_zip(image_root, "train")
    dataset = build("zip", image_root)
    before = contents(dataset)
    assert contents(pickle.loads(pickle.dumps(dataset))) == before


def test_imagenet22k_list(image_root):
    rows = [["train/eel/0.png", 5], ["train/cat/1.jpg", 0], ["train/gone.png", 2]]
    (image_root / "ILSVRC2011fall_whole_map_train.txt").write_text(json.dumps(rows))
    dataset = build("imagenet22k", image_root)
    assert (len(dataset), dataset.num_classes, dataset.sample(0)[1]) == (3, 6, 5)
    assert dataset.sample(1)[0].tobytes() == build("folder", image_root).sample(1)[0].tobytes()
    with pytest.raises(BrokenImage, match=r"train/gone\.png: No such file"):
        dataset.sample(2)


def test_synthetic_is_a_pure_function_of_the_index():
    a, b = build("synthetic", Path()), build("synthetic", Path())
    assert (len(a), len(build("synthetic", Path(), "val")), a.num_classes) == (10_000, 1000, 7)
    image, label = a.sample(3)
    assert image.size == (24, 16) and 0 <= label < 7
    np.testing.assert_array_equal(np.asarray(image), np.asarray(b.sample(3)[0]))
    assert a.sample(4)[0].tobytes() != image.tobytes() != build("synthetic", Path(), "val").sample(3)[0].tobytes()


def truncate(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


BREAKS = {
    "truncated_png": ("cat/0.png", truncate),
    "truncated_jpeg": ("cat/1.jpg", truncate),
    "corrupt_png": ("cat/0.png", lambda data: data[:60] + bytes(40) + data[100:]),
    "text": ("cat/0.png", lambda _: b"not an image"),
    "empty": ("cat/1.jpg", lambda _: b""),
}


@pytest.mark.parametrize("case", BREAKS)
@pytest.mark.parametrize("name", ["folder", "zip"])
def test_broken_image_is_named(image_root, case, name):
    file, damage = BREAKS[case]
    path = image_root / "train" / file
    path.write_bytes(damage(path.read_bytes()))
    if name == "zip":
        write_zip(image_root, "train")
    dataset = build(name, image_root)
    index = int(Path(file).stem)
    with pytest.raises(BrokenImage, match="broken image .*" + file) as caught:
        dataset.sample(index)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert dataset.sample(2)[1] == 0  # the others are untouched


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_flipped_byte_in_a_zip_is_found(image_root, compression):
    write_zip(image_root, "train", compression=compression)
    archive = image_root / "train.zip"
    data = bytearray(archive.read_bytes())
    data[200] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(BrokenImage, match=r"train\.zip@/cat/0\.png"):
        build("zip", image_root).sample(0)


def remove(name):
    return lambda root: shutil.rmtree(root / name)


def make(name, text=""):
    def prepare(root):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)

    return prepare


def train_map(text):
    def prepare(root):
        write_zip(root, "train")
        (root / "train_map.txt").write_text(text)

    return prepare


def mixed_maps(root):
    write_zip(root, "train")
    write_zip(root, "val")
    write_map(root, "train", {"cat": 0, "dog": 1, "eel": 2})


LIST = "ILSVRC2011fall_whole_map_train.txt"
BAD_LAYOUTS = {
    "no_root": ("folder", "train", remove("."), r"data\.path: no directory at .*images"),
    "no_split": (
        "folder",
        "train",
        remove("train"),
        r"no directory at .*train; `swin-moe data split .* makes train and val",
    ),
    "no_classes": (
        "folder",
        "train",
        lambda root: [shutil.rmtree(d) for d in (root / "train").iterdir()],
        "no class directory in .*train",
    ),
    "empty_class": ("folder", "train", make("train/fox/notes.txt"), "no image in class directory .*fox"),
    "unknown_class": ("folder", "val", make("val/fox/a.png"), "class 'fox' of .*val does not exist in .*train"),
    "no_zip": ("zip", "train", lambda root: None, r"no file .*train\.zip"),
    "bad_zip": ("zip", "train", make("train.zip", "PK but no zip"), r"train\.zip is not a complete zip file"),
    "bad_map_line": ("zip", "train", train_map("cat/0.png\t0\ncat/1.jpg 0\n"), r"line 2 of .*train_map\.txt must be"),
    "odd_map_label": ("zip", "train", train_map("cat/0.png\t\u00b2\n"), r"line 1 of .*train_map\.txt must be"),
    "far_map_label": ("zip", "train", train_map("cat/0.png\t99999999\n"), r"train_map\.txt has label 99999999; labels"),
    "far_label": ("imagenet22k", "train", make(LIST, '[["a", 1e9]]'), f"{LIST} has label 1000000000; labels are below"),
    "deep_json": ("imagenet22k", "train", make(LIST, "[" * 99999), f"{LIST} must be a JSON list"),
    "endless_label": ("imagenet22k", "train", make(LIST, '[["a", Infinity]]'), f"{LIST} must be a JSON list"),
    "absent_member": ("zip", "train", train_map("cat/77.png\t0\n"), r"train_map\.txt lists 'cat/77\.png'"),
    "empty_map": ("zip", "train", train_map(""), r"no image in .*train\.zip"),
    "one_map": ("zip", "val", mixed_maps, "map file for both"),
    "no_list": ("imagenet22k", "train", lambda root: None, f"no list file .*{LIST}"),
    "bad_json": ("imagenet22k", "train", make(LIST, "a.png 3"), f"{LIST} must be a JSON list"),
    "bad_rows": ("imagenet22k", "train", make(LIST, '["a.png"]'), f"{LIST} must be a JSON list"),
    "empty_list": ("imagenet22k", "train", make(LIST, "[]"), f"{LIST} must list at least one image"),
}


@pytest.mark.parametrize("name", ["folder", "zip"])
def test_what_other_programs_leave_in_folders_is_no_data(image_root, name):
    """A notebook's checkpoints, and what macOS puts beside files and into archives."""

    def listed():
        write_zip(image_root, "train")
        data = build(name, image_root, "train")
        return data.classes, len(data)

    before = listed()
    some = (image_root / "train/cat/0.png").read_bytes()
    for path in ("__MACOSX/._0.png", ".ipynb_checkpoints/0.png", "cat/._0.png", "cat/.ipynb_checkpoints/0.png"):
        (image_root / "train" / path).parent.mkdir(exist_ok=True)
        (image_root / "train" / path).write_bytes(some)
    (image_root / "train/__MACOSX/cat").mkdir()
    (image_root / "train/__MACOSX/cat/0.png").write_bytes(some)
    assert listed() == before


def test_a_map_of_another_encoding_is_read_as_names_of_files_are(image_root):
    write_zip(image_root, "train")
    (image_root / "train_map.txt").write_bytes(b"caf\xe9/0.png\t0\n")
    with pytest.raises(ValueError, match=r"train_map\.txt lists 'caf\\udce9/0\.png', which is not in"):
        build("zip", image_root, "train")


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_missing_and_malformed_data_is_named(image_root, case):
    name, split, prepare, message = BAD_LAYOUTS[case]
    prepare(image_root)
    with pytest.raises(ValueError, match=message) as caught:
        build(name, image_root, split)
    assert "\n" not in str(caught.value) and "data.path" in str(caught.value)
