"""Exported networks give the network's logits, with experts and without."""

import dataclasses
import importlib.util
import json
from typing import Any

import pytest
import torch

from checkpoint_tools.__main__ import main
from swin_moe.checkpoint import Piece, save
from swin_moe.config import Config, DataConfig, ModelConfig, MoEConfig
from swin_moe.models.build import build_model

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))
SMALL: dict[str, Any] = dict(img_size=(32, 32), embed_dim=16, depths=(1, 2), num_heads=(2, 2), window_size=4)
SMALL |= dict(num_classes=5, pretrained_window_sizes=(0, 0))
MODELS = {
    "swin": ModelConfig(name="swin", **SMALL),
    "experts by need": ModelConfig(name="swin_moe", **SMALL, moe=MoEConfig(blocks=((), (1,)), num_experts=3, top_k=2)),
    "experts of limited capacity": ModelConfig(
        name="swin_moe", **SMALL, moe=MoEConfig(blocks=((), (1,)), num_experts=4, eval_capacity_factor=0.75)
    ),
    "soft": ModelConfig(
        name="swin_moe", **SMALL,
        moe=MoEConfig(blocks=((), (1,)), num_experts=3, choice="soft", slots=2, balance_loss="none"),
    ),
    "sigmoid, shared": ModelConfig(
        name="swin_moe", **SMALL,
        moe=MoEConfig(blocks=((), (1,)), num_experts=4, top_k=2, scores="sigmoid", normalize_gate=True,
                      shared_experts=1, balance_loss="none", bias_rate=1e-3),
    ),
}  # fmt: skip


def saved(root, model):
    """Returns (checkpoint, network) of a model with random weights, router included."""
    # Of images in folders, whose place a checkpoint does not keep.
    config = dataclasses.replace(Config(), model=model, data=DataConfig(name="folder", path="images"))
    network = build_model(model).eval()
    network.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    pieces = [Piece.of(name, parameter.detach()) for name, parameter in network.named_parameters()]
    return save(root, 1, pieces, state={}, config=dataclasses.asdict(config)), network


@pytest.mark.parametrize("name", MODELS)
def test_a_program_gives_the_networks_logits(tmp_path, name):
    path, network = saved(tmp_path, MODELS[name])
    assert main(["export", str(path), str(tmp_path / "net.pt2"), "--to", "torch-export", "--batch", "3"]) == 0
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network(image)
        found = torch.export.load(tmp_path / "net.pt2").module()(image)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if name == "experts of limited capacity":
        assert any(m.stats.dropped for m in network.modules() if hasattr(m, "stats"))


@pytest.mark.parametrize("name", ["swin", "swinv2", "swin_mlp"])
def test_a_program_takes_any_number_of_images(tmp_path, name):
    path, network = saved(tmp_path, ModelConfig(name=name, **SMALL))
    assert main(["export", str(path), str(tmp_path / "net.pt2"), "--to", "torch-export"]) == 0
    program = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (1, 2, 5, 16):
        image = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            torch.testing.assert_close(program(image), network(image), rtol=1e-5, atol=1e-6)


def test_a_program_with_experts_says_how_many_images_it_takes(tmp_path, capsys):
    path, _ = saved(tmp_path, MODELS["experts by need"])
    assert main(["export", str(path), str(tmp_path / "net.pt2"), "--to", "torch-export"]) == 0
    assert "has experts, so that the program takes 1 image per call; --batch N for N" in capsys.readouterr().out


@pytest.mark.skipif(not HAS_ONNX, reason="onnx and onnxscript are not installed")
def test_onnx_names_its_ends_and_classes_and_takes_any_number_of_images(tmp_path):
    import onnx.reference

    config = dataclasses.replace(Config(), model=MODELS["swin"], data=DataConfig(name="folder", path="images"))
    network = build_model(config.model).eval()
    network.init_weights(0)
    pieces = [Piece.of(name, parameter.detach()) for name, parameter in network.named_parameters()]
    path = save(tmp_path, 1, pieces, state={"classes": ["a", "b c"]}, config=dataclasses.asdict(config))
    assert main(["export", str(path), str(tmp_path / "net.onnx"), "--to", "onnx"]) == 0
    model = onnx.load(str(tmp_path / "net.onnx"))
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(found["classes"]) == ["a", "b c", "LABEL_2", "LABEL_3", "LABEL_4"]
    assert json.loads(found["mean"]) == [0.485, 0.456, 0.406] and json.loads(found["size"]) == [32, 32]
    assert json.loads(found["resize"]) == [36, 36] and found["interpolation"] == "bicubic"
    assert [value.name for value in model.graph.output] == ["logits"]
    evaluator = onnx.reference.ReferenceEvaluator(model)
    for batch in (1, 4):
        image = torch.randn(batch, 3, 32, 32)
        logits = torch.from_numpy(evaluator.run(["logits"], {"image": image.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(logits, network(image), rtol=1e-4, atol=1e-5)


def test_onnx_names_the_packages_it_needs_or_gives_the_networks_logits(tmp_path, capsys):
    path, network = saved(tmp_path, MODELS["experts by need"])
    code = main(["export", str(path), str(tmp_path / "net.onnx"), "--to", "onnx"])
    if not HAS_ONNX:
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("error: --to onnx needs onnx") and "pip install onnx" in error
        return
    import onnx.reference

    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    evaluator = onnx.reference.ReferenceEvaluator(str(tmp_path / "net.onnx"))
    found = evaluator.run(None, {evaluator.input_names[0]: image.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network(image)[0], rtol=1e-4, atol=1e-5)


def test_routing_whose_shapes_are_data_is_refused(tmp_path, capsys):
    moe = MoEConfig(blocks=((), (1,)), num_experts=4, choice="expert", capacity_scope="images", group_images=1,
                    balance_loss="none", capacity_factor=1.0, eval_capacity_factor=None)  # fmt: skip
    path, _ = saved(tmp_path, ModelConfig(name="swin_moe", **SMALL, moe=moe))
    assert main(["export", str(path), str(tmp_path / "net"), "--to", "torch-export"]) == 2
    assert "model.moe.choice=expert is not for export" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["missing", "left over", "no config"])
def test_what_is_no_network_is_refused_with_the_tensor(tmp_path, capsys, change):
    network = build_model(MODELS["swin"])
    pieces = [Piece.of(name, parameter.detach()) for name, parameter in network.named_parameters()]
    config = dataclasses.asdict(dataclasses.replace(Config(), model=MODELS["swin"]))
    pieces += [Piece.of("more", torch.zeros(1))] if change == "left over" else []
    path = save(tmp_path, 1, pieces[change == "missing" :], state={}, config={} if change == "no config" else config)
    assert main(["export", str(path), str(tmp_path / "net"), "--to", "torch-export"]) == 2
    reason = {"missing": "patch_embed.proj.weight: is missing", "left over": "tensor more: the network of its config",
              "no config": "does not say which network"}[change]  # fmt: skip
    assert reason in capsys.readouterr().err and not (tmp_path / "net").exists()
