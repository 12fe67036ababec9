"""A layer of experts as one operator gives what its steps give, for every choice, router, capacity, dtype, threads."""

import pytest
import torch
from torch import Tensor, nn

from swin_moe.config import MoEConfig
from swin_moe.models.optimized import _Around, _Experts, _Norm
from swin_moe.moe import MoELayer
from swin_moe.ops import packed_experts
from swin_moe.ops.packed_layers import DTYPES, INT8_DTYPES, Packing, sums_dtype

pytestmark = pytest.mark.skipif(not packed_experts.available(), reason="no operator of packed experts here")

BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CASES: dict[str, dict] = {
    "top1": {},
    "top2": {"top_k": 2},
    "top3 normalized, in token order": {"top_k": 3, "normalize_gate": True, "batch_prioritized": False},
    "dropping": {"eval_capacity_factor": 0.5},
    "dropping of two": {"eval_capacity_factor": 0.5, "top_k": 2, "batch_prioritized": False},
    "no slots": {"eval_capacity_factor": 0.01},
    "groups": {"capacity_scope": "images", "group_images": 2, "eval_capacity_factor": 0.8, "top_k": 2},
    "cosine": {"router": "cosine", "cosine_dim": 20, "top_k": 2},
    "balanced": {"scores": "sigmoid", "bias_rate": 1e-3, "top_k": 2, "normalize_gate": True},
    "shared": {"shared_experts": 1, "eval_capacity_factor": 0.5},
    "all": {"top_k": 5, "num_experts": 5},
    "many": {"num_experts": 37, "router": "cosine", "cosine_dim": 3},  # most have no row
}


def layer_of(dim: int, **options) -> MoELayer:
    if options.get("scores") == "sigmoid":
        options["balance_loss"] = "none"
    layer = MoELayer(dim, 2 * dim + 3, MoEConfig(**options), fc2_bias=True, layer=3, init_std=0.02).double().eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in layer.named_parameters():
        scale = 0.3 if name.endswith(("bias", "fc1_bias", "fc2_bias")) else dim**-0.5 * (8 if "router" in name else 1)
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
    return layer.requires_grad_(False)


def experts_of(layer: MoELayer, dtype: torch.dtype, *, int8: bool = False) -> _Experts:
    return _Experts(layer, Packing(dtype, int8=int8))


def norm_of(dim: int, dtype: torch.dtype) -> _Norm:
    norm = nn.LayerNorm(dim, dtype=torch.float64).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(6))
    norm.bias.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(7))
    return _Norm(norm, dtype)


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def in_steps(experts: _Experts, x: Tensor, around: _Around) -> Tensor:
    """Returns what the layer gives by the operators of its steps."""
    return around.apply(x, experts._branch)


@pytest.mark.parametrize("post", [False, True], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("name", CASES)
def test_the_operator_gives_what_the_steps_give(name, post):
    for dim in (24, 33):
        layer = layer_of(dim, **CASES[name])
        x = tokens(3, 5, 7, dim)
        for dtype in DTYPES:
            experts, around = experts_of(layer, dtype), _Around(norm_of(dim, dtype), post)
            assert experts.packed_router is not None and experts._plan(x) is not None
            given = x.to(sums_dtype(dtype))
            got, expected = experts(given, around), in_steps(experts, given, around)
            assert got.shape == x.shape and got.dtype == given.dtype
            assert relative(got, expected) < BOUNDS[dtype], f"{dim} channels, {dtype}"


@pytest.mark.parametrize("name", CASES)
def test_in_int8_the_operator_gives_what_the_steps_give(name):
    layer, x = layer_of(33, **CASES[name]), tokens(3, 5, 7, 33)
    for dtype in INT8_DTYPES:
        experts, around = experts_of(layer, dtype, int8=True), _Around(norm_of(33, dtype), False)
        got, expected = experts(x.float(), around), in_steps(experts, x.float(), around)
        exact = in_steps(experts_of(layer, torch.float64), x, _Around(norm_of(33, torch.float64), False))
        assert relative(got, expected) < max(BOUNDS[dtype], 1e-3), f"{dtype}"
        assert relative(got, exact) < 3e-2, f"{dtype}"


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_of_no_token_and_of_one(batch):
    layer = layer_of(24, top_k=2, eval_capacity_factor=1.0)
    experts, around = experts_of(layer, torch.float64), _Around(norm_of(24, torch.float64), False)
    x = tokens(batch, 1, 1, 24)
    got = experts(x, around)
    assert got.shape == x.shape
    if batch:
        assert relative(got, in_steps(experts, x, around)) < 1e-13


def test_experts_without_rows_are_skipped_and_one_expert_takes_all():
    layer = layer_of(24)
    layer.router.weight[:] = 0
    layer.router.weight[6] = 10 * norm_of(24, torch.float64).module.bias  # what every token's norm has in common
    experts, around = experts_of(layer, torch.float64), _Around(norm_of(24, torch.float64), False)
    x = torch.zeros(1, 9, 40, 24, dtype=torch.float64) + tokens(24) * 1e-3  # more rows than a task has
    rows = around.norm.module(x).flatten(0, 2)
    sizes = {"tokens_per_image": 360, "training": False, "random": None, "token": None}
    routed = experts.choice.route(rows, experts.router, **sizes)
    assert routed.routing.demand[0, 6] == 360
    assert relative(experts(x, around), in_steps(experts, x, around)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype):
    for options in ({}, {"top_k": 2, "eval_capacity_factor": 0.7}, {"router": "cosine"}):
        experts, around = experts_of(layer_of(48, **options), dtype), _Around(norm_of(48, dtype), False)
        x = tokens(2, 12, 15, 48).to(sums_dtype(dtype))
        alone = experts(x, around)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            try:
                assert torch.equal(experts(x, around), alone)
            finally:
                torch.set_num_threads(1)


def test_equal_scores_go_to_the_lower_expert_and_token():
    layer = layer_of(24, eval_capacity_factor=0.5)
    layer.router.weight[:] = 0
    experts, around = experts_of(layer, torch.float64), _Around(norm_of(24, torch.float64), False)
    x = tokens(1, 4, 8, 24)
    got = experts(x, around)
    changed = (got != x).flatten(0, 2).any(dim=1)
    assert changed.tolist() == [True, True] + 30 * [False]  # capacity int(0.5 * 4) = 2 of expert 0
    assert relative(got, in_steps(experts, x, around)) < 1e-13


def test_other_choices_keep_their_steps():
    for options in ({"choice": "expert"}, {"choice": "soft", "slots": 4}):
        layer = layer_of(24, balance_loss="none", **options)
        experts = experts_of(layer, torch.float32)
        assert experts._plan(tokens(1, 3, 4, 24).float()) is None
    limited = experts_of(layer_of(24, expert_groups=4, group_limit=2, top_k=2, balance_loss="none"), torch.float32)
    assert limited._plan(tokens(1, 3, 4, 24).float()) is None
    layer = layer_of(24)
    layer.router.__class__ = type("Other", (type(layer.router),), {})
    assert experts_of(layer, torch.float32).packed_router is None


def test_what_does_not_fit_is_refused():
    experts, around = experts_of(layer_of(24), torch.float32), _Around(norm_of(24, torch.float32), False)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 24\) in Float, got \[1, 2, 2, 24\] in Double"):
        experts(tokens(1, 2, 2, 24), around)
    slots, options = experts._plan(tokens(1, 2, 2, 24))
    arguments = (experts.packed_router, experts.first, experts.second, slots, options)
    x = tokens(1, 2, 2, 24).float()
    with pytest.raises(ValueError, match=r"what is added must be \[1, 2, 2, 24\] in Float, got \[4, 24\] in Float"):
        packed_experts.packed_experts(x, *arguments, inner=x.view(4, 24))
    with pytest.raises(ValueError, match=r"top_k must be in \[1, 8\] and a group of 1 token or more, got 9"):
        packed_experts.packed_experts(x, *arguments[:3], slots._replace(top_k=9), options)
    wrong = experts_of(layer_of(24, num_experts=4), torch.float32).packed_router
    with pytest.raises(ValueError, match="weights must be of 4 experts, got 8 and 8"):
        packed_experts.packed_experts(x, wrong, *arguments[1:])
