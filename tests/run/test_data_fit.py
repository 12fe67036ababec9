"""A configuration and the images it is given: counted classes, small images, and a run read by its directory."""

import shutil

import pytest

from swin_moe import evaluate, predict, train
from swin_moe.config.io import load_config
from swin_moe.run.session import run_main
from tests.run.test_identity import write_photos

SMALL = (
    "checkpoint.init= model.img_size=32 model.window_size=4 model.embed_dim=8 model.depths=[1,1] model.num_heads=[1,2] "
    "optim.epochs=1 data.workers=0 log.tensorboard=false data.auto_augment= data.erase_prob=0"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder of a run of finetune_photos with one data path and three classes, and what it said."""
    root = tmp_path_factory.mktemp("fit")
    write_photos(root / "photos", classes=("cat", "dog", "emu"))
    words = ["finetune_photos", f"data.path={root / 'photos'}", f"run.output={root}", "run.name=mine", *SMALL]
    run_main(train.main, words)
    return root


def test_classes_are_counted_and_small_images_told(trained):
    log = (trained / "mine" / "log-rank0.txt").read_text()
    assert f"model.num_classes=3, the classes of data.path={trained / 'photos'}" in log
    assert "model.img_size=[32, 32], but 18 of 18 training images looked at are smaller (shorter side 16" in log
    assert load_config(trained / "mine" / "config.yaml").model.num_classes == 3
    assert "outputs are never right" not in log


def test_a_run_is_read_by_its_directory_wherever_it_is(trained, tmp_path, capsys, monkeypatch):
    shutil.copytree(trained / "mine", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run_main(evaluate.main, ["moved"])
    assert "samples 6" in (said := capsys.readouterr().out) and "weights: moved/checkpoints" in said
    run_main(predict.main, ["moved", str(trained / "photos/val/cat/0.png"), "--top", "1"])
    assert capsys.readouterr().out.split(": ")[1].split()[0] in ("cat", "dog", "emu")
    run_main(evaluate.main, ["finetune_photos", f"data.path={trained / 'photos'}", *SMALL, "checkpoint.load=moved"])
    assert "samples 6" in capsys.readouterr().out


def test_no_word_about_images_that_are_large_enough(trained, tmp_path):
    words = [f"data.path={trained / 'photos'}", f"run.output={tmp_path}", "run.name=tiny", *SMALL, "model.img_size=16"]
    run_main(train.main, ["finetune_photos", *words])
    assert "training images looked at" not in (tmp_path / "tiny" / "log-rank0.txt").read_text()
