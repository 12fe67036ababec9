"""Schedules against the official numbers, weight-decay groups, layer decay."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from swin_moe.config import OptimConfig
from swin_moe.models.network import Network
from swin_moe.optim import (
    build_optimizer,
    build_schedule,
    frozen_parameters,
    has_decay,
    layer_id,
    optimizer_class,
    parameter_groups,
    without_compiler,
)

NUMBERS = Path(__file__).parent / "golden" / "numbers.json"


def official(**options) -> OptimConfig:
    return OptimConfig(lr=5e-4, warmup_lr=5e-7, min_lr=5e-6, lr_reference_batch=512, **options)


@pytest.mark.parametrize("prefix", [True, False])
def test_cosine_equals_official_numbers(prefix):
    golden = json.loads(NUMBERS.read_text())["cosine_lr_in1k_bs1024"]
    schedule = build_schedule(official(warmup_prefix=prefix), steps_per_epoch=1251, global_batch=1024)
    for step, value in golden["values" if prefix else "values_no_prefix"].items():
        assert schedule(int(step)) == pytest.approx(value, rel=1e-9)


def test_the_official_loop_is_one_update_behind():
    numbers = json.loads(NUMBERS.read_text())["cosine_lr_in1k_bs1024"]["values"]
    late = build_schedule(official(), steps_per_epoch=1251, global_batch=1024, delay=1)
    used = [numbers["0"], numbers["0"], numbers["1"]]  # lr(max(u - 1, 0)) of updates 0, 1, 2
    assert [late(update) for update in range(3)] == pytest.approx(used, rel=1e-9)
    assert late(25021) == pytest.approx(numbers["25020"], rel=1e-12)


def test_other_schedules_by_hand():
    step = build_schedule(
        OptimConfig(lr=1.0, schedule="step", epochs=10, warmup_epochs=0, decay_epochs=2),
        steps_per_epoch=5,
        global_batch=1,
    )
    assert [step(t) for t in (0, 9, 10, 20)] == pytest.approx([1, 1, 0.1, 0.01])
    multi = build_schedule(
        OptimConfig(lr=1.0, schedule="multistep", epochs=10, warmup_epochs=0, milestones=(4, 8)),
        steps_per_epoch=5,
        global_batch=1,
    )
    assert [multi(t) for t in (19, 20, 40)] == pytest.approx([1, 0.1, 0.01])
    linear = build_schedule(
        OptimConfig(lr=1.0, schedule="linear", epochs=10, warmup_epochs=2, warmup_lr=0.0),
        steps_per_epoch=5,
        global_batch=1,
    )
    assert [linear(t) for t in (0, 5, 10, 50)] == pytest.approx([0, 0.5, 1, 0.01])


def test_poly_is_the_official_segmentation_schedule():
    """lr (1 - t / T), and during the first steps that times 1 - (1 - t / W)(1 - r), r the ratio at the start."""
    config = OptimConfig(lr=6e-5, warmup_lr=6e-11, min_lr=0.0, schedule="poly", epochs=126.6826, warmup_epochs=1.18765)
    poly = build_schedule(config, steps_per_epoch=1263, global_batch=16)
    assert (poly.total, poly.warmup) == (160_000, 1_500)
    assert poly(0) == pytest.approx(6e-5 * 1e-6)
    assert poly(750) == pytest.approx(6e-5 * (1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6)))
    assert poly(1_500) == pytest.approx(6e-5 * (1 - 1_500 / 160_000))
    assert poly(80_000, scale=0.5) == pytest.approx(1.5e-5)
    assert poly(160_000) == 0


def test_biases_and_vectors_decay_where_the_official_code_has_it():
    """SwinTransformer/Swin-Transformer-Semantic-Segmentation decays all but three keywords."""
    vector = torch.zeros(3)
    for name, decays in (("head.bias", True), ("bottleneck.bn.weight", True), ("backbone.norm0.weight", False)):
        assert has_decay(name, vector, set(), {"norm"}, vectors=True) == decays
        assert not has_decay(name, vector, set(), {"norm"})


def test_milestone_inside_warmup_is_refused():
    with pytest.raises(ValueError, match="optim.milestones"):
        build_schedule(
            OptimConfig(schedule="multistep", milestones=(5,), warmup_epochs=20), steps_per_epoch=1, global_batch=1
        )


@pytest.mark.parametrize(
    "name, shape, decays",
    [
        ("layers.0.blocks.0.mlp.fc1.weight", (8, 4), True),
        ("layers.0.blocks.0.mlp.fc1.bias", (8,), False),
        ("layers.0.blocks.0.mlp.experts.fc1_bias", (8, 4), False),
        ("layers.0.blocks.0.mlp.experts.fc1_weight", (8, 4, 4), True),
        ("encoder.layers.0.blocks.0.attn.relative_position_bias_table", (169, 3), False),
        ("encoder.absolute_pos_embed", (1, 4, 4), False),
    ],
)
def test_weight_decay_rule(name, shape, decays):
    keywords = {"relative_position_bias_table", "fc1_bias", "fc2_bias"}
    assert has_decay(name, torch.empty(shape), {"absolute_pos_embed"}, keywords) is decays


def test_layer_ids_of_swin_base():
    depths = (2, 2, 18, 2)
    assert [
        layer_id(n, depths)
        for n in (
            "patch_embed.proj.weight",
            "layers.0.blocks.0.norm1.weight",
            "layers.0.downsample.norm.weight",
            "layers.2.blocks.17.mlp.fc1.bias",
            "layers.3.blocks.1.norm1.bias",
            "norm.weight",
            "head.bias",
            "mask_token",
            "absolute_pos_embed",  # official get_swin_layer does not name it: the last layer's, scale 1
        )
    ] == [0, 1, 2, 22, 24, 25, 25, 0, 25]
    assert 0.8 ** (25 - 0) == pytest.approx(0.003778, abs=1e-6)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.head.bias.requires_grad_(False)

    def no_weight_decay(self):
        return set()

    def no_weight_decay_keywords(self):
        return set()


class Classifier(Network):
    """A network of somebody else, whose head is not called so."""

    def __init__(self):
        super().__init__()
        self.features, self.headroom, self.scorer = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def head_parameters(self):
        return {"scorer.weight", "scorer.bias"}


def test_the_network_says_which_parameters_are_its_head():
    frozen = {"features.weight", "features.bias", "headroom.weight", "headroom.bias"}
    assert frozen_parameters(Classifier(), "backbone") == frozen
    with pytest.raises(ValueError, match="optim.freeze=backbone needs a class head to train, Network has none"):
        frozen_parameters(Network(), "backbone")


def test_groups_hold_every_trainable_parameter_once():
    model = Toy()
    for decay in (1.0, 0.5):
        groups = parameter_groups(model, OptimConfig(layer_decay=decay, weight_decay=0.1), (1,))
        names = [n for g in groups for n in g["names"]]
        assert sorted(names) == ["head.weight", "patch_embed.bias", "patch_embed.weight"]
        scales = {n: g["lr_scale"] for g in groups for n in g["names"]}
        assert scales["patch_embed.weight"] == decay**2 and scales["head.weight"] == 1


def test_fused_adamw_equals_plain_and_takes_empty_shards():
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    tensors = [nn.Parameter(start.clone()) for _ in range(2)]
    empty = nn.Parameter(torch.empty(0, 3))
    groups = [{"params": [tensors[0], empty], "weight_decay": 0.1, "lr_scale": 1.0}]
    fused = build_optimizer(OptimConfig(lr=0.1), groups)
    plain = torch.optim.AdamW([tensors[1]], lr=0.1, weight_decay=0.1, foreach=False)
    for _ in range(3):
        grad = torch.randn(5, 3)
        tensors[0].grad, tensors[1].grad, empty.grad = grad.clone(), grad.clone(), torch.empty(0, 3)
        fused.step()
        plain.step()
    torch.testing.assert_close(tensors[0], tensors[1])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_without_the_compiler_it_is_torchs_own_to_the_bit(name):
    torch.manual_seed(0)
    start, config, runs = torch.randn(5, 3), OptimConfig(name=name, lr=0.1, weight_decay=0.1), []
    kind, options = optimizer_class(config)
    for make in (kind, without_compiler(kind)):
        weight = nn.Parameter(start.clone())
        optimizer, hooked = make([{"params": [weight], "weight_decay": 0.1}], **options), []
        for step in range(4):
            (weight * torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert weight.grad is None and weight.requires_grad
            if step == 1:  # goes on from what it gives away
                state = optimizer.state_dict()
                optimizer = make([{"params": [weight], "weight_decay": 0.5}], **options)
                optimizer.load_state_dict(state)
                optimizer.register_step_post_hook(lambda *_, seen=hooked: seen.append(1))
        runs.append((weight.detach(), optimizer.state_dict()["param_groups"], repr(optimizer)))
        assert len(hooked) == 2
    (ours, *of_ours), (theirs, *of_theirs) = runs
    assert torch.equal(ours, theirs) and of_ours == of_theirs
