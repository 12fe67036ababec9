"""Files of the official detection and segmentation repositories, read and written bit for bit."""

from pathlib import Path

import pytest
import torch

from checkpoint_tools.formats import find_format, open_source
from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint.errors import CheckpointError
from tests.checkpoint_tools.official_files import QUIET, convert, tensors_of
from tests.models.dense.golden import fill, load

NETWORKS = {
    "mask_rcnn_micro": (5, 7),
    "cascade_giou_micro": (5, 7),
    "htc_micro": (5, 7),
    "upernet_micro": (7, 7),
}


def save_official(name: str, path: Path, **beside) -> dict[str, torch.Tensor]:
    """Writes the golden's network as mmcv's runner does; returns its parameters and buffers."""
    tensors = {key: fill(key, tuple(shape)) for key, shape in load(name)["keys"].items()}
    torch.save({"meta": {"CLASSES": ("a",), "epoch": 3}, "state_dict": tensors, **beside}, path)
    return tensors


@pytest.mark.parametrize("name", NETWORKS)
def test_official_files_are_read_and_written_bit_for_bit(name, tmp_path):
    tensors = save_official(name, tmp_path / "official.pth")
    assert find_format(tmp_path / "official.pth") == "dense"
    with open_source(tmp_path / "official.pth", Options(**QUIET)) as source:
        classes, window = NETWORKS[name]
        model = source.config["model"]
        assert (model["num_classes"], model["window_size"], model["name"]) == (classes, window, "swin")
    convert(tmp_path / "official.pth", tmp_path / "native")
    parameters = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
    stored = tensors_of(tmp_path / "native")
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[key], value) for key, value in parameters.items())
    convert(tmp_path / "native", tmp_path / "back.pth", "dense")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[key], value) for key, value in tensors.items())
    beyond = back.keys() - tensors.keys()  # what the network computes stands in a strictly loaded file too
    assert beyond and all(key.endswith("relative_position_index") for key in beyond)


def test_what_dense_files_cannot_hold_is_told_or_refused(tmp_path):
    told: list[str] = []
    save_official("mask_rcnn_micro", tmp_path / "a.pth", optimizer={"state": {}, "param_groups": [{}]})
    convert(tmp_path / "a.pth", tmp_path / "native", report=told.append)
    assert any("optimizer" in line for line in told)
    plain = {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "norm.weight": torch.ones(8)}
    torch.save({"model": plain}, tmp_path / "classifier.pth")
    with pytest.raises(CheckpointError, match="no detector or segmentor"):
        convert(tmp_path / "classifier.pth", tmp_path / "x.pth", "dense")
    tensors = {key: fill(key, tuple(shape)) for key, shape in load("mask_rcnn_micro")["keys"].items()}
    torch.save({"state_dict": tensors | {"mystery_head.weight": torch.zeros(1)}}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="mystery_head"):
        convert(tmp_path / "b.pth", tmp_path / "y")


def test_positions_are_maps(tmp_path):
    tensors = {key: fill(key, tuple(shape)) for key, shape in load("mask_rcnn_micro")["keys"].items()}
    tensors["backbone.absolute_pos_embed"] = torch.randn(1, 24, 6, 8)
    torch.save({"state_dict": tensors}, tmp_path / "a.pth")
    with open_source(tmp_path / "a.pth", Options(**QUIET)) as source:
        assert source.config["model"]["ape"] and source.config["model"]["img_size"] == [24, 32]
    convert(tmp_path / "a.pth", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "b.pth", "dense")
    back = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    assert torch.equal(back["backbone.absolute_pos_embed"], tensors["backbone.absolute_pos_embed"])
