"""What engines of other libraries refuse, in which words, and before anything starts."""

from dataclasses import fields

import pytest

from swin_moe.config.io import load_config
from swin_moe.engine.base import ENGINES, SERVES, Serves
from swin_moe.engine.limits import check_engine, serves_of


def config(*options: str):
    return load_config("digits_swin_moe", ["model.moe.num_experts=4", *options])


@pytest.mark.parametrize(
    ("options", "world", "sentence"),
    [
        (["engine.name=deepspeed"], 2, "engine.name=deepspeed does not run parallel.zero=0: .*allowed: 1, 2, 3"),
        (["engine.name=deepspeed", "parallel.zero=1", "engine.precision=fp64"], 2, "engine.precision=fp64: .*float32"),
        (
            ["engine.name=deepspeed", "parallel.zero=3", "parallel.expert=3"],
            3,
            "num_experts=4 is not a multiple of parallel.expert=3",
        ),
        (
            ["engine.name=deepspeed", "parallel.zero=2", "parallel.expert=1", "parallel.expert_shard=5"],
            5,
            "channels in stage . are not a multiple of parallel.expert_shard=5",
        ),
        (["engine.name=deepspeed", "parallel.zero=2", "engine.offload=parameters"], 2, "parallel.zero=3, got .*zero=2"),
        (["parallel.zero=3", "engine.offload=parameters"], 2, "engine.offload=parameters needs engine.name=deepspeed"),
        (["engine.name=fairscale"], 2, "parallel.zero=0: only OSS .*allowed: 1, 2"),
        (["engine.name=fairscale", "parallel.zero=3"], 2, "parallel.zero=3: .*its FSDP .*use engine.name=torch"),
        (
            ["engine.name=fairscale", "parallel.zero=1", "engine.offload=optimizer"],
            2,
            "engine.offload=optimizer: its OffloadModel",
        ),
    ],
)
def test_refused_with_key_value_and_what_is_allowed(options, world, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_engine(config(*options), world)


@pytest.mark.parametrize(
    "options",
    [
        ["engine.name=deepspeed", "parallel.zero=3", "engine.offload=parameters"],
        ["engine.name=deepspeed", "parallel.zero=1", "engine.precision=fp16", "parallel.expert_shard=2"],
        ["engine.name=fairscale", "parallel.zero=2", "engine.precision=fp64", "model.moe.num_experts=3"],
        ["engine.name=torch", "parallel.zero=3", "engine.precision=fp64"],
    ],
)
def test_what_is_right_may_start(options):
    check_engine(config(*options), 2)


# What the least engine does not do, as options of a run; each with the field of Serves that lets it.
MORE = {
    "zero": ("parallel.zero=1", (0, 1)),
    "precision": ("engine.precision=bf16", ("fp32", "bf16")),
    "offload": ("engine.offload=optimizer", ("none", "optimizer")),
    "compile": ("parallel.compile=block", ("none", "block")),
    "recompute": ("parallel.recompute=block", ("none", "block")),
    "clip": ("optim.clip_norm=5.0", True),
    "ema": ("optim.ema=0.9", True),
    "accumulation": ("data.micro_batch=8", True),
    "changed_weights": ("task.name=moby", True),
    "uneven_experts": ("parallel.expert=3", True),
}


class Outside:
    """Stands for an engine of another place."""


@pytest.mark.parametrize("served", MORE)
def test_what_an_engine_does_not_name_is_refused_by_the_name_of_the_option(monkeypatch, served):
    option, values = MORE[served]
    name, world = f"{__name__}:Outside", 3 if served == "uneven_experts" else 1
    monkeypatch.setattr("swin_moe.engine.limits.lookup", lambda *_, **__: Outside)
    asked = config("optim.clip_norm=0", "data.global_batch=24", option, f"engine.name={name}")
    for others in ({}, {key: value for key, (_, value) in MORE.items() if key != served}):
        monkeypatch.setattr(Outside, "serves", Serves(**others), raising=False)
        with pytest.raises(ValueError, match=rf"engine.name={name} .*{option.partition('=')[0]}"):
            check_engine(asked, world)
    monkeypatch.setattr(Outside, "serves", Serves(**{served: values}))
    check_engine(asked, world)


def test_an_engine_that_says_nothing_gets_the_least(monkeypatch):
    monkeypatch.setattr("swin_moe.engine.limits.lookup", lambda *_, **__: Outside)
    assert serves_of("my.engines:Outside") == Serves()
    monkeypatch.setattr(Outside, "serves", {"precision": ("bf16",)}, raising=False)
    with pytest.raises(ValueError, match="engine.name=my.engines:Outside: its serves is .*allowed: .*Serves"):
        serves_of("my.engines:Outside")


def test_every_option_and_every_engine_of_ours_is_named():
    # `graphs` is asked for where training is recorded: tests/training/test_training_graphs.py.
    assert MORE.keys() == {field.name for field in fields(Serves)} - {"reasons", "graphs"}
    assert SERVES.keys() == ENGINES.keys()
