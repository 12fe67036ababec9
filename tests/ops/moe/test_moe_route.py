"""Routing as one operator: the same integers and the same bits as the Python form, gradients included."""

import dataclasses

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe.choices import build_choice
from swin_moe.moe.routers import build_router
from swin_moe.moe.routing import choose_experts
from swin_moe.ops.moe import moe_balance, moe_route
from swin_moe.randomness import RandomContext
from tests.moe.reference import route_slowly

compiled = pytest.mark.skipif("cpu" not in moe_route.COMPILED, reason="the compiled kernels are not built")
PER_IMAGE, DIM = 6, 5
OPTIONS = {
    "official": {},
    "gshard": {"balance_loss": "gshard"},
    "two choices": {"top_k": 2, "normalize_gate": True},
    "two choices, by token": {"top_k": 2, "batch_prioritized": False, "capacity_factor": 0.5},
    "all choices": {"top_k": 7, "normalize_gate": True, "capacity_factor": 0.5},
    "many experts": {"num_experts": 37, "top_k": 10, "capacity_factor": 0.3},
    "by need": {"capacity_factor": 0.0},
    "no slots": {"capacity_factor": 0.01},
    "no noise": {"gate_noise": 0.0, "balance_loss": "gshard", "z_loss_weight": 0.1},
    "no loss": {"balance_loss": "none"},
    "z-loss": {"z_loss_weight": 0.1},
    "sigmoid": {"scores": "sigmoid", "balance_loss": "gshard", "top_k": 2, "normalize_gate": True},
    "biased": {"scores": "sigmoid", "balance_loss": "none", "bias_rate": 0.1, "top_k": 3},
    "groups of images": {"capacity_scope": "images", "group_images": 2, "top_k": 2},
    "groups, by token": {"capacity_scope": "images", "group_images": 2, "batch_prioritized": False},
    "groups, balanced together": {"capacity_scope": "images", "group_images": 2, "balance_scope": "global"},
}
COLUMNS = ("expert", "slot", "gate", "keep", "capacity", "demand", "kept", "group_size")


def run(monkeypatch, fused, options, *, images, training, dtype, logits=None):
    """Returns what a rule makes of a batch, and the gradients, by the operator or by the Python form."""
    config = MoEConfig(**{"num_experts": 7, **options})
    router = build_router(DIM, config).to(dtype)
    router.init_weights(torch.Generator().manual_seed(1), 0.5)
    if router.balance is not None:
        router.balance.bias.data.copy_(torch.linspace(-0.2, 0.2, config.num_experts))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(images * PER_IMAGE, DIM, generator=generator, dtype=dtype).requires_grad_()
    if logits is not None:
        monkeypatch.setattr(type(router), "forward", lambda self, x: x @ self.weight.T * 0 + logits)
    random = RandomContext(1, 2, torch.arange(images)) if training and config.gate_noise else None
    calls = []
    with monkeypatch.context() as patch:
        real = moe_route.route_tokens
        patch.setattr(moe_route, "route_tokens", lambda *a, **k: calls.append(1) or real(*a, **k))
        if not fused:
            patch.setattr(moe_route, "available", lambda logits: False)
        result = build_choice(config, 3).route(
            x, router, tokens_per_image=PER_IMAGE, training=training, random=random, token=torch.arange(len(x))
        )
    assert len(calls) == fused
    weight = torch.randn(result.routing.gate.shape, generator=generator, dtype=dtype)
    loss = (result.routing.gate * weight).sum() + result.aux * 3
    parameters = [p for p in router.parameters() if p.requires_grad]
    return result, torch.autograd.grad(loss, [x, *parameters], allow_unused=True)


def assert_same_bits(found, expected, *, training):
    (result, grads), (other, other_grads) = found, expected
    for name in COLUMNS:
        one, two = getattr(result.routing, name), getattr(other.routing, name)
        same = torch.equal(one, two) and one.dtype == two.dtype if isinstance(one, torch.Tensor) else one == two
        assert same, f"{name}: {one} != {two}"
    for field in dataclasses.fields(result.stats):
        one, two = getattr(result.stats, field.name), getattr(other.stats, field.name)
        assert torch.equal(one, two) and one.shape == two.shape and not one.requires_grad, f"{field.name}: {one} {two}"
    assert torch.equal(result.aux, other.aux), (result.aux, other.aux)
    # Without noise three gradients meet in the logits, and autograd adds them in another order; only evaluation has a
    # threshold then, and nobody trains in it.
    exact = {"rtol": 0, "atol": 0} if training else {}
    for one, two in zip(grads, other_grads):
        torch.testing.assert_close(one, two, **exact)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [0, 1, 4, 5, 300])  # 5: the last group of two images is smaller
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_python_form_to_the_bit(monkeypatch, options, images, training, dtype):
    arguments = {"images": images, "training": training, "dtype": dtype}
    results = [run(monkeypatch, fused, options, **arguments) for fused in (True, False)]
    assert_same_bits(*results, training=training)


@compiled
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("images", [0, 5])
def test_equals_the_python_form_where_only_routing_is_compiled(monkeypatch, options, images):
    """As on a CUDA device, which has no kernels of the losses; gradients meet in another order there."""
    arguments = {"images": images, "training": True, "dtype": torch.float64}
    expected = run(monkeypatch, False, options, **arguments)
    monkeypatch.setattr(moe_balance, "available", lambda scores: False)
    found = run(monkeypatch, True, options, **arguments)
    assert_same_bits(found, expected, training=False)


@compiled
@pytest.mark.parametrize("prioritized", [True, False])
@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equals_loops_over_tokens_with_ties(top_k, capacity, prioritized):
    """Few values, so that scores and confidences tie, both zeros among them."""
    logits = torch.randint(0, 3, (24, 9), generator=torch.Generator().manual_seed(4)).double()
    result = route(logits, top_k=top_k, group_size=12, capacity=capacity, prioritized=prioritized)
    expected = route_slowly(
        logits, top_k=top_k, capacity=capacity, group_size=12, batch_prioritized=prioritized, scores=result.scores
    )
    assert [value.tolist() for value in (result.expert, result.slot, result.keep)] == list(expected)


def route(logits, **options):
    """Returns the operator's answer with plain options."""
    plain = dict(
        bias=None,
        top_k=1,
        group_size=len(logits),
        capacity=None,
        sigmoid=False,
        normalize=False,
        prioritized=False,
        probabilities=False,
    )
    options = plain | options
    return moe_route.route_tokens(logits, None, last_capacity=options["capacity"], **options)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("experts", [3, 8, 21])
def test_what_is_not_a_number_or_infinite_is_chosen_as_torch_max_does(experts, dtype):
    scores = torch.rand(40, experts, generator=torch.Generator().manual_seed(5), dtype=dtype)
    scores[3, 1], scores[4, :2], scores[5], scores[6, -1] = torch.nan, torch.nan, torch.nan, torch.nan
    bias = torch.zeros(experts, dtype=dtype)
    bias[2] = -torch.inf
    logits = torch.logit(scores)
    for top_k in (1, 2, 3):
        for offset in (None, bias):
            found = route(logits, top_k=top_k, bias=offset, sigmoid=True, prioritized=True)
            assert torch.equal(found.expert, choose_experts(torch.sigmoid(logits), top_k, bias=offset))
            first = torch.sigmoid(logits).gather(1, found.expert[:, :1]).squeeze(1)
            order = first.sort(descending=True, stable=True).indices
            slots = found.slot[:, 0][order]
            for e in range(experts):
                mine = slots[found.expert[:, 0][order] == e]
                assert mine.tolist() == list(range(len(mine)))


@compiled
def test_contracts_of_the_operators():
    ops, logits = torch.ops.swin_moe, torch.randn(10, 4, dtype=torch.float64)
    noisy = logits + 1
    tests = ("test_schema", "test_faketensor")
    for flags in ((False, True, True, True), (True, True, False, False), (False, False, False, False)):
        arguments = (logits, noisy, None, 2, 4, 3, 2, *flags)
        torch.library.opcheck(ops.moe_route.default, arguments, test_utils=tests)
        scores, probabilities, gate, threshold, expert, *_ = ops.moe_route(*arguments)
        own = probabilities if len(probabilities) else None
        grads = (torch.randn_like(scores), None if own is None else torch.randn_like(scores), gate, threshold)
        torch.library.opcheck(
            ops.moe_route_backward.default, (*grads, scores, own, expert, *flags[:2]), test_utils=tests
        )


@compiled
def test_refuses_in_one_sentence():
    logits = torch.randn(6, 4)
    with pytest.raises(ValueError, match="top_k must be in \\[1, 4\\], got 5"):
        route(logits, top_k=5)
    with pytest.raises(ValueError, match="must hold tokens, got 0"):
        route(logits, group_size=0)
    with pytest.raises(ValueError, match="one number per expert, got 3"):
        route(logits, bias=torch.zeros(3))
    with pytest.raises(TypeError, match="float32 or float64"):
        route(logits.half())
    assert not moe_route.available(logits.half())
    x = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(route(x).gate.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@compiled
def test_threads_change_nothing():
    logits = torch.randn(20000, 16)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(route(logits, top_k=2, group_size=400, capacity=30, prioritized=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        # The entropy is a sum over all tokens by PyTorch, whose threads show in the last bits.
        assert all(torch.equal(a, b) for a, b in zip(results[0][:-1], other[:-1]))
        torch.testing.assert_close(results[0].entropy, other.entropy)
