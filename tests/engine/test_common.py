"""What engines share, in one process: the decision of a step, initialization in parts, averages, offloaded state."""

import math

import pytest
import torch

from swin_moe.config.io import load_config
from swin_moe.engine.common import average_name, decide, materialize, state_name, state_tensors
from swin_moe.engine.torch_native import torch_engine
from swin_moe.models import build_model
from swin_moe.models.swin import Block
from swin_moe.optim import build_schedule
from swin_moe.parallel.groups import single_process_groups

CPU = torch.device("cpu")
TINY = (
    "model.embed_dim=8",
    "model.num_heads=[1,2]",
    "model.depths=[1,2]",
    "model.moe.blocks=[[0],[1]]",
    "model.moe.num_experts=3",
    "optim.epochs=4",
    "optim.warmup_epochs=0",
)


def config(*options: str):
    return load_config("digits_swin_moe", [*TINY, *options])


def on_meta(config):
    with torch.device("meta"):
        return build_model(config.model, recompute=config.parallel.recompute)


def engine(*options: str):
    chosen = config(*options)
    schedule = build_schedule(chosen.optim, steps_per_epoch=4, global_batch=64)
    return torch_engine(on_meta(chosen), config=chosen, groups=single_process_groups(), schedule=schedule, device=CPU)


def train(engine, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        images = torch.randn(2, 3, 32, 32, generator=generator, dtype=next(engine.local_model.parameters()).dtype)
        with engine.micro_step(last=True):
            logits, aux = engine.model(images)
            engine.backward(logits.square().sum() + aux)
        engine.step(step)


@pytest.mark.parametrize(
    ("norm", "limit", "expected"),
    [
        (2.0, 4.0, (True, 1.0)),
        (4.0, 2.0, (True, pytest.approx(0.5))),
        (9.0, 0.0, (True, 1.0)),
        (math.inf, 1.0, (False, 1.0)),
        (math.nan, 0.0, (False, 1.0)),
        (0.0, 1.0, (True, 1.0)),
    ],
)
def test_decision(norm, limit, expected):
    assert decide(norm, limit) == expected


def test_names():
    assert state_name("exp_avg", "head.bias") == "optim.exp_avg/head.bias"
    assert average_name("head.bias") == "ema/head.bias"
    assert state_tensors(config().optim) == ("exp_avg", "exp_avg_sq")
    assert state_tensors(config("optim.name=sgd").optim) == ("momentum_buffer",)
    assert state_tensors(config("optim.name=sgd", "optim.momentum=0").optim) == ()


def test_materialized_in_parts_is_the_model_materialized_at_once():
    chosen = config("optim.freeze=experts")
    whole, parts = materialize(on_meta(chosen), chosen, CPU), on_meta(chosen)
    blocks = [module for module in parts.modules() if isinstance(module, Block)]
    rest = set(parts.modules()) - {module for block in blocks for module in block.modules()}
    for only in (set(blocks[1].modules()), rest, set(blocks[0].modules()), set(blocks[2].modules())):
        materialize(parts, chosen, CPU, only=only)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad == (".experts." not in name), name


def test_materializing_leaves_other_parameters_alone():
    chosen = config("engine.precision=fp64")
    model = materialize(on_meta(chosen), chosen, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with torch.no_grad():
        model.head.bias += 1
    materialize(model, chosen, CPU)
    assert model.head.bias.eq(1).all()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_offloaded_state_changes_nothing(name):
    options = ("engine.precision=fp64", f"optim.name={name}", "optim.ema=0.5", "optim.clip_norm=0.1")
    plain, offloaded = engine(*options), engine(*options, "engine.offload=optimizer")
    assert all(part.offloaded for part in offloaded.parts.values())
    for one in (plain, offloaded):
        torch.manual_seed(1)  # the model draws its noise from torch outside the trainer
        train(one, 3)
    for a, b in zip(plain.pieces(), offloaded.pieces(), strict=True):
        assert a.name == b.name and torch.equal(a.tensor, b.tensor), a.name
    with offloaded.evaluation(), plain.evaluation():
        for a, b in zip(plain.local_model.parameters(), offloaded.local_model.parameters()):
            assert torch.equal(a, b)


def test_averages_stand_in_for_weights_during_evaluation_only():
    one = engine("optim.ema=0.9")
    train(one, 2)
    weights = {n: p.detach().clone() for n, p in one.local_model.named_parameters()}
    averages = {n: a.clone() for n, a in one.ema.average.items()}
    with one.evaluation():
        assert not one.local_model.training
        assert all(torch.equal(p, averages[n]) for n, p in one.local_model.named_parameters())
    assert one.local_model.training
    assert all(torch.equal(p, weights[n]) for n, p in one.local_model.named_parameters())
    assert all(torch.equal(a, averages[n]) for n, a in one.ema.average.items())
