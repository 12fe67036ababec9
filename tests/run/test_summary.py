"""What the start-up summary says about routing."""

import pytest
import torch

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.moe import MoELayer
from swin_moe.ops import extension
from swin_moe.parallel.sharding import Degrees
from swin_moe.run import summary
from swin_moe.run.summary import (
    attention_path,
    describe_balance,
    describe_choice,
    describe_limit,
    linear_path,
    product_path,
)

LIMITED = MoEConfig(num_experts=8, expert_groups=4, group_limit=2, balance_loss="gshard")


@pytest.mark.parametrize(
    ("degrees", "hosts", "said"),
    [
        ((4, 1, 1), (0, 0, 0, 0), "all on one node"),
        ((4, 1, 1), (0, 1, 2, 3), "each on a node of its own: its rows go to at most 2 nodes"),
        ((4, 2, 1), (0, 0, 1, 1, 2, 2, 3, 3), "each on a node of its own: its rows go to at most 2 nodes"),
        ((4, 1, 2), (0, 1, 2, 3, 4, 5, 6, 7), "each on a node of its own: its rows go to at most 2 nodes"),
        ((8, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3), "each on a node of its own: its rows go to at most 2 nodes"),
        ((8, 1, 1), (0, 1, 0, 1, 2, 2, 3, 3), "which are not the nodes: a group is on up to 2"),
        ((4, 1, 1), (0, 0, 1, 1), "which are not the nodes: a group is on up to 1"),  # two groups on a node
        ((4, 1, 2), (0, 1, 2, 3, 4, 4, 5, 6), "which are not the nodes: a group is on up to 1"),  # in one replica
        ((2, 1, 1), (0, 1), "which are not the nodes: a group is on up to 1"),
    ],
)
def test_expert_groups_and_nodes(degrees, hosts, said):
    text = describe_limit(LIMITED, Degrees(*degrees), hosts)
    assert text.startswith("a token uses 2 of 4 groups of 2 experts, ") and said in text, text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "top-1 by softmax, capacity factor 1.25 within S; evaluation 0.0"),
        (
            {"eval_capacity_factor": None, "shared_experts": 2},
            "capacity factor 1.25 within S; evaluation 1.25, 2 shared",
        ),
        (
            {"choice": "expert", "balance_loss": "none", "top_k": 2},
            "1.25 x 2 within S; evaluation 1.25 x 2 within an im",
        ),
        ({"choice": "soft", "balance_loss": "none", "slots": 3}, "soft: 3 slots an expert and image"),
    ],
)
def test_choice(options, said):
    assert said in describe_choice(MoEConfig(**options), "S")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "load_importance x 0.01"),
        (
            {"balance_scope": "global", "z_loss_weight": 0.1},
            "load_importance over the 24 images of a forward on all ranks x 0.01, z-loss x 0.1",
        ),
        ({"balance_loss": "none", "scores": "sigmoid", "bias_rate": 0.001}, "bias, 0.001 a step"),
        ({"balance_loss": "none"}, "no loss"),
    ],
)
def test_balance(options, said):
    assert describe_balance(MoEConfig(**options), 24) == said


@pytest.mark.parametrize(
    ("dim", "backend", "device", "precision", "said"),
    [
        (16, "native", "cuda", "bf16", "one grouped product"),
        (
            12,
            "native",
            "cuda",
            "bf16",
            "one product per expert (grouped_mm wants bfloat16 and channels in multiples of 8)",
        ),
        (16, "native", "cuda", "fp16", "one product per expert (grouped_mm wants bfloat16"),
        (16, "native", "cpu", "bf16", "one product per expert (grouped_mm takes the same time on a CPU)"),
        (16, "padded", "cuda", "bf16", "one batched product over padded rows (model.moe.backend=padded)"),
    ],
)
def test_how_experts_multiply(dim, backend, device, precision, said):
    layer = MoELayer(dim, 2 * dim, MoEConfig(backend=backend), fc2_bias=True, layer=0, init_std=0.02)
    assert product_path(layer, torch.device(device), precision).startswith(f"experts: {said}")


def test_what_computes_linear_layers_is_said_where_it_is_not_what_pytorch_takes(monkeypatch):
    monkeypatch.setattr(summary, "faster_products", lambda: "MKL is slow here")
    text = linear_path("cpu", "fp32")
    assert text.startswith("linear layers and experts of ") and text.endswith("rows or more: oneDNN (MKL is slow here)")
    assert linear_path("cpu", "bf16") == linear_path("cuda", "fp32") == linear_path("cpu", "fp64") == ""
    monkeypatch.setattr(summary, "faster_products", lambda: None)
    assert linear_path("cpu", "fp32") == ""


@pytest.mark.parametrize(
    ("options", "device", "dtype", "kernels", "said"),
    [
        (
            {},
            "cpu",
            "float32",
            {"cpu"},
            "fused, CPU kernels some, or what measures over 10 % faster (model.attention=aut",
        ),
        ({"attention": "fused"}, "cpu", "float32", {"cpu"}, "fused, CPU kernels some (model.attention=fused)"),
        ({}, "cuda", "bfloat16", {"cpu", "cuda"}, "fused, CUDA kernels, or what measures over 10 % faster"),
        (
            {},
            "cuda",
            "bfloat16",
            set(),
            "sdpa, or what measures over 10 % faster (model.attention=auto); not fused: no co",
        ),
        ({}, "cpu", "float32", set(), "analytic in training, sdpa in evaluation, or what"),
        ({"embed_dim": 200, "num_heads": (2, 4, 8, 16)}, "cpu", "float32", {"cpu"}, "not fused: stage 0: 100 channels"),
        ({"attention": "sdpa"}, "cpu", "float32", {"cpu"}, "sdpa (model.attention=sdpa)"),
        ({"attention_chunk": 8}, "cpu", "bfloat16", {"cpu"}, "reference, window by window (model.attention_chunk, "),
        (
            {"attn_drop_rate": 0.1, "attention": "sdpa"},
            "cpu",
            "float32",
            {"cpu"},
            "sdpa, window by window (model.attn_dro",
        ),
    ],
)
def test_how_windows_attend(monkeypatch, options, device, dtype, kernels, said):
    monkeypatch.setattr(extension, "COMPILED", frozenset(kernels))
    monkeypatch.setattr("swin_moe.run.summary.cpu_capability", lambda: "some")
    text = attention_path(ModelConfig(**options), device, getattr(torch, dtype))
    assert text.startswith("window attention: ") and said in text, text


def test_a_network_without_attention():
    assert "has no attention" in attention_path(ModelConfig(name="swin_mlp"), "cpu", torch.float32)
