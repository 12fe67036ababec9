"""Exported networks give the network's logits, with experts and without."""

import dataclasses
import importlib.util
import json
from typing import Any

import pytest
import torch

from checkpoint_tools.__main__ import main
from checkpoint_tools.verbs.export_program import check_factor
from swin_moe.checkpoint import Piece, save
from swin_moe.config import Config, DataConfig, ModelConfig, MoEConfig
from swin_moe.models.build import build_model

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))
SMALL: dict[str, Any] = dict(img_size=(32, 32), embed_dim=16, depths=(1, 2), num_heads=(2, 2), window_size=4)
SMALL |= dict(num_classes=5, pretrained_window_sizes=(0, 0))
WIDE = {**SMALL, "img_size": (40, 24)}  # 10 x 6 tokens in windows of 4, then 5 x 3: padded twice


def with_experts(name="swin_moe", sizes=SMALL, **options):
    return ModelConfig(name=name, **sizes, moe=MoEConfig(blocks=((), (1,)), **options))


MODELS = {
    "swin": ModelConfig(name="swin", **SMALL),
    "experts by need": with_experts(num_experts=3, top_k=2),
    "limited, prioritized": with_experts(
        num_experts=4, top_k=2, batch_prioritized=True, eval_capacity_factor=0.6, sizes=WIDE
    ),
    "limited within an image": with_experts(
        num_experts=4, top_k=2, capacity_scope="images", group_images=1, eval_capacity_factor=0.6, sizes=WIDE
    ),
    "expert choice": with_experts(
        num_experts=4,
        choice="expert",
        capacity_scope="images",
        group_images=2,
        balance_loss="none",
        capacity_factor=0.7,
        eval_capacity_factor=None,
    ),
    "soft": with_experts(num_experts=3, choice="soft", slots=2, balance_loss="none"),
    "sigmoid, shared": with_experts(
        num_experts=4,
        top_k=2,
        scores="sigmoid",
        normalize_gate=True,
        shared_experts=1,
        balance_loss="none",
        bias_rate=1e-3,
    ),
    "limited": with_experts(num_experts=4, eval_capacity_factor=0.75),
    "by need within images": with_experts(num_experts=4, top_k=2, capacity_scope="images", group_images=2, sizes=WIDE),
    "some groups": with_experts(num_experts=8, top_k=2, expert_groups=4, group_limit=2, balance_loss="none"),
    "many choices": with_experts(
        num_experts=12, top_k=10, scores="sigmoid", eval_capacity_factor=0.6, balance_loss="none"
    ),
    "swinv2, cosine, at most": with_experts(
        "swinv2", num_experts=4, top_k=2, router="cosine", eval_capacity_factor=-0.6, balance_loss="gshard"
    ),
    "swinv2": ModelConfig(name="swinv2", **SMALL),
    "swin_mlp": ModelConfig(name="swin_mlp", **SMALL),
}
DROPPING = ("limited", "limited, prioritized", "limited within an image", "many choices", "swinv2, cosine, at most")
QUICK = ("swin", "experts by need", "limited, prioritized", "expert choice")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in MODELS]


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


def check_any_number(program, network, size, *, drops, **tolerance):
    """Holds that the program gives the network's logits for batches of 1, 2, 5 and 16 images."""
    for batch in (1, 2, 5, 16):
        image = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = network(image)
            expected = expected[0] if isinstance(expected, tuple) else expected
            torch.testing.assert_close(program(image), expected, **tolerance)
        assert drops == any(int(m.stats.dropped) > 0 for m in network.modules() if getattr(m, "stats", None))


@pytest.mark.parametrize("name", CASES)
def test_a_program_gives_the_networks_logits_for_any_number_of_images(tmp_path, capsys, name):
    path, network = saved(tmp_path, MODELS[name])
    assert main(["export", str(path), str(tmp_path / "net.pt2"), "--to", "torch-export"]) == 0
    assert "image per call" not in capsys.readouterr().out
    program = torch.export.load(tmp_path / "net.pt2").module()
    size = MODELS[name].img_size
    check_any_number(program, network, size, drops=name in DROPPING, rtol=1e-5, atol=1e-6)


def test_a_program_of_another_name_is_written_with_a_word_of_ours_alone(tmp_path, capfd):
    path, network = saved(tmp_path, MODELS["swin"])
    assert main(["export", str(path), str(tmp_path / "net.export"), "--to", "torch-export"]) == 0
    found = capfd.readouterr()
    assert "net.export: torch.export.load warns of names that do not end in .pt2\n" in found.out
    assert "archive" not in found.err  # torch's own warning
    with open(tmp_path / "net.export", "rb") as file:
        program = torch.export.load(file).module()
    check_any_number(program, network, (32, 32), drops=False, rtol=1e-5, atol=1e-6)


def test_images_that_share_slots_need_a_number_and_are_told_why(tmp_path, capsys):
    options = dict(num_experts=4, capacity_scope="images", group_images=2, eval_capacity_factor=0.6)
    path, network = saved(tmp_path, with_experts(**options))
    assert main(["export", str(path), str(tmp_path / "one.pt2"), "--to", "torch-export"]) == 0
    reason = (
        "2 images share the slots of an expert (model.moe.group_images), so that the program takes 1 image per call"
    )
    assert f"{reason}; --batch N for N" in capsys.readouterr().out
    assert main(["export", str(path), str(tmp_path / "three.pt2"), "--to", "torch-export", "--batch", "3"]) == 0
    assert "share the slots" not in capsys.readouterr().out
    for name, batch in (("one", 1), ("three", 3)):
        image = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            found = torch.export.load(tmp_path / f"{name}.pt2").module()(image)
            torch.testing.assert_close(found, network(image)[0], rtol=1e-5, atol=1e-6)


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


@pytest.mark.skipif(not HAS_ONNX, reason="onnx and onnxscript are not installed")
@pytest.mark.parametrize("name", CASES)
def test_onnx_gives_the_networks_logits_for_any_number_of_images(tmp_path, name):
    import onnx

    runtime = pytest.importorskip("onnxruntime")  # the package's own evaluator gathers from 64 rows at most
    path, network = saved(tmp_path, MODELS[name])
    assert main(["export", str(path), str(tmp_path / "net.onnx"), "--to", "onnx"]) == 0
    model = onnx.load(str(tmp_path / "net.onnx"))
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    assert image.type.tensor_type.shape.dim[0].dim_param == logits.type.tensor_type.shape.dim[0].dim_param != ""
    evaluator = runtime.InferenceSession(str(tmp_path / "net.onnx"))

    def run(image):
        return torch.from_numpy(evaluator.run(["logits"], {"image": image.numpy()})[0])

    check_any_number(run, network, MODELS[name].img_size, drops=name in DROPPING, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [0.29, 0.7])
def test_a_factor_that_is_another_in_single_precision_is_refused(factor):
    with pytest.raises(ValueError, match=f"eval_capacity_factor={factor} gives .* slots for .* give --batch N"):
        check_factor(factor)


@pytest.mark.parametrize("factor", [0.5, 0.6, 0.75, 1.0, 1.25, 1.5, 2.0])
def test_factors_in_use_are_the_same_in_single_precision(factor):
    check_factor(factor)


@pytest.mark.skipif(HAS_ONNX, reason="onnx and onnxscript are installed")
def test_onnx_names_the_packages_it_needs(tmp_path, capsys):
    path, _ = saved(tmp_path, MODELS["experts by need"])
    assert main(["export", str(path), str(tmp_path / "net.onnx"), "--to", "onnx"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --to onnx needs onnx") and "pip install onnx" in error


@pytest.mark.parametrize("change", ["missing", "left over", "no config"])
def test_what_is_no_network_is_refused_with_the_tensor(tmp_path, capsys, change):
    network = build_model(MODELS["swin"])
    pieces = [Piece.of(name, parameter.detach()) for name, parameter in network.named_parameters()]
    config = dataclasses.asdict(dataclasses.replace(Config(), model=MODELS["swin"]))
    pieces += [Piece.of("more", torch.zeros(1))] if change == "left over" else []
    path = save(tmp_path, 1, pieces[change == "missing" :], state={}, config={} if change == "no config" else config)
    assert main(["export", str(path), str(tmp_path / "net"), "--to", "torch-export"]) == 2
    reason = {
        "missing": "patch_embed.proj.weight: is missing",
        "left over": "tensor more: the network of its config",
        "no config": "does not say which network",
    }[change]
    assert reason in capsys.readouterr().err and not (tmp_path / "net").exists()
