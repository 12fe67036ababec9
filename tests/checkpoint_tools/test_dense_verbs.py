"""Verbs that compute, or change blocks, on a checkpoint of a detector: one sentence before anything is written."""

import dataclasses
import json

import pytest

from checkpoint_tools.__main__ import main
from swin_moe import create_model
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.manager import save
from swin_moe.checkpoint.pieces import Piece

SMALL = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 3}
EXPERTS = {"num_experts": 2, "moe_blocks": ((-1,), (1,)), "moe": {"top_k": 1}}


def detector(root, family="swin", **options):
    """Returns a checkpoint with a backbone's parameters as detectors name them, and something of a head."""
    model = create_model(family, **SMALL, **options)
    pieces = [Piece.of(f"backbone.{n}", p.detach()) for n, p in model.named_parameters() if not n.startswith("head.")]
    pieces.append(Piece.of("rpn_head.rpn_cls.bias", next(model.parameters()).detach().flatten()[:3]))
    config = json.loads(json.dumps({"model": dataclasses.asdict(model.config), "task": {"name": "detect"}}))
    return str(save(root, 1, pieces, state={}, config=config))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["upcycle", "--experts", "2"], "is of a detector or segmentor; upcycle the classifier"),
        (["export", "--to", "torch-export"], "only classifiers are exported as programs; --to safetensors writes"),
    ],
)
def test_a_detector_is_refused_before_anything_is_written(words, sentence, tmp_path, capsys):
    assert main([words[0], detector(tmp_path / "d"), str(tmp_path / "out.pt2"), *words[1:]]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out and not (tmp_path / "out.pt2").exists()


def test_experts_of_a_detector_are_changed_and_not_compared(tmp_path, capsys):
    """It wrote them, and ended with 2 as the whole is no classifier that could be run."""
    source = detector(tmp_path / "d", "swin_moe", **EXPERTS)
    assert main(["experts", source, str(tmp_path / "out"), "--duplicate", "4"]) == 0
    assert "not compared with the network it came from: they are detectors or segmentors" in capsys.readouterr().out
    written = Index.read(tmp_path / "out")
    shapes = {t.shape[0] for name, t in written.tensors.items() if name.endswith(".experts.fc1_weight")}
    assert shapes == {4} and written.config["model"]["moe"]["num_experts"] == 4
