"""load, create_model(pretrained=) and load_official(path): a user's own Python, one call each."""

import dataclasses
import json
import logging
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import swin_moe
from checkpoint_tools.__main__ import main as tools
from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint import CheckpointError, Piece
from swin_moe.checkpoint.manager import CheckpointManager
from swin_moe.config.io import load_config
from swin_moe.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from swin_moe.models.attention import relative_coords_table
from tests.weights.test_files import CLASSES, DENSE, MOE, files  # noqa: F401 - a fixture

SMALL = {"img_size": 32, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "num_classes": 10}


def own(files, family):  # noqa: F811
    return swin_moe.load(files / f"{family}-run").model.state_dict()


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_a_run_is_loaded_in_one_call(family, files):  # noqa: F811
    model, classes, preprocess = swin_moe.load(files / f"{family}-run")
    expected = load_config("digits_dense", MOE if family == "moe" else DENSE)
    assert model.config == expected.model and not model.training and list(classes) == CLASSES
    image = preprocess(files / "photos" / "x.png")
    assert image.shape == (3, 32, 32) and torch.equal(image, preprocess(Image.open(files / "photos" / "x.png")))
    assert torch.isfinite(torch.as_tensor(model(image[None])[0])).all()


@pytest.mark.parametrize("path", ["dense-run/checkpoints/0000000003", "dense.safetensors", "dense-hf"])
def test_the_same_network_from_what_tells_it(path, files):  # noqa: F811
    loaded = swin_moe.load(files / path)
    assert list(loaded.classes) == CLASSES
    for name, value in own(files, "dense").items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


@pytest.mark.parametrize("path", ["run", "x.safetensors", "native", "hf"])
def test_preprocessing_is_that_of_the_run(path, tmp_path):
    """Squeezed bilinear images, not cropped bicubic ones as by default, whatever the weights went through."""
    config = load_config("digits_dense", [*DENSE, "data.eval_crop=false", "data.interpolation=bilinear"])
    model = swin_moe.build_model(config.model)
    model.init_weights(0)
    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    pieces = [Piece.of(name, p.detach()) for name, p in model.named_parameters()]
    manager.save(1, pieces, state={}, config=json.loads(json.dumps(dataclasses.asdict(config))))
    for verb, to, name in (
        ("export", "safetensors", "x.safetensors"),
        ("convert", "native", "native"),
        ("convert", "hf", "hf"),
    ):
        assert tools([verb, str(tmp_path / "run"), str(tmp_path / name), "--to", to]) == 0
    image = Image.effect_mandelbrot((50, 90), (-2, -1, 1, 1), 20).convert("RGB")
    pixels = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(swin_moe.load(tmp_path / path).preprocess(image), (pixels - mean) / std)


def test_what_a_file_does_not_tell_is_asked_for(files):  # noqa: F811
    with pytest.raises(ValueError, match=r"timm.pth: does not tell all .* give swin_moe.load\(path, img_size=...\)"):
        swin_moe.load(files / "dense-timm.pth")
    found = swin_moe.load(files / "dense-timm.pth", img_size=32).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in own(files, "dense").items())
    with pytest.raises(ValueError, match="top_k"):
        swin_moe.load(files / "moe-tutel.pth", img_size=32, window_size=4)
    sizes = {"img_size": 32, "window_size": 4, "moe": {"top_k": 1}}
    found = swin_moe.load(files / "moe-tutel.pth", **sizes).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in own(files, "moe").items())
    with pytest.raises(ValueError, match="model.img_sise"):
        swin_moe.load(files / "dense-run", img_sise=3)
    with pytest.raises(ValueError, match="model.img_size must be a whole number"):
        swin_moe.load(files / "dense-run", img_size="big")


@pytest.mark.parametrize("call", [swin_moe.load, lambda path: swin_moe.create_model("swin", pretrained=path, **SMALL)])
def test_what_is_none_is_one_sentence(call, files):  # noqa: F811
    for path in ("nowhere", "cut.pth", "whole.pth", "photos", "moe-ranks.pth.rank0", "text.yaml"):
        with pytest.raises(CheckpointError, match=f"^(path|pretrained)={files / path}: ") as refused:
            call(files / path)
        assert "\n" not in str(refused.value) and "--from" not in str(refused.value)


@pytest.mark.parametrize("path", ["dense-run", "dense-training.pth", "dense-timm.pth", "dense-hf", "dense.safetensors"])
def test_a_network_is_created_with_weights(path, files, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO, "swin_moe"):
        model = swin_moe.create_model("swin", pretrained=files / path, **SMALL)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own(files, "dense").items())
    assert f"{files / path}: loaded 50 tensors" in caplog.text
    fewer = swin_moe.create_model("swin", pretrained=files / path, **{**SMALL, "num_classes": 3})
    assert not fewer.head.weight.any() and "10 classes in the file, 3 in the model: set to zero" in caplog.text
    with pytest.raises(ValueError, match="weights do not fit the model"):
        swin_moe.create_model("swin", pretrained=files / path, **{**SMALL, "embed_dim": 16})
    with torch.device("meta"), pytest.raises(ValueError, match="pretrained needs real parameters"):
        swin_moe.create_model("swin", pretrained=files / path, **SMALL)


def test_official_files_are_loaded_by_their_path(files):  # noqa: F811
    model = swin_moe.create_model("swin", **SMALL, seed=9)
    report = swin_moe.load_official(model, files / "dense-training.pth")
    assert len(report.loaded) == 50 and not report.reinitialized
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own(files, "dense").items())
    content = torch.load(files / "dense-compiled.pth.tar", weights_only=True)
    report = swin_moe.load_official(model, content)
    assert "read without the key 'model_state_dict'" in str(report)
    with pytest.raises(ValueError, match="not an official state dict: its tensors have the prefix 'student.'; known"):
        swin_moe.load_official(model, torch.load(files / "dense-prefix.pth", weights_only=True))


def test_tables_in_a_file_tell_the_windows_of_training(tmp_path):
    """Of SwinV2, whose biases are asked for other coordinates in another window."""
    small = {**SMALL, "window_size": 4, "img_size": 32}
    state = swin_moe.create_model("swinv2", **small).state_dict()
    table = relative_coords_table(4, 4, torch.device("cpu"), torch.float32).reshape(1, 7, 7, 2)
    blocks = ("layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1")
    state |= {f"{block}.attn.relative_coords_table": table for block in blocks}
    torch.save({"model": state}, tmp_path / "v2.pth")
    larger = swin_moe.create_model("swinv2", **{**small, "window_size": 8, "img_size": 64})
    for given in (tmp_path / "v2.pth", {"model": state}):
        report = swin_moe.load_official(larger, given)
        assert "build it with pretrained_window_sizes=[4, 4]" in str(report)
    key = "layers.0.blocks.0.attn.relative_coords_table"
    for factor, said in ((float("nan"), "nan"), (1e30, "1.05664e+30")):
        broken = state | {key: table * factor}
        sentence = f"{key}: its largest number is {said}, where a table's is above 0 and below 16"
        with pytest.raises(ValueError, match=re.escape(sentence)):
            swin_moe.load_official(larger, {"model": broken})


def test_a_file_that_does_not_tell_the_shape_of_its_image_is_not_guessed(tmp_path):
    tiny: dict[str, Any] = dict(ape=True, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3)
    wide, other = (swin_moe.create_model("swin", img_size=(16, 64), **tiny) for _ in range(2))
    with torch.no_grad():
        wide.absolute_pos_embed.normal_(generator=torch.Generator().manual_seed(5))
    file = tmp_path / "wide.pth"
    torch.save({"model": wide.state_dict()}, file)
    for load in (
        lambda: swin_moe.load_official(other, file),
        lambda: swin_moe.create_model("swin", img_size=(16, 64), pretrained=file, **tiny),
    ):
        with pytest.raises(
            ValueError, match="64 positions are of 8 x 8 or of 4 x 16 tokens, and the file does not say"
        ):
            load()
    swin_moe.load_official(other, file, grid=(4, 16))
    assert torch.equal(other.absolute_pos_embed, wide.absolute_pos_embed)
    native = tmp_path / "native"
    tools(["convert", str(file), str(native), "--to", "native", "--set", "img_size=16,64", "--set", "window_size=2"])
    again = swin_moe.load(native).model
    assert again.img_size == (16, 64) and torch.equal(again.absolute_pos_embed, wide.absolute_pos_embed)


@pytest.mark.parametrize("size", ["0", "x", "16,", "16,64,3", "-1", "16,0"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    file = tmp_path / "swin.pth"
    torch.save({"model": swin_moe.create_model("swin", **SMALL).state_dict()}, file)
    with pytest.raises(CheckpointError, match="--set img_size must be a number of pixels, or two: H,W, got"):
        open_source(file, Options(extra={"img_size": size}), "official")


@pytest.mark.parametrize("form", ["dcp", "official", "fairscale", "timm"])
def test_sizes_given_with_set_are_heeded_by_every_format(tmp_path, form):
    sizes = ["--set", "img_size=32", "--set", "window_size=4"]
    model = swin_moe.create_model("swinv2", **SMALL).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    foreign = tmp_path / ("x" if form == "dcp" else "y.pth")
    tools(["convert", str(tmp_path / "x.pth"), str(tmp_path / "n"), "--to", "native", *sizes])
    tools(["convert", str(tmp_path / "n"), str(foreign), "--to", form])
    assert tools(["convert", str(foreign), str(tmp_path / "back"), "--to", "native", *sizes]) == 0
    again = swin_moe.load(tmp_path / "back").model
    image = torch.randn(1, 3, 32, 32)
    assert again.img_size == (32, 32) and torch.equal(again(image), model(image))


@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_mlp"])
def test_sizes_that_a_native_checkpoint_lacks_can_be_given_later(tmp_path, family):
    model = swin_moe.create_model(family, **SMALL).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    bare, told = tmp_path / "bare", tmp_path / "told"
    tools(["convert", str(tmp_path / "x.pth"), str(bare), "--to", "native"])
    with pytest.raises(ValueError, match="does not tell all of its network"):
        swin_moe.load(bare)
    sizes = ["--set", "img_size=32", "--set", "window_size=4"]
    assert tools(["convert", str(bare), str(told), "--to", "native", *sizes]) == 0
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(swin_moe.load(told).model(image), model(image))
    wider = tmp_path / "wider"  # a network without absolute positions computes on any image
    assert tools(["convert", str(told), str(wider), "--to", "native", "--set", "img_size=64"]) == 0
    assert swin_moe.load(wider).model.img_size == (64, 64)


@pytest.mark.parametrize("form", ["official", "native"])
@pytest.mark.parametrize(
    ("family", "given", "said"),
    [
        (
            "swin",
            "img_size=64",
            "an image of 64x64 pixels has 256 tokens, and the absolute positions are of 64; check",
        ),
        (
            "swin",
            "window_size=8",
            "the parameters of stage 0 are of windows of 4 tokens, and these sizes make them 8;",
        ),
        (
            "swin_mlp",
            "window_size=2",
            "the parameters of stage 0 are of windows of 4 tokens, and these sizes make them 2\n",
        ),
        ("swin", "img_size=x", "--set img_size must be a number of pixels, or two: H,W, got 'x'"),
    ],
)
def test_sizes_that_the_tensors_contradict_are_refused(tmp_path, capsys, form, family, given, said):
    extra = {"ape": True} if family == "swin" else {}
    torch.save({"model": swin_moe.create_model(family, **SMALL, **extra).state_dict()}, tmp_path / "x.pth")
    source = tmp_path / "x.pth"
    if form == "native":
        source = tmp_path / "n"
        sizes = ["--set", "img_size=32", "--set", "window_size=4"]
        tools(["convert", str(tmp_path / "x.pth"), str(source), "--to", "native", *sizes])
    assert tools(["convert", str(source), str(tmp_path / "out"), "--to", "native", "--set", given]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_native_checkpoint_keeps_its_step(tmp_path, capsys):
    torch.save({"model": swin_moe.create_model("swin", **SMALL).state_dict()}, tmp_path / "x.pth")
    native = tmp_path / "n"
    tools(["convert", str(tmp_path / "x.pth"), str(native), "--to", "native", "--set", "step=7"])
    for step, code in (("7", 0), ("8", 2)):
        target = str(tmp_path / step)
        assert tools(["convert", str(native), target, "--to", "native", "--set", f"step={step}"]) == code
    assert "--set step=8 is for files that do not tell it; this one is of 7" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [3, None, b"x.pth", ["x.pth"], "", " "])
def test_what_is_no_path_is_refused_by_the_name_of_the_argument(wrong, tmp_path):
    model = swin_moe.create_model("swin", **SMALL)
    calls = {"path": lambda: swin_moe.load(wrong), "folder": lambda: model.save_pretrained(wrong)}
    if wrong:  # nothing else is "no weights" there
        calls["pretrained"] = lambda: swin_moe.create_model("swin", pretrained=wrong, **SMALL)
    if wrong == " ":
        del calls["folder"]  # a name like any other
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=rf"{name} must (be|name) .*got {re.escape(repr(wrong))}"):
            call()


@pytest.mark.parametrize("kind", ["backbone.", "teacher.backbone."])
def test_a_detector_is_no_classifier(kind, tmp_path):
    """It said that head.bias was missing in the file; its backbone alone is a beginning as any other."""
    model = swin_moe.create_model("swin", **SMALL)
    with torch.no_grad():
        model.layers[0].blocks[0].mlp.fc1.bias.fill_(3.0)
    pieces = [Piece.of(f"{kind}{n}", p.detach()) for n, p in model.named_parameters() if not n.startswith("head")]
    config = json.loads(json.dumps({"model": dataclasses.asdict(model.config), "task": {"name": "detect"}}))
    path = CheckpointManager(tmp_path).save(1, pieces, state={}, config=config)
    with pytest.raises(ValueError, match=rf"{path}: holds a detector or segmentor, .*: swin-moe predict; its backbone"):
        swin_moe.load(path)
    if kind == "backbone.":
        begun = swin_moe.create_model("swin", pretrained=path, **SMALL)
        assert (begun.layers[0].blocks[0].mlp.fc1.bias == 3.0).all()
