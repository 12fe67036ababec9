"""`swin-moe predict` with a task that looks at pixels: pictures, COCO json, label maps; files, folders and patterns."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swin_moe.data.dense.canvases import tight_box
from swin_moe.data.dense.coco import Coco
from swin_moe.data.dense.masks import bitmaps_of
from swin_moe.predict.command import main
from swin_moe.train import main as train
from tests.data.dense.files import dense

pytest.importorskip("pycocotools")
CONFIG = """
task: {name: 'tests.tasks.dense.seeing:Bright'}
data: {name: canvases, global_batch: 4, dense: {canvases: 4, val_canvases: 3, eval_short: 80, eval_long: 120}}
model: {name: swin, img_size: 64, embed_dim: 12, depths: [1, 1], num_heads: [1, 2], window_size: 4, num_classes: 11}
optim: {epochs: 1, warmup_epochs: 0}
log: {tensorboard: false}
engine: {device: cpu}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a config, a trained run and three pictures in a folder."""
    root = tmp_path_factory.mktemp("predict")
    (root / "see.yaml").write_text(CONFIG)
    train([str(root / "see.yaml"), f"run.output={root}"])
    (root / "images/deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "deep/a.png")):
        pixels = np.full((50, 70, 3), 20, dtype=np.uint8)
        pixels[10 : 30 + number, 20:45] = 220
        Image.fromarray(pixels).save(root / "images" / name)
    return root


def run(trained: Path, out: Path, *words: str) -> None:
    main([str(trained / "see.yaml"), f"run.output={trained}", "--out", str(out), *words])


@pytest.mark.parametrize(
    ("words", "said"), [(("--top", "2"), "--top is"), (("--csv", "--batch", "4"), "--csv and --batch are")]
)
def test_options_of_classifiers_are_refused(words, said, trained, tmp_path):
    with pytest.raises(ValueError, match=f"{said} for networks that classify"):
        run(trained, tmp_path / "out", *words, str(trained / "images"))


def test_pictures_of_validation_stand_beside_the_run(trained):
    pictures = sorted((trained / "see/pictures").glob("validation_*.png"))
    assert [path.name.partition("-")[0] for path in pictures] == ["validation_0", "validation_1"]
    picture = np.asarray(Image.open(pictures[0]))
    assert picture.shape == (64 * 8, 2 * 64 * 8 + 4, 3) and (picture[:, 512:516] == 255).all()


def test_what_is_found_is_drawn_and_stored(trained, tmp_path, capsys):
    run(trained, tmp_path / "out", str(trained / "images"))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0] == f"{trained}/images/a.png: 2 0.90, background 85.7%, 0 14.3%"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.png", "a_2.png", "a_2_labels.png", "a_labels.png", "b.png", "b_labels.png", "predictions.json"]
    tree = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [image["file_name"] for image in tree["images"]] == [line.partition(":")[0] for line in said]
    assert [row["image_id"] for row in tree["annotations"]] == [1, 2, 3]
    names_of = {row["id"]: row["name"] for row in tree["categories"]}
    row = tree["annotations"][0]
    assert names_of[row["category_id"]] == "2" and row["score"] == pytest.approx(0.9)
    x, y, width, height = row["bbox"]
    assert (x, y, x + width, y + height) == tight_box(bitmaps_of([row["segmentation"]], 50, 70)[0])
    numbers = np.asarray(Image.open(tmp_path / "out/a_labels.png"))
    assert numbers.shape == (50, 70) and set(np.unique(numbers)) == {0, 1} and numbers[20, 30] == 1
    drawn = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert drawn.shape == (350, 490, 3)


def test_a_lower_threshold_keeps_more_and_json_says_it_in_lines(trained, tmp_path, capsys):
    run(trained, tmp_path / "out", "--score", "0", "--json", str(trained / "images/b.png"))
    line = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in line["objects"]] == ["2", "background"]
    assert line["objects"][1]["box"] == [0, 0, 70, 50] and sum(line["classes"].values()) == pytest.approx(1)


def test_a_broken_image_does_not_stop_the_others(trained, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    words = (str(tmp_path / "a.png"), str(trained / "images/b.png"))
    with pytest.raises(ValueError, match="1 of 2 images cannot be read, the first: broken image .*a.png: not an image"):
        run(trained, tmp_path / "out", *words)
    captured = capsys.readouterr()
    assert [line.partition(": ")[0] for line in captured.out.splitlines()] == [words[1]]
    assert "broken image" in captured.err and "1 images, 1 objects" in captured.err
    tree = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [image["file_name"] for image in tree["images"]] == [words[1]]
    run(trained, tmp_path / "out", "data.on_broken=skip", *words)


def test_a_pattern_names_images(trained, tmp_path, capsys):
    run(trained, tmp_path / "out", str(trained / "images/*.png"))
    assert len(capsys.readouterr().out.splitlines()) == 2
    run(trained, tmp_path / "out", str(trained / "images/**/a.png"))
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(ValueError, match=r"no such image file: .*images/\*\.jpg"):
        run(trained, tmp_path / "out", str(trained / "images/*.jpg"))


def test_predictions_can_be_trained_on(trained, tmp_path, capsys):
    run(trained, tmp_path / "out", str(trained / "images"))
    capsys.readouterr()
    data = Coco(dense("coco", trained / "images", train_annotations=str(tmp_path / "out/predictions.json")), "train")
    assert len(data) == 3 and data.dense_sample(0).boxes.shape == (1, 4)


def test_scores_outside_of_their_range_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"--score must be in \[0, 1\], got 2"):
        run(trained, tmp_path, "--score", "2", str(trained / "images"))
