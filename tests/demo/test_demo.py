"""`swin-moe demo`: what it shows is what the network computes; the page works in a browser (--full)."""

import contextlib
import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swin_moe.checkpoint import find_latest
from swin_moe.config import DataConfig
from swin_moe.demo import app, command, draw
from swin_moe.demo.look import Observer, patch_at
from swin_moe.demo.networks import Classifier, Finder, open_network
from swin_moe.models import create_model
from swin_moe.models.attention import WindowAttention
from swin_moe.models.swin import SwinTransformer
from swin_moe.predict.command import main as predict
from swin_moe.train import main as train
from swin_moe.weights.pretrained import Loaded, preprocess_of

ROOT = Path(__file__).resolve().parents[2]
SHOTS = os.environ.get("SWIN_MOE_SCREENSHOTS")  # a folder for them, to be looked at
SMALL = {"img_size": 32, "patch_size": 2, "num_classes": 3, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
MOE = {"moe": {"blocks": [[1], [1]], "num_experts": 4}, "pretrained_window_sizes": [0, 0]}
NETWORKS: dict[str, dict[str, Any]] = {
    "swin": {"window_size": 4},
    "swinv2": {"window_size": 5, "pretrained_window_sizes": [0, 0]},  # 16 and 8 tokens, padded
    "swin_moe": {"window_size": 4, **MOE},
    "swin_mlp": {"window_size": 4},
}


def network(name: str) -> SwinTransformer:
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL, **NETWORKS[name]}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def observer(name: str) -> Observer:
    model = network(name)
    return Observer(Classifier(Loaded(model, ("cat", "dog"), preprocess_of(DataConfig(), model.config.img_size))))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["swin", "swinv2", "swin_moe"])
def test_weights_are_those_that_the_layer_attends_with(name):
    model, inputs = network(name), {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, WindowAttention)}
    for n, module in layers.items():
        module.register_forward_hook(
            lambda m, given, options, out, n=n: inputs.update({n: (given[0], options["shift"], out)}), with_kwargs=True
        )
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        for n, (x, shift, out) in inputs.items():
            weights, places = layers[n].weights(x, shift=shift)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            C, heads = x.shape[-1], layers[n].num_heads
            padded = torch.cat([torch.zeros(2, 1, C), x.flatten(1, 2)], dim=1)  # row 0 stands for padding
            image = torch.arange(2).repeat_interleave(len(places) // 2)
            value = layers[n]._project(padded[image[:, None], places + 1])[..., 2 * C :]
            value = value.unflatten(-1, (heads, C // heads)).transpose(1, 2)
            attended = layers[n].proj((weights @ value).transpose(1, 2).flatten(2))
            there = places >= 0
            found = torch.zeros(2, x[0, ..., 0].numel(), C)
            found[image[:, None].expand_as(places)[there], places[there]] = attended[there]
            torch.testing.assert_close(found.view_as(out), out, rtol=1e-4, atol=1e-5)
    assert any(shift for _, shift, _ in inputs.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_shown_is_what_the_network_does(name):
    watcher = observer(name)
    with torch.no_grad():
        network = watcher.network
        assert isinstance(network, Classifier)
        output = network.backbone(network.preprocess(picture())[None])
    logits = output[0] if isinstance(output, tuple) else output
    looked = watcher.look(picture())
    names = [("cat", "dog", "class 2")[k] for k in logits[0].argsort(descending=True)]
    assert [name for name, _ in looked.said.classes] == names
    assert math.isclose(sum(p for _, p in looked.said.classes), 1.0, abs_tol=1e-9)
    assert [m.expert.shape for m in looked.routing] == ([(16, 16), (8, 8)] if name == "swin_moe" else [])
    assert [s.shape for s in looked.strength] == [(16, 16), (8, 8)]
    block = "layers.1.blocks.1.attn"
    shown = app.answer(watcher, picture(), block)
    assert shown is not None and (shown.experts is not None) == (name == "swin_moe")
    if name == "swin_mlp":
        assert looked.blocks == {} and shown.attention is None
        return
    row, column = patch_at(looked, block, 0.99, 0.3)
    assert (row, column) == (2, 7)
    weights = watcher.attention_of(looked, block, row, column)
    assert weights.shape == (8, 8) and 0 < weights.sum() <= 1 + 1e-5
    drawn = np.asarray(draw.attention(looked, weights, row, column))
    assert tuple(drawn[2 * 56, 7 * 56 + 20]) == draw._MARK  # the frame of the patch
    assert app.answer(watcher, None, block) is None


DETECTOR = """
task:
  name: detect
  detect: {channels: 16, anchor_scale: 5.0, proposals_per_level: [40, 40], proposals: [20, 20], boxes: 8, score: 0.0,
    box_fc_channels: 16, mask_convs: 1, mask_channels: 8, finest_scale: 14.0}
data: {name: canvases, global_batch: 4, dense: {canvases: 4, val_canvases: 2, eval_short: 80, eval_long: 120}}
model:
  {name: swin_moe, img_size: 64, embed_dim: 12, depths: [2, 2, 1, 1], num_heads: [1, 1, 1, 1], window_size: 4,
   num_classes: 10, pretrained_window_sizes: [0, 0, 0, 0], moe: {blocks: [[1], [1], [], []], num_experts: 3}}
optim: {epochs: 1, warmup_epochs: 0}
log: {tensorboard: false}
engine: {device: cpu}
"""
SEGMENTOR = """
task:
  name: segment
  segment: {channels: 16, pool_scales: [1, 2], inference: slide, slide_crop: [64, 64], slide_stride: [32, 32]}
data: {name: canvases, global_batch: 4, dense: {canvases: 4, val_canvases: 2, eval_short: 80, eval_long: 120}}
model: {name: swin, img_size: 64, embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1], window_size: 4,
  num_classes: 11}
optim: {epochs: 1, warmup_epochs: 0}
log: {tensorboard: false}
engine: {device: cpu}
"""


def trained(config: str, name: str, root: Path) -> Path:
    """Returns the folder of a run of one step."""
    (root / f"{name}.yaml").write_text(config)
    train([str(root / f"{name}.yaml"), f"run.output={root}", f"run.name={name}"])
    return root / name


def test_a_detector_shows_what_predict_finds(tmp_path):
    pytest.importorskip("pycocotools")
    run = trained(DETECTOR, "finds", tmp_path)
    picture().save(tmp_path / "a.png")
    predict([str(run), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--score", "0"])
    stored = json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]
    newest = find_latest(run / "checkpoints")
    watchers = [Observer(open_network(str(source))) for source in (run, newest)]
    shown = [app.answer(watcher, picture(), "layers.1.blocks.1.attn", 0.0) for watcher in watchers]
    for one in shown:
        assert one is not None and one.looked.said.found is not None and one.looked.said.found.scores is not None
        assert one.looked.said.found.scores.tolist() == [row["score"] for row in stored] and len(stored) > 3
        assert np.array_equal(np.asarray(one.said), np.asarray(Image.open(tmp_path / "out/a.png")))
        seen = one.looked.pixels.shape[:2]
        assert seen == (96, 96)  # 80 x 96 pixels, in whole strides of 32
        maps = [m.expert for m in one.looked.routing]
        assert [m.shape for m in maps] == [(seen[0] // 4, seen[1] // 4), (seen[0] // 8, seen[1] // 8)]
        assert (maps[0][:20, :24] >= 0).all() and (maps[0] >= 0).sum() == 20 * 24  # what pads the image goes nowhere
        assert one.experts is not None and one.attention is not None and one.features is not None
    best = max(row["score"] for row in stored)
    assert draw.count(shown[0].looked, best) == f"found: 1 of {len(stored)} objects, the surest {best:.2f}"
    assert draw.found(shown[0].looked, watchers[0].network.names, 0.0) != draw.found(
        shown[0].looked, watchers[0].network.names, best + 0.01
    )


def test_a_segmentor_shows_its_label_map_and_the_crop_that_it_saw_last(tmp_path):
    run = trained(SEGMENTOR, "parts", tmp_path)
    watcher = Observer(open_network(str(run)))
    assert isinstance(watcher.network, Finder)
    shown = app.answer(watcher, picture(), "layers.3.blocks.0.attn")
    assert shown is not None and shown.looked.said.found is not None
    assert shown.looked.said.found.label_map is not None and shown.looked.said.found.label_map.shape == (40, 48)
    assert shown.looked.pixels.shape == (64, 64, 3) and shown.looked.strength[0].shape == (16, 16)
    assert shown.experts is None and shown.attention is not None
    assert draw.count(shown.looked, 0.3) == "found: the class of every pixel"


def test_a_config_takes_weights_by_name_and_networks_that_say_nothing_are_refused(tmp_path):
    run = trained(SEGMENTOR, "parts", tmp_path)
    config, weights = str(tmp_path / "parts.yaml"), f"checkpoint.load={run}"
    found = [open_network(*given).say(picture(), top=5).found for given in ((config, [weights]), (str(run),))]
    assert all(f is not None and f.label_map is not None for f in found)
    assert torch.equal(found[0].label_map, found[1].label_map)
    newest = find_latest(run / "checkpoints")
    assert newest is not None
    with pytest.raises(ValueError, match="task.name=simmim says nothing of an image"):
        open_network("digits_simmim", [weights])
    torch.save({"model": network("swin").state_dict()}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match=r"does not tell all of its network; name its config: swin-moe demo CONFIG "):
        open_network(str(tmp_path / "official.pth"))
    alone = shutil.move(newest, tmp_path / "alone")
    with pytest.raises(ValueError, match=r"stands without its run, .*swin-moe demo CONFIG checkpoint.load="):
        open_network(str(alone))


def test_brightness_grows_along_the_ramp():
    brightness = draw.ramp(np.linspace(0, 1, 64)).astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(brightness) > 0).all()


def test_missing_gradio_and_wrong_sources_are_one_sentence(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    for words, said in (
        (["x"], "pip install 'swin-moe[demo]'"),
        (["x", "--port", "0"], "--port must be in [1, 65535]"),
        (["x", "y.png"], "takes one RUN and options as key=value, got also y.png"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.run(words)
        assert ended.value.code == 2 and said in capsys.readouterr().err


SERVE = """
import sys, torch
from tests.demo.test_demo import observer
from swin_moe.demo.app import build
torch.set_num_threads(1)
build(observer("swin_moe"), "a small network").launch(server_port=int(sys.argv[1]), quiet=True, share=False)
"""


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio (extra demo)")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs playwright")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_works_in_a_browser(width, tmp_path):
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    picture().save(tmp_path / "picture.png")
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], cwd=ROOT)
    foreign = []
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.set_default_timeout(240_000)
            page.on("request", lambda request: foreign.append(request.url))
            _open(page, f"http://127.0.0.1:{port}")
            page.set_input_files("input[type=file]", str(tmp_path / "picture.png"))
            page.get_by_text("class 2").first.wait_for()
            assert {"cat", "dog"} <= set(page.inner_text("body").split())
            before = None
            for tab in ("Experts", "Attention", "Features"):
                page.get_by_role("tab", name=tab).click()
                image = page.locator(f"#{tab.lower()} img").first
                image.wait_for()
                name = page.locator(f"#{tab.lower()} [data-testid=block-label]")
                assert name.evaluate("e => e.offsetWidth") <= 1  # for screen readers; seen, it would lie over the top
                assert image.evaluate("i => i.complete && i.naturalWidth") > 100
                if tab != "Attention" and width == 400:  # not shrunk, but moved sideways
                    assert image.evaluate("i => i.clientWidth == i.naturalWidth")
                    room = "i => [i.parentElement.scrollWidth, getComputedStyle(i.parentElement).overflowX]"
                    reached, way = image.evaluate(room)
                    assert way == "auto" and reached >= image.evaluate("i => i.clientWidth")
                if tab == "Attention":
                    before = image.get_attribute("src")
                    image.click(position={"x": 20, "y": 20})
                    page.wait_for_function("([i, b]) => i.src != b", arg=[image.element_handle(), before])
                page.screenshot(path=str(SHOTS or tmp_path) + f"/{tab}-{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert [url for url in foreign if f"127.0.0.1:{port}" not in url and not url.startswith(("data:", "blob:"))] == []


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio (extra demo)")
@pytest.mark.parametrize("typed", ["RUN", "CONFIG checkpoint.load=RUN"])
def test_the_command_serves_the_page(typed, tmp_path):
    run = trained(SEGMENTOR, "served", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = typed.replace("RUN", str(run)).replace("CONFIG", str(tmp_path / "served.yaml")).split()
    command = [sys.executable, "-m", "swin_moe", "demo", *words, "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        answer = None
        for _ in range(600):
            assert server.poll() is None
            with contextlib.suppress(OSError):  # not listening yet
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}").read().decode()
                break
            time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert answer is not None and f"swin-moe: {words[0]}" in answer


def _open(page, address):
    for _ in range(600):
        try:
            return page.goto(address)
        except Exception:  # not listening yet
            time.sleep(0.5)
    raise AssertionError("the page did not come")
