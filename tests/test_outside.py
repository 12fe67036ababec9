"""What lives outside this repository is named as package.module:Name: a task, a router, a data set, an engine, a
dispatcher, a format. What lacks a member of its protocol is refused at start, with the member's name."""

import sys

import numpy as np
import pytest

from checkpoint_tools.__main__ import main as checkpoint
from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options
from swin_moe import train
from swin_moe.config.io import load_config
from swin_moe.layout import Chunk
from swin_moe.run.session import run_main
from tests.training.test_commands import QUICK

CODE = '''
from pathlib import Path

import numpy as np
import torch
from checkpoint_tools.sources.base import SourceTensor
from swin_moe.data.sets.digits import Digits
from swin_moe.engine.base import Serves
from swin_moe.engine.replicated import ReplicatedEngine
from swin_moe.moe.dispatch import LocalDispatcher
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

    serves = Serves(clip=True, ema=True)

    def __init__(self, model, *, config, groups, schedule, device):
        self._engine = ReplicatedEngine(model, config=config, groups=groups, schedule=schedule, device=device)

    def __getattr__(self, name):
        if name in ("autocast", "discard_gradients"):
            raise AttributeError(name)
        return getattr(self._engine, name)


class OwnEngine(ReplicatedEngine):
    serves = Serves(clip=True, ema=True)

    def step(self, t):
        seen.append("engine")
        return super().step(t)


class Noting(LocalDispatcher):
    def dispatch(self, x, routing, pair):
        seen.append("dispatcher")
        return super().dispatch(x, routing, pair)


class OneWay:
    """A dispatcher from which no rows come back."""

    dispatch = LocalDispatcher.dispatch


def noting(groups, num_experts, link):
    return Noting()


def one_way(groups, num_experts, link):
    return OneWay()


class Numbers:
    """A source that derives from nothing of ours: a text file of one tensor."""

    format = "numbers"
    has_digests, step, step_unknown = False, 0, False

    def __init__(self, path, options):
        self.path, self.files, self.described = path, [path], str(path)
        self.values = np.array(path.read_text().split(), np.float32)
        self.tensors = {"head.bias": SourceTensor(self.values.shape, "F32")}
        self.state, self.config, self.provenance = {}, {}, {}

    def read(self, name, box, destination):
        destination[...] = self.values.view(np.uint32)[(*box.within(type(box).whole(self.values.shape)), ...)]

    def locate(self, name, box):
        return str(self.path), 4 * box.offset[0]

    def read_bytes(self, name, box):
        return 4 * box.numel

    def identity(self):
        return self.values.tolist()

    def num_chunks(self, name):
        return 1

    def find_problems(self):
        return []

    def find_wrong_data(self, options, advance):
        return None

    def close(self):
        seen.append("source")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Unreadable(Numbers):
    """As Numbers, without what says where to read first."""

    def __getattribute__(self, name):
        if name in ("locate", "step"):
            raise AttributeError(name)
        return super().__getattribute__(name)


class Silent(ReplicatedEngine):
    pass
'''
OPTIONS = {
    "task": "task.name=elsewhere.parts:Halved",
    "router": "model.moe.router=elsewhere.parts:Negated",
    "data": "data.name=elsewhere.parts:FewDigits",
    "engine": "engine.name=elsewhere.parts:OwnEngine",
    "dispatcher": "model.moe.backend=elsewhere.parts:noting",
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


def test_all_five_train_together_and_continue(elsewhere, tmp_path):
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
            "Foreign lacks teacher, higher_is_better, needs_partners, needs_views, needs_boxes, "
            "needs_label_maps, changes_weights, needs_teacher, "
            "build_network, connect, weigh, evaluate, after_step, pictures (",
        ),
        ("task.name=elsewhere.parts:seen", "lacks"),
        ("engine.name=elsewhere.parts:X", "engine.name=elsewhere.parts:X: the module elsewhere.parts has no X"),
        (
            "engine.name=elsewhere.parts:Unfinished",
            "engine.name=elsewhere.parts:Unfinished: Unfinished lacks autocast, discard_gradients",
        ),
        (
            "model.moe.backend=elsewhere.parts:one_way",
            "model.moe.backend=elsewhere.parts:one_way: OneWay lacks combine",
        ),
        (
            "engine.name=elsewhere.parts:Silent",
            "engine.name=elsewhere.parts:Silent does not run optim.clip_norm=0.5: it",
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


def test_a_checkpoint_of_a_format_from_outside_is_converted(elsewhere, tmp_path, capsys):
    (tmp_path / "numbers.txt").write_text("1 2.5 -3")
    words = ["convert", str(tmp_path / "numbers.txt"), str(tmp_path / "out"), "--to", "native"]
    assert checkpoint([*words, "--from", "elsewhere.parts:Numbers"]) == 0
    assert elsewhere() == ["source"]
    with open_source(tmp_path / "out", Options()) as source:
        found = np.empty(3, np.uint32)
        source.read("head.bias", Chunk((0,), (3,)), found)
    assert found.view(np.float32).tolist() == [1, 2.5, -3]


def test_a_format_from_outside_that_lacks_members_is_refused(elsewhere, tmp_path, capsys):
    (tmp_path / "numbers.txt").write_text("1")
    words = ["inspect", str(tmp_path / "numbers.txt"), "--from"]
    for name, sentence in (
        ("elsewhere.parts:Unreadable", "--from elsewhere.parts:Unreadable: Unreadable lacks step, locate"),
        ("elsewhere.parts:X", "--from=elsewhere.parts:X: the module elsewhere.parts has no X"),
        ("nothing", "invalid choice: 'nothing' (choose from 'dcp', "),
    ):
        assert checkpoint([*words, name]) == 2
        assert sentence in capsys.readouterr().err
