"""First steps that go wrong: of somebody with photos, with another's checkpoint, on a cluster. One clear sentence each,
which names what to type instead."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swin_moe.config.mistaken import belongs
from swin_moe.demo import command as demo
from tests.commands.test_usage import run
from tests.demo.test_demo import DETECTOR, network, trained


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """Returns a folder as a new user has it: photos, what was split of them, a run, weights from elsewhere."""
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("desk")
    draw = np.random.default_rng(0)
    for name in ("photos/cat", "photos/dog", "flat", "halves/train/cat", "halves/val/cat"):
        (root / name).mkdir(parents=True)
        pixels = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name / "0.jpg")
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("no image\n")
    torch.save({"model": network("swin").state_dict()}, root / "inherited.pth")
    shutil.move(trained(DETECTOR, "boxes", root), root / "output" / "boxes")
    return root


SPLIT = "swin-moe data split photos --out photos_split, then swin-moe train finetune_photos data.path=photos_split"
AFTER_DASHES = "-- -m swin_moe.train digits_swin_moe"
# What is typed -> what the one sentence says. Of who has photos:
PHOTOS = {
    "demo photos": SPLIT,
    "demo photos/cat/0.jpg": "swin-moe predict RUN photos/cat/0.jpg, or the page of swin-moe demo RUN",
    "demo flat": "a folder for each class is needed",
    "demo halves": "swin-moe train finetune_photos data.path=halves",
    "demo boxs": "RUN=boxs: does not exist",
    "report photos": SPLIT,
    "report output": "name one: output/boxes",
    "report boxes": "did you mean output/boxes?",
    "report output/boxes/checkpoints": "of a run, which is output/boxes",
    "predict output/boxes": "swin-moe predict output/boxes IMAGE",
    "predict photos": "swin-moe predict RUN photos",
    "predict photos/cat/0.jpg": "needs a run or a config before the images",
    "predict photos output/boxes": "is a run and comes first: swin-moe predict output/boxes photos",
    "predict output/boxes empty": "no image below the folder empty",
    "evaluate photos": SPLIT,
    "evaluate photos/cat/0.jpg": "is no config and no run; it is an image",
    "evaluate-features photos": SPLIT,
    "plan photos --gpus 2": SPLIT,
    "simulate photos --gpus 2 --hardware cpu": SPLIT,
    "show photos": SPLIT,
    "throughput photos": SPLIT,
    "inspect-routing photos": SPLIT,
    "train photos": SPLIT,
    "train halves": "swin-moe train finetune_photos data.path=halves",
    "train finetune_photos photos": "did you mean data.path=photos?",
    "train photos_from_scratch data.path=photos": "`swin-moe data split photos --out photos_split`",
    "train photos_from_scratch data.path=flat": "`swin-moe data check flat`",
    "train photos_from_scratch data.path=photos/cat/0.jpg": "is a file; give the folder that holds the images",
    "data photos": "swin-moe data check photos",
    "data check flat": "a folder for each class is needed",
    "data split photos": "required: --out",
    "weights fetch swin_tiny_patch4_window7_224 --folder notes.txt": "notes.txt is a file; give a folder",
    "weights fetch swin_tiny_patch4_window7_224 --folder notes.txt/below": "notes.txt is a file; give a folder",
    "weights swin_tiny_patch4_window7_224": "swin-moe weights fetch swin_tiny_patch4_window7_224",
    "weights list resnet": "`swin-moe weights list` has all",
}
INHERITED = {
    "evaluate digits_swin_moe checkpoint.load=photos": SPLIT,
    "evaluate digits_swin_moe checkpoint.load=output/boxes": "detect, not classify; name output/boxes in the place",
    "evaluate boxes.yaml checkpoint.load=inherited.pth": "is of another network: model.embed_dim=8",
    "evaluate inherited.pth": "weights as checkpoint.load=inherited.pth",
    "predict inherited.pth photos/cat/0.jpg": "weights as checkpoint.load=inherited.pth",
    "predict checkpoint.load=inherited.pth photos/cat/0.jpg": "a config or a run comes first",
    "predict digits_dense checkpoint.load=inherited.pth photos/cat/0.jpg": "`swin-moe configs WORD ...` lists them",
    "predict output/boxes model.embed_dim=24 checkpoint.load=output/boxes photos/cat/0.jpg": "not model.embed_dim=24",
    "demo inherited.pth": "swin-moe demo CONFIG checkpoint.load=inherited.pth",
    "checkpoint inspect photos": SPLIT,
    "checkpoint inspect output": "name one: output/boxes",
    "checkpoint inspect inheritd.pth": "did you mean inherited.pth?",
    "checkpoint inherited.pth": "did you mean swin-moe checkpoint inspect inherited.pth?",
    "checkpoint convert inherited.pth out --to onnx": "swin-moe checkpoint export SRC DST --to onnx",
    "train digits_dense checkpoint.load=inherited.pth run.name=x": "checkpoint.init=inherited.pth takes the weights",
}
CLUSTER = {
    "launch -n 2 -- digits_swin_moe": AFTER_DASHES,
    "launch -n 2 -- train digits_swin_moe": AFTER_DASHES,
    "launch -n 2 -- swin-moe train digits_swin_moe": AFTER_DASHES,
    "launch -n 2 -- python -m swin_moe.train digits_swin_moe": AFTER_DASHES,
    "launch -n 2 -m swin_moe.train digits_swin_moe": f"swin-moe launch -n 2 {AFTER_DASHES}",
    "launch -np 2 -- -m swin_moe.train digits_swin_moe": "-n N is the number of all ranks",
    "launch --nproc_per_node=4 -- -m swin_moe.train digits_swin_moe": "-n N is the number of all ranks",
    "launch --nnodes 2 -- -m swin_moe.train digits_swin_moe": "swin-moe launch script writes its batch script",
    "launch -n 2 -- -m swin_moe.trian digits_swin_moe": "did you mean swin_moe.train?",
    "launch script --scheduler sge --nodes 2 -- -m swin_moe.train digits_swin_moe": "choose from 'slurm'",
    "train digits_swin_moe --gpus 4": "swin-moe launch -n N -- -m swin_moe.train CONFIG",
    "train digits_swin_moe -n 4": "swin-moe launch -n N -- -m swin_moe.train CONFIG",
    "plan digits_swin_moe": "--gpus N is needed",
    "plan digits_swin_moe --gpus 4 --hardware h200x": "did you mean h200?",
}


@pytest.mark.parametrize("typed", [*PHOTOS, *INHERITED, *CLUSTER])
def test_a_wrong_step_is_one_sentence_with_the_right_one(typed, desk, monkeypatch, capfd):
    monkeypatch.chdir(desk)
    find = importlib.util.find_spec  # the demo asks whether gradio is there before it looks at its words
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "gradio" or find(name, *more))
    code, out, error = run(typed.split())
    error += capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith(("error: ", "launcher: "))]
    said = (PHOTOS | INHERITED | CLUSTER)[typed]
    assert code == 2 and not out and len(lines) == 1 and said in lines[0] and len(lines[0]) < 500, error


def test_a_folder_of_photos_is_told_before_what_the_demo_needs(desk, monkeypatch, tmp_path):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    with pytest.raises(ValueError, match="photos is no config and no run; it is a folder of images"):
        demo.parse(["photos"])
    (tmp_path / "shared").mkdir()
    for name in ("config.json", "model.safetensors", "example.png"):
        (tmp_path / "shared" / name).write_bytes(b"")
    for source in ("output/boxes", str(tmp_path / "shared"), "gone"):
        with pytest.raises(ValueError, match="needs gradio"):
            demo.parse([source])


def test_what_belongs_nowhere_gets_no_clause(desk):
    assert belongs(desk / "empty") == belongs(desk / "notes.txt") == belongs(desk / "gone") == belongs("a\0b") == ""
    assert belongs(desk / "output" / "boxes").startswith("; it is a run: swin-moe report ")
