"""create_model: names, overrides, initial weights."""

import pytest
import torch
from torch import nn

from swin_moe import build_model, create_model
from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.config.variants import VARIANTS
from tests.models.reference import TINY

MOE = {"moe_blocks": [[-1], [1]], "num_experts": 4}


def test_a_family_has_the_official_defaults():
    with torch.device("meta"):
        config = create_model("swin_moe").config
    assert config == ModelConfig(name="swin_moe", moe=MoEConfig(balance_loss="gshard", eval_capacity_factor=None))


def test_official_arguments_become_config_fields():
    with torch.device("meta"):
        model = create_model(
            "swin_moe",
            img_size=(192, 96),
            patch_size=2,
            moe_blocks=[[-1], [1], [1, 3], []],
            top_value=2,
            num_experts=16,
            cosine_router=True,
            normalize_gate=True,
            use_bpr=False,
            is_gshard_loss=False,
            cosine_router_dim=64,
            cosine_router_init_t=0.25,
            moe_drop=0.1,
            gate_noise=2.0,
            capacity_factor=1.5,
            aux_loss_weight=0.1,
            use_checkpoint=True,
            norm_layer=nn.LayerNorm,
            fused_window_process=True,
        )
    assert model.recompute == "block"
    assert (model.config.img_size, model.config.patch_size) == ((192, 96), (2, 2))
    assert model.config.moe == MoEConfig(
        blocks=((-1,), (1,), (1, 3), ()),
        num_experts=16,
        top_k=2,
        capacity_factor=1.5,
        eval_capacity_factor=None,
        router="cosine",
        normalize_gate=True,
        batch_prioritized=False,
        aux_loss_weight=0.1,
        gate_noise=2.0,
        cosine_dim=64,
        cosine_init_t=0.25,
        dropout=0.1,
    )


def test_our_own_arguments():
    with torch.device("meta"):
        model = create_model("swinv2", eval_capacity_factor=0.5, extra_norm_every=2, post_norm_init=1e-5, blocks=[[1]])
    assert (model.config.moe.eval_capacity_factor, model.config.moe.blocks) == (0.5, ((1,),))
    assert (model.config.extra_norm_every, model.config.post_norm_init) == (2, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_sise": 7}, "no argument 'window_sise'; did you mean 'window_size'?"),
        ({"num_local_experts": 1}, "give num_experts, the global number of experts"),
        ({"norm_layer": nn.BatchNorm2d}, "norm_layer must be torch.nn.LayerNorm"),
        ({"depths": [2, 2], "num_heads": [3]}, "model.num_heads must be 2 numbers"),
        ({"name_": 1}, "no argument 'name_'"),
        ({"is_gshard_loss": torch.ones(2)}, "create_model: is_gshard_loss must be true or false, got tensor"),
        ({"cosine_router": "linear"}, "create_model: cosine_router must be true or false, got 'linear'"),
        ({"use_checkpoint": "no"}, "create_model: use_checkpoint must be true or false, got 'no'"),
        ({"drop_rate": torch.ones((), device="meta")}, "model.drop_rate must be a number, got tensor"),
        ({"window_size": 10**400}, "model.window_size must be .* got a number of too many digits"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        create_model("swin", **arguments)


def test_recompute_is_checked():
    with pytest.raises(ValueError, match="recompute must be none or block, got 'stage'"), torch.device("meta"):
        build_model(ModelConfig(), recompute="stage")


@pytest.mark.parametrize("family", VARIANTS)
def test_initial_weights_are_a_function_of_seed_and_name(family):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = create_model(family, **TINY, **MOE, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "building a model must not draw from the global generator"
    torch.manual_seed(2)
    again = create_model(family, **TINY, **MOE, seed=5).state_dict()
    assert all(torch.equal(first[n], again[n]) for n in first)
    other = create_model(family, **TINY, **MOE, seed=6).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])
    # A deeper network with more experts starts with the same values wherever names agree.
    deeper = create_model(family, **{**TINY, "depths": [3, 2]}, **{**MOE, "num_experts": 8}, seed=5).state_dict()
    for name in first:
        if ".router." not in name:
            assert torch.equal(first[name], deeper[name][: len(first[name])]), name


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_every_parameter_is_initialized(family, router):
    model = create_model(family, **TINY, **MOE, router=router, ape=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights(0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_initial_values_follow_the_official_rules():
    model = create_model("swin_moe", init_std=0.005, seed=1)
    assert model.head.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert not model.head.bias.any()
    bound = 48**-0.5
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.patch_embed.proj.bias.any()
    block = create_model("swinv2", **TINY, post_norm_init=1e-5, extra_norm_every=1).layers[0].blocks[0]
    for norm in (block.norm1, block.norm2):
        assert torch.equal(norm.weight, torch.full((8,), 1e-5)) and torch.equal(norm.bias, torch.full((8,), 1e-5))
    assert torch.equal(block.enorm.weight, torch.ones(8))
    assert torch.equal(block.attn.logit_scale, torch.full((2, 1, 1), 10.0).log())
    assert not block.attn.q_bias.any()


def test_meta_stays_meta_and_needs_no_process_group():
    with torch.device("meta"):
        model = create_model("swin_moe", **TINY, **MOE)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())


def test_a_config_name():
    with torch.device("meta"):
        model = create_model("swin_moe_small_patch4_window12_192_8expert_32gpu_22k", num_classes=10)
    assert (model.config.moe.num_experts, model.config.window_size, model.num_classes) == (8, 12, 10)
    assert model.config.moe.eval_capacity_factor is None
    with pytest.raises(ValueError, match="swin_tini"):
        create_model("swin_tini_patch4_window7_224")


def test_a_file_is_a_model(tmp_path, monkeypatch):
    sizes = "img_size: 16, patch_size: 2, embed_dim: 8, depths: [1], num_heads: [1], window_size: 4"
    text = f"model: {{name: swinv2, {sizes}}}"
    (tmp_path / "small.yaml").write_text(text)
    assert create_model(str(tmp_path / "small.yaml"), num_classes=3).config.embed_dim == 8
    monkeypatch.chdir(tmp_path)
    assert create_model("small.yaml").config.name == "swinv2"


SMALL = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "window_size": 4, "num_classes": 3}


def test_moe_fields_as_a_dict():
    model = create_model("swin_moe", depths=[2], num_heads=[1], moe={"blocks": [[1]], "num_experts": 4}, **SMALL)
    assert model.config.moe.blocks == ((1,),) and model.config.moe.num_experts == 4
    assert model.config.moe.balance_loss == "gshard"  # the family's other fields stay
    with pytest.raises(ValueError, match="moe has no field 'num_expert'; did you mean 'num_experts'"):
        create_model("swin_moe", moe={"num_expert": 4})
    with pytest.raises(ValueError, match="moe must be a dict"):
        create_model("swin_moe", moe=4)


def test_new_blocks_are_checked_with_new_depths():
    name = "swin_moe_small_patch4_window12_192_8expert_32gpu_22k"
    model = create_model(name, depths=[2, 2], num_heads=[1, 2], moe_blocks=[[1], [1]], num_experts=2, **SMALL)
    assert model.config.depths == (2, 2) and model.config.moe.blocks == ((1,), (1,))
