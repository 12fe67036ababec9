"""Cutting a model and describing what is held, for layouts that need no running ranks."""

import pytest
import torch

import swin_moe
from swin_moe.config import ParallelConfig
from swin_moe.parallel.apply import (
    dense_parameters,
    expert_parameters,
    parallelize,
    parameter_layout,
    reduce_expert_gradients,
)
from swin_moe.parallel.groups import Degrees, Groups, single_process_groups

TINY = dict(
    img_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[1, 2],
    num_heads=[1, 2],
    window_size=4,
    moe_blocks=[[-1], [1]],
    num_experts=5,
    num_classes=3,
)
EXPERTS = "layers.1.blocks.1.mlp.experts"


def groups_of(rank, *degrees):
    return Groups(Degrees(*degrees).world_size, rank, Degrees(*degrees))


def test_one_rank_changes_nothing():
    model = swin_moe.create_model("swin_moe", **TINY)
    before = {name: p for name, p in model.named_parameters()}
    same = parallelize(model, ParallelConfig(), single_process_groups())
    assert all(p is before[name] for name, p in same.named_parameters())
    layout = parameter_layout(model, single_process_groups())
    assert list(layout) == list(before)
    assert all(shape == tuple(p.shape) == chunk.size for (shape, chunk), p in zip(layout.values(), before.values()))


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("degrees", [(2, 1, 1), (5, 1, 1), (4, 1, 2), (2, 3, 1), (1, 2, 2)])
def test_ranks_hold_the_whole_model_with_the_same_weights(degrees, meta):
    whole = swin_moe.create_model("swin_moe", seed=4, **TINY)
    held = {name: torch.zeros(p.shape) for name, p in whole.named_parameters()}
    for rank in range(Degrees(*degrees).world_size):
        groups = groups_of(rank, *degrees)
        if meta:
            with torch.device("meta"):
                model = swin_moe.create_model("swin_moe", **TINY)
            model = parallelize(model, ParallelConfig(), groups).to_empty(device="cpu")
            model.init_weights(4)
        else:
            model = parallelize(swin_moe.create_model("swin_moe", seed=4, **TINY), ParallelConfig(), groups)
        layout = parameter_layout(model, groups)
        for name, p in model.named_parameters():
            shape, chunk = layout[name]
            assert shape == tuple(held[name].shape)
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.size))
            assert torch.equal(p, whole.get_parameter(name)[box]), name
            held[name][box] += 1
    replicas = degrees[2]
    for name, count in held.items():
        expected = replicas if name.startswith(EXPERTS) else Degrees(*degrees).world_size
        assert (count == expected).all(), name


def test_dense_and_expert_parameters_are_apart():
    model = swin_moe.create_model("swin_moe", **TINY)
    experts, dense = dict(expert_parameters(model)), dict(dense_parameters(model))
    assert sorted(experts) == sorted(f"{EXPERTS}.{n}" for n in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))
    assert not experts.keys() & dense.keys() and len(experts) + len(dense) == len(list(model.parameters()))
    assert "layers.1.blocks.1.mlp.router.weight" in dense


def test_parallelizing_twice_or_for_another_layout_is_refused():
    model = parallelize(swin_moe.create_model("swin_moe", **TINY), ParallelConfig(), groups_of(0, 5, 1, 1))
    with pytest.raises(ValueError, match=r"layers.1.blocks.1.mlp.experts is cut to \(1, 64, 16\) already"):
        parallelize(model, ParallelConfig(), groups_of(0, 5, 1, 1))
    with pytest.raises(ValueError, match="do not fit ParallelConfig"):
        parallelize(model, ParallelConfig(expert=3), groups_of(0, 5, 1, 1))


def test_an_unknown_backend_is_named():
    model = swin_moe.create_model("swin_moe", **TINY, backend="carrier-pigeon")
    allowed = "local, native, padded, tutel"
    with pytest.raises(ValueError, match=f"'carrier-pigeon'; allowed: {allowed}, or package.module:Name$"):
        parallelize(model, ParallelConfig(), groups_of(0, 5, 1, 1))


def test_expert_gradients_are_divided_and_dense_ones_left_alone():
    model = swin_moe.create_model("swin_moe", **TINY)
    for p in model.parameters():
        p.grad = torch.full_like(p, 6.0) if p.requires_grad else None
    reduce_expert_gradients(model, single_process_groups(), 4)
    assert all((p.grad == 1.5).all() for _, p in expert_parameters(model) if p.grad is not None)
    assert all((p.grad == 6.0).all() for _, p in dense_parameters(model) if p.grad is not None)


def test_a_backend_that_needs_all_experts_is_refused_where_it_has_not():
    model = swin_moe.create_model("swin_moe", **TINY, backend="local")
    with pytest.raises(ValueError, match="backend=local needs every expert on every rank, but parallel.expert=5 x"):
        parallelize(model, ParallelConfig(), groups_of(0, 5, 1, 1))
    parallelize(model, ParallelConfig(expert=1), groups_of(0, 1, 1, 5))
