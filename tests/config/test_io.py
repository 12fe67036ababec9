"""YAML, inheritance, overrides and what a user is told when one of them is wrong."""

import re
from pathlib import Path

import numpy as np
import pytest

from swin_moe.config import Config
from swin_moe.config.io import apply_overrides, config_folder, dump_config, find_config, load_config


def write(folder: Path, **files: str) -> Path:
    """Returns the first of the files written: name -> YAML text."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


def test_bases_merge_key_by_key_and_overrides_win(tmp_path):
    path = write(
        tmp_path,
        top="base: [one, two.yaml]\nmodel: {moe: {top_k: 2}}\n",
        one="model: {embed_dim: 48, moe: {num_experts: 4}}\noptim: {lr: 1e-4, epochs: 5, warmup_epochs: 1}\n",
        two="base: one\noptim: {lr: 2e-4}\n",
    )
    config = load_config(path, ["optim.epochs=7"])
    assert (config.model.embed_dim, config.model.moe.num_experts, config.model.moe.top_k) == (48, 4, 2)
    assert (config.optim.lr, config.optim.epochs, config.optim.warmup_epochs) == (2e-4, 7.0, 1.0)
    assert config.run.name == "top"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=1e-4", "optim", "lr", 1e-4),
        ("optim.epochs=30", "optim", "epochs", 30.0),
        ("data.global_batch=1e3", "data", "global_batch", 1000),
        ("data.drop_last=false", "data", "drop_last", False),
        ("data.drop_last=no", "data", "drop_last", False),
        ("model.img_size=64", "model", "img_size", (64, 64)),
        ("model.img_size=[64, 96]", "model", "img_size", (64, 96)),
        ("optim.milestones=700", "optim", "milestones", (700.0,)),
        ("model.qk_scale=null", "model", "qk_scale", None),
        ("model.qk_scale=0.5", "model", "qk_scale", 0.5),
        ("run.name=007", "run", "name", "007"),
        ("run.name=a=b: [c", "run", "name", "a=b: [c"),
        ("checkpoint.load=", "checkpoint", "load", ""),
        ("engine.offload=none", "engine", "offload", "none"),
        ("log.tensorboard=off", "log", "tensorboard", False),
    ],
)
def test_overrides_take_the_type_of_their_field(override, section, key, value):
    got = getattr(getattr(apply_overrides(Config(), [override]), section), key)
    assert got == value
    assert type(got) is type(value)


def test_words_of_yaml_1_1_stay_words(tmp_path):
    path = write(tmp_path, a='model: {moe: {tune: off}}\ndata: {auto_augment: "", hflip: .5, micro_batch: 010}\n')
    config = load_config(path)
    assert config.model.moe.tune == "off"
    assert config.data.micro_batch == 10


def test_nested_tuples_and_sections():
    config = apply_overrides(
        Config(), ["model.moe={blocks: [[], [1], [1, 3], [-1]], top_k: 2}", "model.moe.num_experts=4"]
    )
    assert config.model.moe.blocks == ((), (1,), (1, 3), (-1,))
    assert (config.model.moe.top_k, config.model.moe.num_experts) == (2, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: {lrr: 1}", ["a.yaml", "optim.lrr", "did you mean", "optim.lr"]),
        ("optm: {lr: 1}", ["a.yaml", "'optm'", "did you mean optim"]),
        ("lr: 1", ["'lr'", "optim.lr"]),
        ("optim: {lr: fast}", ["a.yaml", "optim.lr must be a number, got 'fast'"]),
        ("optim: {lr: true}", ["optim.lr must be a number"]),
        ("optim: {lr: nan}", ["optim.lr must be a number"]),
        ("optim: 3", ["optim is a section"]),
        ("optim: {lr: {x: 1}}", ["optim.lr must be a number"]),
        ("data: {workers: 1.5}", ["data.workers must be a whole number, got 1.5"]),
        ("data: {drop_last: 2}", ["data.drop_last must be true or false"]),
        ("data: {drop_last: null}", ["data.drop_last must be true or false"]),
        ("data: {crop_scale: [1, 1, 1]}", ["data.crop_scale", "list of 2"]),
        ("run: {name: 1}", ["run.name must be text"]),
        ("model: {moe: {blocks: [1]}}", ["model.moe.blocks", "list of lists"]),
        ("model: {moe: {router: cosin}}", ["model.moe.router must be one of linear, cosine, got 'cosin'"]),
        ("parallel: {zero: 7}", ["parallel.zero must be one of 0, 1, 2, 3, got 7"]),
        ("optim: {lr: -1}", ["a.yaml", "optim.lr must be >= 0"]),
        ("optim: {lr: 1}\noptim: {eps: 1}", ["a.yaml", "'optim' stands twice"]),
        ("optim: {lr: 1", ["a.yaml is not a YAML file"]),
        ("- 1", ["a.yaml must hold sections"]),
        ("base: 3", ["base must be"]),
        ("base: nowhere_else", ["no config file or config name 'nowhere_else'"]),
        ("base: a", ["cycle: a.yaml -> a.yaml"]),
    ],
)
def test_errors_name_file_key_value_and_what_is_allowed(tmp_path, text, said):
    path = write(tmp_path, a=text)
    with pytest.raises(ValueError) as error:
        load_config(path)
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr", "section.key=value"),
        ("optim.leer=1", "did you mean"),
        ("TRAIN.BASE_LR=1", "here it is optim.lr"),
        ("optim.lr=x", "command line: optim.lr must be a number, got 'x'"),
        ("optim.lr.x=1", "unknown key"),
        (f"optim.lr={10**400}", "optim.lr must be a number, got a number of too many digits"),
        (f"run.seed={10**400}", "run.seed must be a whole number, got a number of too many digits"),
        (f"optim.lr={'1' * 5000}", "command line: optim.lr must be a number, got '111"),
    ],
)
def test_errors_of_overrides(override, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        apply_overrides(Config(), [override])


@pytest.mark.parametrize(
    ("text", "overrides", "blamed"),
    [
        ("optim: {epochs: 5, warmup_epochs: 2}", ["optim.lr=-1"], "command line: optim.lr must be >= 0, got -1.0"),
        ("optim: {lr: -1}", ["optim.epochs=30"], "{path}: optim.lr must be >= 0, got -1.0"),
        ("optim: {lr: -1}", ["optim.lr=-2"], "command line: optim.lr must be >= 0, got -2.0"),
        ("optim: {lr: -1}", [], "{path}: optim.lr must be >= 0, got -1.0"),
        (
            "optim: {epochs: 5, warmup_epochs: 2}",
            ["optim.epochs=1"],
            "{path} with optim.epochs from the command line: optim.warmup_epochs must be in [0, 1.0], got 2.0",
        ),
        (
            "model: {num_heads: [3, 6, 12, 24]}",
            ["model.num_heads=[3,5,12,24]"],
            "command line: model.num_heads[1] must be a divisor of 192 channels, got 5",
        ),
    ],
)
def test_an_error_is_blamed_on_what_made_it(tmp_path, text, overrides, blamed):
    path = write(tmp_path, a=text)
    with pytest.raises(ValueError) as error:
        load_config(path, overrides)
    assert str(error.value) == blamed.format(path=path)


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("optim.lrr", "optim.lr"),
        ("data.batch_size", "data.global_batch"),
        ("data.global_batchh", "data.global_batch"),
        ("model.nam", "model.name"),
        ("lr", "optim.lr"),
        ("model.top_k", "model.moe.top_k"),
        ("optim.weight_decy", "optim.weight_decay"),
        ("opitm.lr", "optim.lr"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_right_one_first(key, first):
    with pytest.raises(ValueError, match=rf"unknown key '{key}'; did you mean {re.escape(first)}\b"):
        apply_overrides(Config(), [f"{key}=1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--opts", "TRAIN.BASE_LR", "1e-3"],
            "--opts is an option of the official scripts; options are key=value words",
        ),
        (["--batch-size", "64"], "data.global_batch=N"),
        (["--batch_size=64"], "data.global_batch=N"),
        (["--eval"], "swin-moe evaluate"),
        (["--throughput"], "swin-moe throughput"),
        (["--zip"], "data.name=zip"),
        (["--cache-mode", "part"], "operating system's cache"),
        (["--resume=a.pth"], "checkpoint.load"),
        (["--fast"], "unknown option '--fast': options are key=value words"),
        (["--bach-size=8"], "did you mean the official scripts' --batch-size"),
        (["DATA.BATCH_SIZE=8"], "here it is data.global_batch, data.micro_batch"),
        (["TRAIN.AUTO_RESUME=false"], "here it is checkpoint.resume"),
        (["DATA.CACHE_MODE=full"], "not offered here: samples are drawn in one global order"),
        (["EVAL_MODE=true"], "swin-moe evaluate"),
    ],
)
def test_words_of_the_official_command_line_are_answered(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load_config("digits_swin_moe", words)


def test_the_official_form_of_naming_a_config_is_answered():
    with pytest.raises(ValueError, match="--cfg is an option of the official scripts; the config comes first"):
        load_config("--cfg", ["a.yaml"])


def test_a_longer_cycle_is_named(tmp_path):
    path = write(tmp_path, a="base: b", b="base: c", c="base: a")
    with pytest.raises(ValueError, match="a.yaml -> b.yaml -> c.yaml -> a.yaml"):
        load_config(path)


def test_a_dumped_config_reloads_equal(tmp_path):
    for name in ("digits_swin_moe", "swinv2_giant_3b_patch4_window12_192_simmim"):
        config = load_config(name, ["run.name=off", "optim.eps=1e-8", "model.moe.eval_capacity_factor=null"])
        dump_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


def test_names_find_files_in_any_folder(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    assert find_config(name) == config_folder() / "swin" / f"{name}.yaml"
    assert find_config(f"swin/{name}.yaml") == find_config(name)
    with pytest.raises(ValueError, match=f"did you mean .*{name}"):
        find_config("swin_tiny_patch4_windows7_224")


@pytest.mark.parametrize("name", ["does/not/exist.yaml", "/", "configs", ""])
def test_an_unknown_path_says_so(name):
    with pytest.raises(ValueError, match="no config"):
        load_config(name)


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_config_is_written_to_a_file(path):
    with pytest.raises(ValueError, match="dump_config: the path must be a file's"):
        dump_config(Config(), path)


@pytest.mark.parametrize("overrides", ["optim.lr=1", 3, None, np.ones(()), object()])
def test_overrides_that_are_no_list_are_refused(overrides):
    for call in (lambda: apply_overrides(Config(), overrides), lambda: load_config("digits_dense", overrides)):
        with pytest.raises(TypeError, match="overrides must be a list of texts such as 'optim.lr=0.1', got"):
            call()
