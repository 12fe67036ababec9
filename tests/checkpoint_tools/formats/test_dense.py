"""Files of official segmentors: read, converted, written as they were, and loaded to compute with."""

import pytest
import torch

from checkpoint_tools.__main__ import main as tools
from checkpoint_tools.formats import find_format
from swin_moe.engine.common import materialize
from swin_moe.names.official import file_key, inner_name
from swin_moe.names.state_dict import find_weights
from swin_moe.run.session import build_meta_model
from swin_moe.tasks.base import build_task
from swin_moe.weights.load import load_weights
from tests.models.dense.golden import error, fill, image, load
from tests.tasks.transfer import session_of

CLASSES = tuple("abcdefg")
MICRO = (
    "data.images_per_class=0",
    "model.name=swin",
    "model.img_size=224",
    "model.patch_size=4",
    "model.embed_dim=24",
    "model.depths=[2,2,2,2]",
    "model.num_heads=[1,2,4,8]",
    "model.window_size=7",
    "model.num_classes=7",
    "task.segment.class_weights=[]",
    "task.segment.channels=32",
    "task.segment.auxiliary_channels=16",
)


@pytest.fixture(scope="module")
def golden():
    return load("upernet_micro")


@pytest.fixture(scope="module")
def official(golden, tmp_path_factory):
    """Returns (path, state dict) of a file as the official code writes it."""
    state = {name: fill(name, tuple(shape)) for name, shape in golden["keys"].items()}
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    state |= {name.replace("bias_table", "index"): position_index(7) for name in tables}
    path = tmp_path_factory.mktemp("dense") / "official.pth"
    content = {
        "meta": {"CLASSES": CLASSES, "PALETTE": [[1, 2, 3]] * 7},
        "state_dict": state,
        "optimizer": {"state": {}},
    }
    torch.save(content, path)
    return path, state


def position_index(window: int) -> torch.Tensor:
    """Returns the official buffer, place by place."""
    place = [(i // window, i % window) for i in range(window**2)]
    side = 2 * window - 1
    rows = [[(a[0] - b[0] + window - 1) * side + a[1] - b[1] + window - 1 for b in place] for a in place]
    return torch.tensor(rows)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_goes_through_ours_and_comes_back_as_it_was(official, tmp_path, prefix):
    path, state = official
    if prefix:
        path = tmp_path / "wrapped.pth"
        torch.save({"state_dict": {prefix + name: value for name, value in state.items()}}, path)
    assert find_format(path) == "dense"
    assert tools(["convert", str(path), str(tmp_path / "native"), "--to", "native"]) == 0
    assert tools(["convert", str(tmp_path / "native"), str(tmp_path / "back.pth"), "--to", "dense"]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["state_dict"].keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in back["state_dict"].items())
    assert back["meta"] == ({} if prefix else {"CLASSES": list(CLASSES)})


def test_an_official_file_computes_what_it_computed(official, golden, tmp_path):
    path, _ = official
    session = session_of(tmp_path, "canvas_upernet", *MICRO, f"checkpoint.load={path}")
    task = build_task(session.config)
    model = materialize(build_meta_model(session, task), session.config, session.device)
    assert "dense" in load_weights(model, session)
    with torch.no_grad():
        logits = model.eval()(image((3, 3, *golden["shape"][1:]), golden["name"])).logits
    assert error(golden["decode_logits"], logits) < 1e-5


@pytest.mark.parametrize("form", ["official", "timm", "hf", "simmim"])
def test_formats_of_classifiers_say_where_a_segmentor_belongs(official, tmp_path, form, capsys):
    assert tools(["convert", str(official[0]), str(tmp_path / "x.pth"), "--to", form]) == 2
    assert "write it with --to dense" in capsys.readouterr().err


def test_a_classifier_is_no_dense_file(tmp_path, capsys):
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}}, tmp_path / "c.pth")
    assert find_format(tmp_path / "c.pth") == "official"
    assert tools(["convert", str(tmp_path / "c.pth"), str(tmp_path / "x.pth"), "--to", "dense"]) == 2
    assert "holds no detector or segmentor" in capsys.readouterr().err


def test_a_backbone_alone_loses_its_prefix_and_one_beside_heads_keeps_it():
    tensor = torch.zeros(1)
    alone = {"backbone.patch_embed.proj.weight": tensor, "backbone.norm.weight": tensor}
    beside = {**alone, "decode_head.conv_seg.bias": tensor}
    found = [set(find_weights(names, lambda x: isinstance(x, torch.Tensor)).records) for names in (alone, beside)]
    assert found == [{"patch_embed.proj.weight", "norm.weight"}, set(beside)]
    assert inner_name("backbone.norm.weight") == inner_name("encoder.norm.weight") == "norm.weight"
    assert file_key("decode_head.conv_seg.bias", wrapped=True) == "/decode_head.conv_seg.bias"
