"""A routing choice is one file and one row: every row has a class of its own, and is all that a new choice needs."""

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.config import choices as facts
from swin_moe.models import build_model
from swin_moe.models.flops import active_flops
from swin_moe.moe import choices
from swin_moe.moe.choices.token import TokenChoice
from swin_moe.run.summary import describe_choice

NETWORK = ModelConfig(
    name="swin_moe",
    img_size=(16, 16),
    patch_size=(2, 2),
    embed_dim=8,
    depths=(2,),
    num_heads=(2,),
    window_size=4,
    num_classes=3,
)


class LastExpert(TokenChoice):
    """Tokens choose as ever, but among negated scores: a choice that differs from the others in its result."""

    def assign(self, batch, scored, bias):
        return super().assign(batch, replace(scored, noisy=-scored.noisy, scores=1 - scored.scores), bias)

    def finish(self, batch, clean, noisy, bias):
        return super(TokenChoice, self).finish(batch, clean, noisy, bias)


class LastExpertFacts(facts.TokenFacts):
    routed_by = f"{__name__}:LastExpert"
    refuses = {"export": "it is a test"}

    def passes(self, moe, capacity_factor, *, tokens, hidden):
        return 3.0

    def describe(self, moe, scope):
        return "tokens take the last expert"


def moe(**options: Any) -> MoEConfig:
    usual: dict[str, Any] = {
        "num_experts": 4,
        "blocks": ((1,),),
        "balance_loss": "none",
        "capacity_factor": 0.0,
    }
    return MoEConfig(**usual | options)


def _this_module() -> types.ModuleType:
    """Returns a module with this file's names: pytest imports test files without listing them in sys.modules."""
    module = types.ModuleType(__name__)
    vars(module)["LastExpert"] = LastExpert
    return module


def test_every_row_has_a_class_of_its_own():
    kinds = [type(choices.build_choice(moe(choice=name, capacity_factor=1.0), 0)) for name in facts.CHOICES]
    assert len(set(kinds)) == len(kinds) == 3


def test_a_row_is_a_choice(monkeypatch):
    with pytest.raises(ValueError, match="model.moe.choice must be one of token, expert, soft, got 'last'"):
        moe(choice="last")
    monkeypatch.setitem(facts.CHOICES, "last", LastExpertFacts())
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    config = moe(choice="last")
    network = build_model(replace(NETWORK, moe=config))
    network.init_weights(0)
    layer = network.layers[0].blocks[1].mlp
    x = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    layer.eval()
    seen = []
    layer.observer = seen.append
    layer(x)
    logits = layer.router(x.flatten(0, 1))
    assert torch.equal(seen[0].expert[:, 0], logits.argmin(dim=1))
    assert describe_choice(config, "a rank") == "tokens take the last expert"
    usual, ours = (
        active_flops(replace(NETWORK, moe=m), spatial_mlp=False, norm_after=False)
        for m in (moe(choice="token", capacity_factor=1.0), config)
    )
    assert ours - usual == 2 * 64 * 2 * 8 * (8 * NETWORK.mlp_ratio)  # two passes more of 64 tokens, two products each
    with pytest.raises(ValueError, match="model.moe.choice=last is not for export: it is a test"):
        facts.refuse_choice(config, "export")
