"""A task, a router, a data set and an engine that live outside this repository are named as package.module:Name."""

import sys

import pytest

from swin_moe import train
from swin_moe.config.io import load_config
from swin_moe.run.session import run_main
from tests.training.test_commands import QUICK

CODE = '''
import torch
from swin_moe.data.digits import Digits
from swin_moe.engine.replicated import ReplicatedEngine
from swin_moe.moe.routers import Router, LinearRouter
from swin_moe.tasks.base import Task
from swin_moe.tasks.classify import Classify

seen = []


class Halved(Classify):
    def loss(self, model, batch, context):
        seen.append("task")
        return super().loss(model, batch, context)


class Lossless(Task):
    def evaluate(self, model, batches, context):
        return {"loss": 0.0}


class Foreign:
    metric = "loss"

    def loss(self, model, batch, context):
        return None


class Negated(LinearRouter):
    def forward(self, x):
        seen.append("router")
        return -super().forward(x)


class FewDigits(Digits):
    def __len__(self):
        seen.append("data")
        return 64


class Unfinished:
    """An engine as the protocol was once: without what a skipped step needs."""

    def __init__(self, model, *, config, groups, schedule, device):
        self._engine = ReplicatedEngine(model, config=config, groups=groups, schedule=schedule, device=device)

    def __getattr__(self, name):
        if name in ("autocast", "discard_gradients"):
            raise AttributeError(name)
        return getattr(self._engine, name)


class OwnEngine(ReplicatedEngine):
    def step(self, t):
        seen.append("engine")
        return super().step(t)
'''
OPTIONS = {
    "task": "task.name=elsewhere.parts:Halved",
    "router": "model.moe.router=elsewhere.parts:Negated",
    "data": "data.name=elsewhere.parts:FewDigits",
    "engine": "engine.name=elsewhere.parts:OwnEngine",
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    package = tmp_path / "site" / "elsewhere"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(package.parent))
    yield lambda: sys.modules["elsewhere.parts"].seen
    for name in ("elsewhere.parts", "elsewhere"):
        sys.modules.pop(name, None)


def test_all_four_train_together_and_continue(elsewhere, tmp_path):
    words = ["digits_swin_moe", *QUICK, *OPTIONS.values(), f"run.output={tmp_path}", "data.workers=0"]
    run_main(train.main, words)
    assert set(elsewhere()) == set(OPTIONS)
    run_main(train.main, [*words, "optim.epochs=3"])
    stored = load_config(tmp_path / "run" / "config.yaml")
    assert stored.task.name == "elsewhere.parts:Halved" and stored.model.moe.router == "elsewhere.parts:Negated"


@pytest.mark.parametrize(
    "option, sentence",
    [
        ("task.name=elsewhere.nowhere:X", "task.name=elsewhere.nowhere:X: there is no module elsewhere.nowhere"),
        (
            "task.name=elsewhere.parts:Lossless",
            ": Lossless lacks loss (swin_moe/tasks/base.py: Task)",
        ),
        (
            "task.name=elsewhere.parts:Foreign",
            "Foreign lacks teacher, higher_is_better, needs_partners, needs_views, changes_weights, needs_teacher, "
            "build_network, connect, evaluate, after_step, pictures (",
        ),
        ("task.name=elsewhere.parts:seen", "lacks"),
        ("engine.name=elsewhere.parts:X", "engine.name=elsewhere.parts:X: the module elsewhere.parts has no X"),
        (
            "engine.name=elsewhere.parts:Unfinished",
            "engine.name=elsewhere.parts:Unfinished: Unfinished lacks autocast, discard_gradients",
        ),
        ("model.moe.router=nowhere:X", "model.moe.router=nowhere:X: there is no module nowhere"),
        ("data.name=elsewhere:", "data.name must be one of"),
        ("model.name=elsewhere.parts:X", "model.name must be one of"),
    ],
)
def test_a_wrong_name_is_one_sentence(elsewhere, tmp_path, capfd, option, sentence):
    with pytest.raises(SystemExit) as ended:
        run_main(train.main, ["digits_swin_moe", *QUICK, option, f"run.output={tmp_path}"])
    assert ended.value.code == 2
    assert sentence in capfd.readouterr().err
