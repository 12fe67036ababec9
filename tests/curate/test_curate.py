"""`swin-moe data`: what is found of images as people have them, what stands twice, and the same split everywhere."""

import io
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.curate import duplicates
from swin_moe.curate.check import check
from swin_moe.curate.command import main
from swin_moe.curate.duplicates import find_duplicates
from swin_moe.curate.examine import Examined, T, examine, perceptual_hashes
from swin_moe.curate.find import find
from swin_moe.curate.sheet import contact_sheet
from swin_moe.curate.split import in_val, split
from swin_moe.data.datasets import FileDataset, build_dataset
from swin_moe.run.counter import Counter

CLASSES = ("cat", "dog", "eel")


def photo(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Returns a picture with large and small structure, as photos have; size is (width, height)."""
    draw = np.random.default_rng(seed)
    layers = [draw.integers(0, 256, (n, n, 3), dtype=np.uint8) for n in (3, 7, 20)]
    enlarged = [np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.BICUBIC), float) for layer in layers]
    return Image.fromarray((0.6 * enlarged[0] + 0.3 * enlarged[1] + 0.1 * enlarged[2]).astype(np.uint8))


def folders(root: Path, count: int = 6, classes=CLASSES, first: int = 0) -> Path:
    """Writes class folders of different photos."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            photo(first + 100 * label + number).save(root / name / f"{number}.png")
    return root


def flat(root: Path, header: str = "file,shape", separator: str = ",") -> Path:
    """Writes a folder of files and a table of their classes."""
    root.mkdir()
    rows = [header.replace(",", separator)]
    for number in range(12):
        photo(number).save(root / f"p{number:02}.png")
        rows.append(f"p{number:02}.png{separator}{CLASSES[number % 3]}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def listing(root: Path, part: str) -> set[tuple[str, str]]:
    """Returns {(name of the file an image really is, class)} of what training reads."""
    dataset = build_dataset(DataConfig(name="folder", path=str(root)), part, img_size=(8, 8))
    named = zip(range(len(dataset)), dataset.labels())
    return {(Path(dataset.path(index)).resolve().name, dataset.classes[label]) for index, label in named}


def say(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


# --- splitting ---


def test_a_split_is_a_function_of_seed_and_name():
    names = [f"a/{k}.png" for k in range(10)] + [f"b/{k}.png" for k in range(5)] + ["c/0.png", "d/0.png", "d/1.png"]
    labels = np.asarray([0] * 10 + [1] * 5 + [2] + [3] * 2)
    chosen = in_val(names, labels, share=0.2, seed=0)
    assert [int(chosen[labels == k].sum()) for k in range(4)] == [2, 1, 0, 1]  # a single image is for training
    picked = {name for name, is_val in zip(names, chosen) if is_val}
    assert picked == {"a/2.png", "a/8.png", "b/2.png", "d/1.png"}  # on every machine, for ever
    order = np.random.default_rng(1).permutation(len(names))
    again = in_val([names[k] for k in order], labels[order], share=0.2, seed=0)
    assert {names[k] for k, is_val in zip(order, again) if is_val} == picked
    other = in_val(names, labels, share=0.2, seed=1)
    assert other.sum() == chosen.sum() and (other != chosen).any()


@pytest.mark.parametrize("how", ["lists", "links", "copies"])
def test_training_reads_what_split_writes(how, tmp_path, capsys):
    photos = flat(tmp_path / "photos")
    before = sorted((path.name, path.read_bytes()) for path in photos.iterdir())
    code, out, _ = say(capsys, "split", photos, "--out", tmp_path / "made", "--val", 0.25, "--how", how)
    assert code == 0 and out.startswith(
        f"{tmp_path / 'made'}: 9 train, 3 val, 3 classes; train with data.path={tmp_path / 'made'}"
    )
    train, val = listing(tmp_path / "made", "train"), listing(tmp_path / "made", "val")
    wanted = {(f"p{number:02}.png", CLASSES[number % 3]) for number in range(12)}
    if how == "copies":
        assert not any(path.is_symlink() for path in (tmp_path / "made").rglob("*"))
    assert train | val == wanted and not train & val and len(val) == 3
    assert sorted((path.name, path.read_bytes()) for path in photos.iterdir()) == before
    (tmp_path / "elsewhere").mkdir()  # both moved: relative paths hold
    for name in ("photos", "made"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    dataset = build_dataset(DataConfig(name="folder", path=str(tmp_path / "elsewhere/made")), "train", img_size=(8, 8))
    assert dataset.sample(0)[0].size == (96, 72)
    say(capsys, "split", tmp_path / "elsewhere/photos", "--out", tmp_path / "other", "--val", 0.25, "--how", "lists")
    assert listing(tmp_path / "other", "val") == val


def test_a_split_is_whole_or_not_there(tmp_path, monkeypatch):
    found = find(folders(tmp_path / "photos"))
    monkeypatch.setattr("swin_moe.curate.split.write_list", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        split(found, tmp_path / "out", share=0.2, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_lists_hold_any_name(tmp_path):
    root = tmp_path / "photos"
    for name in ('a "quoted", class', "\xe4\u4e2d"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            photo(number).save(root / name / f"x, {number}.png")
    split(find(root), tmp_path / "out", share=0.25, seed=0)
    dataset = build_dataset(DataConfig(name="lists", path=str(tmp_path / "out")), "train", img_size=(8, 8))
    assert dataset.classes == ('a "quoted", class', "\xe4\u4e2d") and dataset.sample(5)[0].size == (96, 72)


@pytest.mark.parametrize(
    "text, said",
    [
        ("a.png,cat\n", "must begin with the line image,class"),
        ("image,class\na.png\n", "line 2 of .*train.csv must be an image and its class"),
        ("image,class\n", "train.csv lists no image"),
        (None, "no table .*val.csv"),
    ],
)
def test_broken_lists_are_named(text, said, tmp_path):
    (tmp_path / "train.csv").write_text("image,class\na.png,cat\n" if text is None else text)
    with pytest.raises(ValueError, match=said):
        build_dataset(DataConfig(path=str(tmp_path), name="lists"), "val" if text is None else "train", img_size=(8, 8))


def test_classes_of_val_have_the_numbers_of_train(tmp_path):
    (tmp_path / "train.csv").write_text("image,class\na.png,ant\nb.png,bee\n")
    (tmp_path / "val.csv").write_text("image,class\nc.png,bee\n")
    val = build_dataset(DataConfig(path=str(tmp_path), name="folder"), "val", img_size=(8, 8))
    assert val.classes == ("ant", "bee") and val.labels().tolist() == [1]
    (tmp_path / "val.csv").write_text("image,class\nc.png,cow\n")
    with pytest.raises(ValueError, match="class 'cow' of .* does not exist in .*train.csv"):
        build_dataset(DataConfig(path=str(tmp_path), name="folder"), "val", img_size=(8, 8))


# --- finding ---


@pytest.mark.parametrize(
    "header, separator", [("file,shape", ","), ("id,breed", ";"), ("image_path,label", ","), ("x,class", ",")]
)
def test_a_table_of_labels_is_found(header, separator, tmp_path):
    found = find(flat(tmp_path / "photos", header, separator))
    assert found.classes == CLASSES and len(found.splits[""]) == 12 and not found.notes


def test_a_table_may_leave_out_suffixes_and_folders(tmp_path):
    root = flat(tmp_path / "photos")
    (root / "inner").mkdir()
    (root / "p00.png").rename(root / "inner" / "p00.png")
    table = (root / "labels.csv").read_text().replace(".png", "") + "gone,cat\n"
    (root / "labels.csv").write_text(table)
    photo(99).save(root / "extra.png")
    found = find(root)
    assert len(found.splits[""]) == 12
    assert [note.split()[0] for note in found.notes] == ["1", "1"] and "the first: gone" in found.notes[0]


def test_layouts_are_told_apart(tmp_path):
    photos = folders(tmp_path / "photos", 2)
    assert find(photos).layout == "class folders"
    (tmp_path / "both").mkdir()
    shutil.copytree(photos, tmp_path / "both/train")
    shutil.copytree(photos, tmp_path / "both/valid")
    found = find(tmp_path / "both")
    assert found.layout == "folders of train and val" and list(found.splits) == ["train"]
    assert any("valid is not read" in note for note in found.notes) and any("no " in note for note in found.notes)
    shutil.make_archive(str(tmp_path / "both/train"), "zip", photos)
    found = find(tmp_path / "both")
    assert found.layout == "zip files" and len(check(found, workers=1).size_N2) == 6


WRONG = {
    "sheet of no kind": (("check", "{root}/photos", "--sheet", "x.txt"), "--sheet must end in .png, .*got 'x.txt'"),
    "inside": (
        ("split", "{root}/photos", "--out", "{root}/photos/x"),
        "--out .* lies in .*photos, where it would be a",
    ),
    "sheet nowhere": (("check", "{root}/photos", "--sheet", "{root}/no/x.png"), "--sheet .*there is no folder .*no"),
    "nowhere": (("check", "{root}/photo"), "no folder .*photo; did you mean .*photos?"),
    "file": (("check", "{root}/photos/cat/0.png"), "is a file; give the folder"),
    "empty": (("check", "{root}/empty"), "has no image; a folder for each class is needed"),
    "loose": (("check", "{root}/photos/cat"), "has images in no class folder, and no single table"),
    "table": (
        ("check", "{root}/flat", "--class-column", "x"),
        "--class-column: .* has no column 'x'; it has file, shape",
    ),
    "columns": (("check", "{root}/three"), "has the columns a, b, c; say with --image-column"),
    "twice": (("check", "{root}/twice"), "line 3 calls p.png 'b', and a line before it 'a'"),
    "split": (("split", "{root}/done", "--out", "{root}/x"), "is split already"),
    "out": (("split", "{root}/photos", "--out", "{root}/flat"), "--out .*flat is there already"),
    "share": (("split", "{root}/photos", "--out", "{root}/x", "--val", "2"), "--val must be between 0 and 1, got 2"),
    "no out": (("split", "{root}/photos"), "required: --out"),
    "shrink": (("split", "{root}/photos", "--out", "y", "--shrink", "64"), "goes with --how copies, got --shrink 64"),
    "option": (("split", "{root}/photos", "--out", "y", "--sed", "1"), "did you mean --seed?"),
    "verb": (("chek", "{root}/photos"), "invalid choice: 'chek'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_are_one_sentence(case, tmp_path, capsys):
    folders(tmp_path / "photos", 1)
    flat(tmp_path / "flat")
    (tmp_path / "empty").mkdir()
    for name, text in (("three", "a,b,c\n1,2,3\n"), ("twice", "image,class\np.png,a\np.png,b\n")):
        (tmp_path / name).mkdir()
        photo(0).save(tmp_path / name / "p.png")
        (tmp_path / name / "t.csv").write_text(text)
    (tmp_path / "done").mkdir()
    for part in ("train", "val"):
        (tmp_path / "done" / f"{part}.csv").write_text("image,class\na.png,cat\n")
    words, said = WRONG[case]
    code, _, error = say(capsys, *(word.replace("{root}", str(tmp_path)) for word in words))
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(said, error), error


def test_smaller_copies_keep_their_orientation_and_what_cannot_be_shrunk_stays(tmp_path, capsys):
    root = folders(tmp_path / "photos", 2)
    turned = photo(5, (400, 300))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "cat/turned.jpg", exif=exif)
    (root / "cat/broken.jpg").write_bytes((root / "cat/turned.jpg").read_bytes()[:400])
    Image.fromarray(np.arange(90 * 90, dtype=np.uint16).reshape(90, 90)).save(root / "cat/deep.png")
    code, out, _ = say(capsys, "split", root, "--out", tmp_path / "made", "--how", "copies", "--shrink", 64)
    assert code == 0 and f"swin-moe train photos_from_scratch data.path={tmp_path / 'made'}" in out
    made = {path.name: path for path in (tmp_path / "made").rglob("cat/*.*")}
    with Image.open(made["turned.jpg"]) as image:
        assert image.size == (85, 64) and image.format == "JPEG" and image.getexif()[0x0112] == 6
        wanted = np.asarray(turned.resize((85, 64), Image.Resampling.LANCZOS), float)
        assert np.abs(np.asarray(image, float) - wanted).mean() < 3
    with Image.open(made["0.png"]) as image:
        assert image.size == (85, 64)  # of 96 x 72
    for name in ("broken.jpg", "deep.png"):
        assert made[name].read_bytes() == (root / "cat" / name).read_bytes()


# --- checking ---


def spoiled(root: Path) -> Path:
    """Writes train and val with one of everything that is wrong."""
    folders(root / "train", 6)
    folders(root / "val", 5, first=50)
    shutil.copy(root / "train/cat/0.png", root / "val/cat/again.png")
    buffer = io.BytesIO()
    photo(101).resize((60, 45), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=80)
    (root / "val/dog/like.jpg").write_bytes(buffer.getvalue())
    shutil.copy(root / "train/cat/1.png", root / "train/eel/wrong.png")
    (root / "val/eel/broken.png").write_bytes((root / "val/eel/0.png").read_bytes()[:300])
    photo(7, (300, 40)).save(root / "train/eel/long.png")
    (root / "train/fox").mkdir()
    return root


def test_everything_wrong_is_found(tmp_path, capsys):
    root = spoiled(tmp_path / "photos")
    code, out, _ = say(capsys, "check", root, "--json", "--sheet", tmp_path / "sheet.png", "--workers", 1)
    tree = json.loads(out)
    cases = {finding["kind"]: finding["cases"] for finding in tree["findings"]}
    name = {kind: [[Path(word).name for word in case] for case in found] for kind, found in cases.items()}
    assert code == 1 and not tree["clean"]
    assert name["leak"] == [["again.png", "0.png"]] and name["near"] == [["like.jpg", "1.png"]]
    assert name["labels"] == [["wrong.png (eel)", "1.png (cat)"]] and name["twice"] == [["wrong.png", "1.png"]]
    assert cases["broken"][0][0].endswith("val/eel/broken.png") and name["shape"] == [["long.png", "300x40"]]
    assert any("fox has no image" in finding["sentence"] for finding in tree["findings"])
    assert tree["classes"]["eel"] == {"train": 8, "val": 6} and tree["width"] == [60, 300]
    code, out, _ = say(capsys, "check", root, "--sheet", "none")
    assert code == 1 and "problem: 1 image of val have the same pixels" in out.replace("images of", "image of")
    assert out.index("problem:") < out.index("note:")


def test_processes_see_what_one_sees(tmp_path):
    found = find(spoiled(tmp_path / "photos"))
    one, three = (examine(found.splits["train"], workers=workers) for workers in (1, 3))
    for name in ("size_N2", "digest_N2", "hash_N2", "thumbnail_NTT"):
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name))


def test_clean_photos_are_called_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "photos", 12)
    code, out, _ = say(capsys, "check", "photos", "--workers", 1)
    assert code == 0 and "nothing is wrong with them" in out and Path("photos_sheet.png").is_file()
    assert out.endswith("next: swin-moe data split photos --out photos_split\n")


def near_slowly(examined: Examined, second: np.ndarray) -> set[int]:
    """Returns the images of the second split that are near to one of the first, every pair compared."""
    grey = examined.thumbnail_NTT.astype(float)
    found = set()
    for b in np.flatnonzero(second):
        for a in np.flatnonzero(~second):
            limit = min(3.0, 0.1 * min(grey[a].std(), grey[b].std()))
            if np.abs(grey[a] - grey[b]).mean() <= limit and (examined.digest_N2[a] != examined.digest_N2[b]).any():
                found.add(int(b))
    return found


def test_near_duplicates_are_those_of_all_pairs():
    draw = np.random.default_rng(0)
    photos = [photo(seed) for seed in range(120)]
    changed = [image.resize((50, 40), Image.Resampling.BICUBIC) for image in photos[:30]]
    thumbs = [np.asarray(i.convert("L").resize((T, T), Image.Resampling.BOX)) for i in (*photos, *changed)]
    thumbnail = np.stack(thumbs)
    count = len(thumbnail)
    examined = Examined(
        np.full((count, 2), 50, dtype=np.int32),
        draw.integers(0, 2**63, (count, 2)).astype(np.uint64),
        perceptual_hashes(thumbnail),
        thumbnail,
        {},
    )
    second = np.arange(count) >= 120
    found = find_duplicates(examined, second)
    assert {b for _, b in found.near} == near_slowly(examined, second) and len(found.near) >= 28
    assert all(b == a + 120 for a, b in found.near) and not found.exact and not found.uncompared


def test_thousands_that_look_alike_do_not_take_the_square_of_their_number(monkeypatch):
    monkeypatch.setattr(duplicates, "_MOST_IN_A_BAND", 50)
    draw = np.random.default_rng(0)
    count = 300
    thumbnail = draw.integers(120, 124, (count, T, T)).astype(np.uint8)
    hashes = np.zeros((count, 2), dtype=np.uint64)
    digest = draw.integers(0, 2**63, (count, 2)).astype(np.uint64)
    digest[299] = digest[0]
    examined = Examined(np.full((count, 2), 50, dtype=np.int32), digest, hashes, thumbnail, {})
    found = find_duplicates(examined, np.arange(count) >= 200)
    assert found.uncompared == 100 and not found.near and found.exact == [(0, 299)]


def test_a_split_without_images_and_uneven_classes_are_said(tmp_path):
    (tmp_path / "a/train/cat").mkdir(parents=True)
    folders(tmp_path / "a/val", 2)
    assert "has no image" in check(find(tmp_path / "a"), workers=1).findings[0].sentence
    folders(tmp_path / "b", 2)
    folders(tmp_path / "b", 20, ("many",), first=500)
    kinds = {finding.kind: finding.sentence for finding in check(find(tmp_path / "b"), workers=1).findings}
    assert kinds["uneven"].startswith("classes are uneven: many has 20 images and cat 2")
    assert kinds["few"] == "3 classes have fewer than 10 images"


@pytest.mark.parametrize("classes", [1, 4, 40])
def test_the_sheet_shows_every_class(classes, tmp_path):
    names = [f"a class of a rather long name {k}" for k in range(classes)]
    paths, labels = [], []
    for label in range(classes):
        paths += [str(tmp_path / f"{label}.png")] * 2
        labels += [label] * 2
        Image.new("RGB", (40, 20), (255, 0, label)).save(paths[-1])
    sheet = contact_sheet(FileDataset(paths, labels, names), {1})
    pixels = set(map(tuple, np.asarray(sheet).reshape(-1, 3).tolist()))
    assert {(255, 0, label) for label in range(classes)} <= pixels and sheet.width < 2200


def test_the_counter_says_how_far_it_is(monkeypatch):
    stream = io.StringIO()
    clock = iter([0.0, 1.0, 4.0, 5.0, 15.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    counter = Counter("images", 100, stream)
    for done in (10, 40, 50, 75):  # quiet at first, then every ten seconds
        counter(done)
    assert stream.getvalue().splitlines() == [
        "40 of 100 images, 10/s, 00:06 left",
        "75 of 100 images, 5/s, 00:05 left",
    ]
