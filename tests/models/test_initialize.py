"""Heads of module types that are not known here begin as torch begins them, as a function of seed and name alone."""

import math

import pytest
import torch
from torch import nn

from swin_moe.config import ModelConfig, OptimConfig
from swin_moe.models import SwinTransformer
from swin_moe.models.heads import EncoderModel
from swin_moe.models.initialize import initialize
from swin_moe.optim import parameter_groups


class Scale(nn.Module):
    """A module of somebody's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3))

    def reset_parameters(self):
        nn.init.constant_(self.scale, 0.25)


class Forgetful(nn.Module):
    """One whose values are lost on meta."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.shift = nn.Parameter(torch.zeros(2))


def build(*, extra: bool = False) -> nn.ModuleDict:
    children = {
        "up": nn.ConvTranspose2d(6, 4, 2, stride=2),
        "table": nn.Embedding(5, 3),
        "mix": nn.MultiheadAttention(8, 2),
        "past": nn.LSTM(3, 4),
        "scale": Scale(),
        "norm": nn.GroupNorm(1, 4),
    }
    return nn.ModuleDict(({"other": nn.Bilinear(2, 2, 2)} if extra else {}) | children)


def filled(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    state = torch.random.get_rng_state()
    initialize(model, seed, std=0.02)
    assert torch.equal(torch.random.get_rng_state(), state), "draws of others are not moved"
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_unknown_types_follow_torchs_rule_under_the_seed():
    values, again, other = filled(build(), 3), filled(build(extra=True), 3), filled(build(), 4)
    assert all(torch.equal(again[name], value) for name, value in values.items())
    for name in ("up.weight", "up.bias", "table.weight", "mix.in_proj_weight", "past.weight_hh_l0", "past.bias_ih_l0"):
        assert values[name].isfinite().all() and not torch.equal(values[name], other[name]), name
    bound = 1 / math.sqrt(4 * 2 * 2)
    assert bound * 0.8 < values["up.weight"].abs().max() <= bound and values["up.bias"].abs().max() <= bound
    assert values["past.weight_hh_l0"].abs().max() <= 0.5
    assert not values["mix.in_proj_bias"].any() and values["mix.out_proj.weight"].std() < 0.03
    assert (values["scale.scale"] == 0.25).all() and (values["norm.weight"] == 1).all()


def test_a_module_whose_values_nobody_knows_is_named():
    model = nn.ModuleDict({"head": Forgetful()})
    with pytest.raises(ValueError, match="Forgetful needs a method reset_parameters that fills scale, shift"):
        initialize(model, 0, std=0.02)


class Layered(EncoderModel):
    """A head with children named as the encoder's, of another shape."""

    def __init__(self, encoder):
        super().__init__(encoder)
        self.layers = nn.ModuleDict({"first": nn.Linear(8, 8)})
        self.patch_embed = nn.Linear(8, 8)


def test_layer_decay_takes_a_head_for_a_head_whatever_it_is_called():
    config = ModelConfig(
        name="swin",
        img_size=(16, 16),
        patch_size=(2, 2),
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=4,
        num_classes=0,
    )
    model = Layered(SwinTransformer(config))
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5), config.depths)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["layers.first.weight"] == scales["patch_embed.bias"] == 1.0
    assert (
        scales["encoder.patch_embed.proj.weight"] == 0.125 and scales["encoder.layers.0.blocks.0.mlp.fc1.bias"] == 0.25
    )
