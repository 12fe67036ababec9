"""Options of tasks: in sections, by the names they had beside task.name, and those of a task from elsewhere."""

import copy
import dataclasses
import pickle
import sys

import pytest

from swin_moe.config import ClassifyOptions, Config, SimMIMOptions, TaskConfig
from swin_moe.config.io import apply_overrides, config_from_tree, dump_config, load_config
from swin_moe.config.state import canonical_config
from swin_moe.config.tasks import MOVED, SECTIONS

CODE = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swin_moe.config.checks import check
from swin_moe.config.tasks import TaskOptions
from swin_moe.tasks.classify import Classify


@dataclass(frozen=True)
class Options(TaskOptions):
    depth: int = 2
    sizes: tuple[int, ...] = (1,)
    kind: Literal["a", "b"] = "a"
    tag: str = ""

    def check(self, config, *, forwards):
        check(self.depth <= config.model.depths[0], "task.own.depth", self.depth, "at most model.depths[0]")


class Deep(Classify):
    Options = Options


class Plain(Classify):
    pass


class Wrong(Classify):
    Options = dict
"""
DEEP = "task.name=own_task:Deep"


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_task", None)


def write(folder, text):
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


def test_every_option_that_moved_is_one_of_its_section():
    assert len(MOVED) == 19 and {"classify", "soft_teacher"} < SECTIONS.keys() and "own" not in SECTIONS
    for section, kind in SECTIONS.items():
        assert kind.section == section and type(getattr(TaskConfig(), section)) is kind
        names = {f.name for f in dataclasses.fields(kind)}
        assert {key for key, place in MOVED.items() if place == section} <= names


@pytest.mark.parametrize("key", MOVED)
def test_old_places_are_read_everywhere(key, tmp_path):
    section = MOVED[key]
    default = getattr(getattr(TaskConfig(), section), key)
    value = {bool: True, str: "fp16" if key.endswith("precision") else "x", int: 5, float: 0.25}[type(default)]
    expected = dataclasses.replace(Config(), task=TaskConfig(**{key: value}))
    assert getattr(getattr(expected.task, section), key) == getattr(expected.task, key) == value != default
    assert load_config(write(tmp_path, f"run: {{name: run}}\ntask: {{{key}: {value}}}")) == expected
    assert load_config(write(tmp_path, f"run: {{name: run}}\ntask: {{{section}: {{{key}: {value}}}}}")) == expected
    assert apply_overrides(Config(), [f"task.{key}={value}"]) == expected
    assert apply_overrides(Config(), [f"task.{section}.{key}={value}"]) == expected
    assert config_from_tree({"task": {key: value}}, source="x") == expected
    assert dataclasses.replace(Config().task, **{key: value}) == expected.task


def test_one_place_overrides_the_other(tmp_path):
    write(tmp_path, "task: {mixup: 0.3, classify: {cutmix: 0.2}}")
    above = tmp_path / "above.yaml"
    above.write_text("base: mine.yaml\ntask: {classify: {mixup: 0.4}, cutmix: 0.1}")
    assert load_config(above).task.classify == ClassifyOptions(mixup=0.4, cutmix=0.1)
    options = load_config(above, ["task.mixup=0.5", "task.classify.cutmix=0.6", "task.classify.mixup=0.5"])
    assert options.task.classify == ClassifyOptions(mixup=0.5, cutmix=0.6)


def test_two_values_of_one_option_are_refused(tmp_path):
    said = "task.mixup=0.3 and task.classify.mixup=0.4 are one option; leave out the first, which is its old name"
    path = write(tmp_path, "task: {mixup: 0.3, classify: {mixup: 0.4}}")
    for call, source in (
        (lambda: load_config(path), path),
        (lambda: apply_overrides(Config(), ["task.mixup=0.3", "task.classify.mixup=0.4"]), "command line"),
        (lambda: apply_overrides(Config(), ["task.classify.mixup=0.4", "task.mixup=0.3"]), "command line"),
        (lambda: config_from_tree({"task": {"classify": {"mixup": 0.4}, "mixup": 0.3}}, source="stored"), "stored"),
    ):
        with pytest.raises(ValueError) as refused:
            call()
        assert str(refused.value) == f"{source}: {said}"
    assert load_config(write(tmp_path, "task: {mixup: 0.4, classify: {mixup: 0.4}}")).task.classify.mixup == 0.4


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("task.mask_rato=0.5", r"unknown key 'task.mask_rato'; did you mean task\.simmim\.mask_ratio"),
        ("task.classify.mask_ratio=0.5", r"unknown key 'task.classify.mask_ratio'; did you mean task\.simmim\.mask_r"),
        ("task.mask_ratio=2", r"task\.simmim\.mask_ratio must be in \(0, 1\), got 2\.0"),
        ("task.simmim=3", r"task\.simmim is a section of keys, got 3"),
        ("task.own.mixup=1", r"unknown key 'task\.own\.mixup'; did you mean task\.classify\.mixup"),
        ("task.own=1", r"task\.own is a section of keys, got 1"),
    ],
)
def test_wrong_words_are_one_sentence(word, said):
    with pytest.raises(ValueError, match=said):
        apply_overrides(Config(), [word])


def test_the_python_class_has_names_old_and_new():
    task = TaskConfig("simmim", simmim=SimMIMOptions(mask_ratio=0.5), pictures=2)
    assert task.simmim == SimMIMOptions(mask_ratio=0.5, pictures=2) and task.options is task.simmim
    assert pickle.loads(pickle.dumps(task)) == copy.deepcopy(task) == task and hash(task) == hash(copy.copy(task))
    with pytest.raises(AttributeError, match="no option nope"):
        task.nope  # noqa: B018
    with pytest.raises(TypeError, match="no option nope"):
        TaskConfig(nope=1)
    with pytest.raises(ValueError, match="task.simmim must be a SimMIMOptions, got 3"):
        TaskConfig(simmim=3, pictures=2)


def test_what_is_of_a_host_is_no_state():
    words = [f"task.{name}" for name in ("teacher=x", "teacher_shard=true", "pictures=9", "mask_ratio=0.5")]
    tree = canonical_config(dataclasses.asdict(apply_overrides(Config(), words)))
    assert tree["task"]["simmim"] == {"mask_patch_size": 32, "mask_ratio": 0.5, "target_window": 0}
    assert set(tree["task"]["distill"]) == {"teacher_model", "teacher_precision", "smooth_l1_beta"}


def test_a_task_from_elsewhere_brings_options(own_task, tmp_path):
    path = write(tmp_path, "task: {name: 'own_task:Deep', own: {depth: 1, sizes: [2, 3]}}")
    config = load_config(path, ["task.own.tag=007", "task.own.kind=b"])
    own = config.task.own
    assert (own.depth, own.sizes, own.kind, own.tag) == (1, (2, 3), "b", "007") and config.task.options is own
    config.check(1)
    dump_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml", ["run.name=mine"]) == config
    assert config_from_tree(dataclasses.asdict(config), source="stored") == config
    assert apply_overrides(config, ["task.own.depth=2"]).task.own == dataclasses.replace(own, depth=2)
    assert load_config("digits_dense", [DEEP]).task.own.depth == 2
    assert load_config("digits_dense", ["task.name=own_task:Plain"]).task.own == Config().task.own


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.own.dept=3"], "unknown key 'task.own.dept'; did you mean task.own.depth"),
        (["task.own.depth=x"], "command line: task.own.depth must be a whole number, got 'x'"),
        (["task.own.sizes=[a]"], "command line: task.own.sizes must be a list, each item a whole number"),
        (["task.own.kind=c"], "command line: task.own.kind must be one of a, b, got 'c'"),
        (["task.name=own_task:Wrong"], "own_task:Wrong: its Options must be a dataclass derived from TaskOptions"),
        (["task.name=own_task:None", "task.own.depth=3"], "the module own_task has no None"),
        (["task.name=classify", "task.own.depth=3"], "unknown key 'task.own.depth'"),
    ],
)
def test_wrong_options_of_a_task_from_elsewhere(own_task, words, said):
    with pytest.raises(ValueError) as refused:
        load_config("digits_dense", [DEEP, *words]).task.own  # noqa: B018
    assert said in str(refused.value)


def test_a_task_from_elsewhere_checks_its_options(own_task):
    with pytest.raises(ValueError, match=r"task.own.depth must be at most model.depths\[0\], got 9"):
        load_config("digits_dense", [DEEP, "task.own.depth=9"]).check(1)


def test_the_rest_of_a_config_is_read_without_its_task():
    config = config_from_tree({"task": {"name": "not_here:Task"}, "model": {"num_classes": 7}}, source="stored")
    assert config.model.num_classes == 7
    with pytest.raises(ValueError, match="stored: .*there is no module not_here"):
        config_from_tree({"task": {"name": "not_here:Task", "own": {"depth": 1}}}, source="stored")
