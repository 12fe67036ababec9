"""Heads keep to their task: their own names, the classes they were trained for, engines that take a new task."""

from dataclasses import replace

import pytest
import torch

from checkpoint_tools.__main__ import main as tools
from swin_moe.config.io import load_config
from swin_moe.models import build_model
from swin_moe.models.heads import EncoderModel
from swin_moe.models.official import CLASSES_1K, CLASSES_22K, load_official, read_class_map
from swin_moe.run.session import check_layout
from swin_moe.tasks.base import TASKS, build_task
from swin_moe.tasks.classify import Classify
from swin_moe.train import Trainer
from tests.tasks.transfer import TINY, begun, trained, untouched, weights


class Tagged(EncoderModel):
    """An encoder with children named as some of its own."""

    def __init__(self, encoder):
        super().__init__(encoder)
        self.norm = torch.nn.LayerNorm(encoder.num_features)
        self.head = torch.nn.Linear(encoder.num_features, 10)
        self.layers = torch.nn.ModuleDict({"0": torch.nn.Linear(4, 4)})
        self.laterals = torch.nn.Linear(3, 3)


class Tagging(Classify):
    """A task of somebody's: names of its own, among them the encoder's."""

    def build_network(self):
        return Tagged(build_model(replace(self.config.model, num_classes=0)))


@pytest.mark.parametrize("kind", ["run", "export"])
def test_a_head_keeps_its_own_weights_whatever_it_is_called(tmp_path, monkeypatch, kind):
    source = trained(tmp_path, "digits_dense", "optim.lr=1.0")
    path = source.session.directory
    if kind == "export":
        path = tmp_path / "x.safetensors"
        assert tools(["export", str(source.session.directory), str(path), "--to", "safetensors"]) == 0
    monkeypatch.setitem(TASKS, "tagging", f"{__name__}:Tagging")
    new, report = begun(tmp_path, "digits_dense", path, "task.name=tagging")
    fresh, before = untouched(new), weights(source)
    for name, value in weights(new).items():
        wanted = before[name.removeprefix("encoder.")] if name.startswith("encoder.") else fresh[name]
        assert torch.equal(value, wanted), name
    assert "reinitialized 8 (" in report and "begins from the seed" in report
    assert "dropped 2 (head.weight, head.bias): the model has no head" in report

    other = Trainer(new.session)
    with torch.no_grad():
        for value in other.engine.local_model.parameters():
            value.add_(1.0)
    other._save(False)
    saved = other.session.directory
    again, report = begun(tmp_path, "digits_dense", saved, "task.name=tagging")
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(again).items())
    back, report = begun(tmp_path, "digits_dense", saved)
    for name, value in weights(back).items():
        if not name.startswith("head."):
            assert torch.equal(value, weights(other)[f"encoder.{name}"]), name
    assert "dropped 8 (" in report and "only for the task it was trained for" in report


def test_what_stands_beside_an_encoder_is_its_tasks_whatever_it_is_called():
    config = load_config("digits_moby", [*TINY, "task.moby.queue=20"])
    networks = [build_task(config).build_network(), Tagged(build_model(replace(config.model, num_classes=0)))]
    for number, network in enumerate(networks):
        network.init_weights(number)
        model = build_model(config.model)
        model.init_weights(7)
        report = load_official(model, network.state_dict())
        for name, value in network.encoder.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        beside = {name for name in network.state_dict() if not name.startswith("encoder.")}
        assert {name for name, _ in report.dropped} == beside and len(beside) >= 8
        assert {reason for _, reason in report.dropped} == {"only for the task it was trained for"}


def test_another_engine_refuses_a_new_task_for_a_true_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "tagging", f"{__name__}:Tagging")
    options = [*TINY, "task.name=tagging", "engine.name=deepspeed", "parallel.zero=1"]
    check_layout(load_config("digits_dense", options), 1)
    monkeypatch.setattr(Tagging, "changes_weights", True)
    with pytest.raises(ValueError, match="does not run task.name=tagging: it cuts weights otherwise than what"):
        check_layout(load_config("digits_dense", options), 1)


# Class heads.


def test_another_number_of_classes_begins_with_a_zero_head(tmp_path):
    source = trained(tmp_path, "digits_dense")
    new, report = begun(tmp_path, "digits_dense", source.session.directory, "model.num_classes=12")
    head = new.engine.local_model.head
    assert head.weight.shape == (12, 16) and not head.weight.any() and not head.bias.any()
    assert "10 classes in the file, 12 in the model: set to zero" in report


def test_classes_of_22k_become_those_of_1k(tmp_path):
    config = load_config("digits_dense", [*TINY, f"model.num_classes={CLASSES_22K}"])
    old = build_model(config.model)
    old.init_weights(3)
    with torch.no_grad():
        old.head.bias.copy_(torch.arange(CLASSES_22K))
    path = tmp_path / "official.pth"
    torch.save({"model": old.state_dict()}, path)
    new, report = begun(tmp_path, "digits_dense", path, f"model.num_classes={CLASSES_1K}")
    head = new.engine.local_model.head
    assert head.bias.tolist() == read_class_map()
    assert torch.equal(head.weight, old.head.weight[read_class_map()])
    assert "21841 to 1000 classes by map22kto1k.txt" in report
