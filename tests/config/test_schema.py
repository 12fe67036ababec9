"""What Config refuses about a batch in a world of so many ranks."""

import dataclasses
import typing

import pytest

from swin_moe.config import Config, DataConfig, ModelConfig, MoEConfig
from swin_moe.config.checks import RANGES
from swin_moe.config.io import apply_overrides, load_config
from swin_moe.parallel.exchange.payload import PAYLOADS
from swin_moe.parallel.exchange.transport import TRANSPORTS


@pytest.mark.parametrize(
    ("batch", "micro", "group", "world", "ranks"),
    [
        (32, 0, 8, 4, 1),  # one group a rank
        (32, 0, 4, 4, 1),
        (32, 0, 16, 4, 2),
        (32, 0, 32, 4, 4),
        (32, 4, 8, 4, 2),  # two accumulation steps
        (32, 0, 32, 1, 1),
    ],
)
def test_routing_groups_may_span_ranks(batch, micro, group, world, ranks):
    moe = MoEConfig(blocks=((0,),), capacity_scope="images", group_images=group)
    config = Config(data=DataConfig(global_batch=batch, micro_batch=micro), model=ModelConfig(moe=moe))
    assert config.routing_ranks(world) == ranks


@pytest.mark.parametrize(
    ("batch", "micro", "group", "world", "sentence"),
    [
        (32, 0, 5, 4, "group_images=5 must divide the micro-batch of 8 images, or be 16 or 32 "),
        (
            24,
            0,
            16,
            3,
            "group_images=16 must divide the micro-batch of 8 images, or be 24 ",
        ),  # 3 ranks are not whole pairs
        (
            32,
            4,
            32,
            4,
            "group_images=32 must divide the micro-batch of 4 images, or be 8 or 16 ",
        ),  # two accumulation steps
        (32, 8, 16, 1, "group_images=16 must divide the micro-batch of 8 images; "),
    ],
)
def test_routing_groups_are_whole_ranks_of_one_micro_step(batch, micro, group, world, sentence):
    moe = MoEConfig(blocks=((0,),), capacity_scope="images", group_images=group)
    config = Config(data=DataConfig(global_batch=batch, micro_batch=micro), model=ModelConfig(moe=moe))
    with pytest.raises(ValueError, match=sentence):
        config.check(world)


def test_evaluation_of_a_group_that_spans_ranks_is_by_need():
    moe = MoEConfig(blocks=((0,),), capacity_scope="images", group_images=32, eval_capacity_factor=1.25)
    config = Config(data=DataConfig(global_batch=32), model=ModelConfig(moe=moe))
    config.check(1)
    with pytest.raises(ValueError, match="eval_capacity_factor=1.25 must be 0"):
        config.check(2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"scores": "sigmoid"},
            "balance_loss must be gshard or none with model.moe.scores=sigmoid .*'load_importance'",
        ),
        ({"choice": "expert"}, "balance_loss must be none with model.moe.choice=expert"),
        (
            {"choice": "expert", "balance_loss": "none", "top_k": 2, "normalize_gate": True},
            "normalize_gate must be false",
        ),
        ({"choice": "expert", "balance_loss": "none", "capacity_factor": 0.0}, "capacity_factor must be > 0 with"),
        (
            {"choice": "expert", "balance_loss": "none", "eval_capacity_factor": -1.0},
            "eval_capacity_factor must be >= 0",
        ),
        (
            {"choice": "soft", "balance_loss": "none", "top_k": 2},
            "top_k must be 1 with model.moe.choice=soft .*slots sets",
        ),
        ({"choice": "soft", "balance_loss": "none", "scores": "sigmoid"}, "scores must be softmax with"),
        ({"slots": 2}, "slots must be 1 with model.moe.choice=token"),
        ({"bias_rate": 0.1}, "bias_rate must be 0.0 with model.moe.scores=softmax"),
        ({"bias_rate": -0.1, "scores": "sigmoid", "balance_loss": "none"}, "bias_rate must be >= 0"),
        (
            {"balance_loss": "none", "balance_scope": "global"},
            "balance_scope must be group with model.moe.balance_loss=no",
        ),
        ({"expert_groups": 3}, "expert_groups must be a divisor of model.moe.num_experts=8, got 3"),
        ({"expert_groups": 4, "group_limit": 5}, r"group_limit must be in \[1, 4\] groups, or 0 for no limit, got 5"),
        (
            {"expert_groups": 4, "group_limit": 1, "top_k": 3, "balance_loss": "gshard"},
            "top_k must be at most 2, the expe",
        ),
        ({"expert_groups": 4, "group_limit": 2}, "balance_loss must be gshard or none with model.moe.group_limit"),
        ({"shared_experts": -1}, "shared_experts must be >= 0"),
        ({"z_loss_weight": -1.0}, "z_loss_weight must be >= 0"),
        ({"choice": "tokens"}, "choice must be one of token, expert, soft, got 'tokens'"),
    ],
)
def test_routing_options_that_contradict_each_other(options, sentence):
    with pytest.raises(ValueError, match=f"model.moe.{sentence}"):
        MoEConfig(**options)


def test_groups_of_experts_that_choose_stay_on_a_rank_and_those_of_soft_moe_are_images():
    groups = {"blocks": ((0,),), "balance_loss": "none", "capacity_scope": "images", "group_images": 16}
    for choice in ("expert", "soft"):
        config = Config(data=DataConfig(global_batch=32), model=ModelConfig(moe=MoEConfig(choice=choice, **groups)))
        config.check(2)
        if choice == "soft":
            assert config.routing_ranks(4) == 1
        else:
            with pytest.raises(ValueError, match="group_images=16 must fit one rank's micro-batch of 8 images with"):
                config.check(4)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("transport", "pigeon", "model.moe.transport must be one of linear, hierarchical, got 'pigeon'"),
        ("payload", "int4", "model.moe.payload must be one of none, bf16, fp8, got 'int4'"),
        ("overlap", 0, "model.moe.overlap must be >= 1, got 0"),
        ("tune", "guess", "model.moe.tune must be one of off, measure, got 'guess'"),
    ],
)
def test_what_rows_may_travel_through(key, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        MoEConfig(**{key: value})


def test_every_payload_of_the_table_can_be_asked_for():
    for name in PAYLOADS:
        MoEConfig(payload=name)
    for name in TRANSPORTS:
        MoEConfig(transport=name)


def numbers(section: object, prefix: str = ""):
    """Yields (key, section, field name) of every numeric option."""
    for name, kind in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{prefix}{name}.")
        elif (
            "Literal" not in str(kind)
            and any(w in str(kind) for w in ("int", "float"))
            or prefix + name == "parallel.zero"
        ):
            yield prefix + name, section, name


NUMBERS = {key: (section, name) for key, section, name in numbers(Config())}
ANY_NUMBER = {
    "model.moe.capacity_factor",
    "model.moe.eval_capacity_factor",
    "model.qk_scale",
    "model.post_norm_init",
}


def test_every_numeric_option_has_a_range():
    assert NUMBERS.keys() == RANGES.keys()


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_out_of_range_are_refused_by_name(key):
    section, name = NUMBERS[key]
    value = getattr(section, name)
    for wrong in (float("nan"), float("inf"), -float("inf"), "x", *(() if key in ANY_NUMBER else (-7, -1e9))):
        depth = key in ("model.moe.blocks",)
        item = ((wrong,),) if depth else tuple(wrong for _ in value) or (wrong,) if isinstance(value, tuple) else wrong
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            dataclasses.replace(section, **{name: item})


@pytest.mark.parametrize(
    "option",
    (
        "model.num_classes=-1 model.patch_size=0 model.patch_size=300 model.embed_dim=0 model.mlp_ratio=-1 "
        "engine.threads=-1 engine.threads=99999999 checkpoint.file_size=0 model.drop_rate=1.0 model.drop_rate=-0.5 "
        "optim.weight_decay=-1 model.extra_norm_every=-1 model.depths=[2,-1,2,2] model.init_std=-1 run.name=../../x "
        "run.name= run.name=. run.name=/tmp/x run.name=a/../../b run.name=a\0b run.output= optim.betas=[0.9,1.0] "
        "data.synthetic_samples=0 log.eval_every=-1 "
        f"run.name={'x' * 256} run.name=a/{'é' * 128} run.output=/tmp/{'x' * 256}"
    ).split(),
)
def test_what_was_accepted_once(option):
    with pytest.raises(ValueError, match=option.partition("=")[0].replace(".", r"\.")):
        apply_overrides(Config(), [option])


@pytest.mark.parametrize("option", ["model.num_classes=0", "model.in_chans=1"])
def test_what_no_data_set_can_train(option):
    config = apply_overrides(Config(), [option])
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        config.check(1)


def test_a_tilde_after_the_equals_sign_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config("digits_swin_moe", ["data.path=~/photos", "run.output=~", "checkpoint.init=~/a.pth"])
    assert (config.data.path, config.run.output, config.checkpoint.init) == (
        "/home/me/photos",
        "/home/me",
        "/home/me/a.pth",
    )
    assert apply_overrides(config, ["run.name=sweep/lr1"]).run.name == "sweep/lr1"
    longest = f"{'x' * 255}/{'é' * 127}"
    assert apply_overrides(config, [f"run.name={longest}"]).run.name == longest


def test_the_only_near_batch_is_said_once():
    config = Config(data=DataConfig(global_batch=16, micro_batch=9))
    with pytest.raises(ValueError, match="the nearest that is: 18$"):
        config.accumulation(2)
    with pytest.raises(ValueError, match="nearest batches that are: 18 and 36$"):
        Config(data=DataConfig(global_batch=20, micro_batch=9)).accumulation(2)


def test_a_key_written_out_is_answered_with_its_initials():
    with pytest.raises(ValueError, match="did you mean optim.lr"):
        load_config("digits_swin_moe", ["optim.learning_rate=1"])
