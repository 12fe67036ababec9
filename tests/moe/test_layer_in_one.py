"""A layer, or dispatch, experts and combine, as one operator: the bits of the steps one after the other, and when they
are taken."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe.dispatch import PaddedDispatcher
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.phases import PhaseClock
from swin_moe.ops import extension, row_products
from swin_moe.ops.moe import moe_layer

pytestmark = pytest.mark.skipif(not row_products._has_kernels(), reason="this build or processor has no such kernels")
# dtype of tokens and weights, whether products are in bfloat16 by autocast
PRECISIONS = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]


def make(dtype: torch.dtype = torch.float32, **options) -> MoELayer:
    config = MoEConfig(**{"num_experts": 6, "gate_noise": 1.0, "aux_loss_weight": 0.01, **options})
    layer = MoELayer(20, 36, config, fc2_bias=True, layer=1, init_std=0.3)
    layer.init_weights(0, "layer")
    return layer.train().to(dtype)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(layer: MoELayer, dtype: torch.dtype, mixed: bool, images: int = 3) -> list[Tensor]:
    x, grad = (draw(images, 50, 20, seed=seed, dtype=dtype) for seed in (3, 4))
    x.requires_grad_()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        y, aux = layer(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), aux.detach(), *torch.autograd.grad([y, aux], leaves, [grad, torch.tensor(0.5)])]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("top_k", "factor"), [(1, 0.0), (1, 0.6), (2, 0.0), (3, 0.6)])
@pytest.mark.parametrize(("dtype", "mixed"), PRECISIONS)
def test_one_operator_has_the_bits_of_its_steps(monkeypatch, dtype, mixed, top_k, factor, dropout):
    layer = make(dtype, top_k=top_k, capacity_factor=factor, dropout=dropout)
    monkeypatch.setattr(MoELayer, "_plan", lambda self, *a, **k: None)
    taken: list[int] = []
    real = MoELayer._in_one
    monkeypatch.setattr(MoELayer, "_in_one", lambda self, *a: taken.append(1) or real(self, *a))
    found = results(layer, dtype, mixed)
    monkeypatch.setattr(MoELayer, "_is_in_one", lambda self, *a: False)
    expected = results(layer, dtype, mixed)
    assert taken == [1] and (factor == 0 or int(layer.stats.dropped) > 0)
    for mine, wanted in zip(found, expected):
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted)


LAYERS = {
    "official": {"top_k": 1, "capacity_factor": 1.25, "batch_prioritized": True, "balance_loss": "load_importance"},
    "two choices, dropped": {"top_k": 2, "capacity_factor": 0.6, "normalize_gate": True},
    "no slots": {"capacity_factor": 0.01},
    "dropout": {"top_k": 2, "dropout": 0.2, "capacity_factor": 0.0},
    "no noise": {"gate_noise": 0.0, "balance_loss": "gshard", "capacity_factor": 0.0},
    "no loss": {"balance_loss": "none", "capacity_factor": 0.0},
    "sigmoid": {"scores": "sigmoid", "balance_loss": "gshard", "top_k": 2, "normalize_gate": True},
    "biased": {"scores": "sigmoid", "balance_loss": "none", "bias_rate": 0.1, "top_k": 3},
    "z-loss": {"z_loss_weight": 0.1, "balance_loss": "gshard"},
    "z-loss alone": {"z_loss_weight": 0.1, "balance_loss": "none"},
    "z-loss, load": {"z_loss_weight": 0.1, "balance_loss": "load_importance"},
    "groups of images": {"capacity_scope": "images", "group_images": 2, "top_k": 2, "capacity_factor": 0.8},
    "balanced together": {"capacity_scope": "images", "group_images": 2, "balance_scope": "global"},
    "experts without tokens": {"num_experts": 150, "capacity_factor": 0.0},
    "a shared expert": {"shared_experts": 1},
}
STATS = ("demand", "kept", "dropped", "entropy", "aux")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "mixed"), PRECISIONS)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_layer_as_one_operator_has_the_bits_of_its_steps(monkeypatch, options, dtype, mixed, training):
    layer = make(dtype, **options).train(training)
    if layer.router.balance is not None:
        layer.router.balance.bias.data.copy_(torch.linspace(-0.2, 0.2, layer.config.num_experts))
    taken: list[int] = []
    real = MoELayer._at_once
    monkeypatch.setattr(MoELayer, "_at_once", lambda self, *a: taken.append(1) or real(self, *a))
    found, stats = results(layer, dtype, mixed), layer.stats
    monkeypatch.setattr(MoELayer, "_plan", lambda self, *a, **k: None)
    monkeypatch.setattr(MoELayer, "_is_in_one", lambda self, *a: False)
    expected = results(layer, dtype, mixed)
    assert taken == [1]
    for mine, wanted in zip(found, expected):
        assert mine.dtype == wanted.dtype and mine.stride() == wanted.stride()
        # Where three gradients meet, in the logits in evaluation or in tokens, autograd adds them in another order.
        exact = training and "shared_experts" not in options
        close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(mine, wanted, **({"rtol": 0, "atol": 0} if exact else close))
    for name in STATS:
        mine, wanted = getattr(stats, name), getattr(layer.stats, name)
        assert torch.equal(mine, wanted) and mine.shape == wanted.shape and not mine.requires_grad, name


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_layer_as_one_operator_is_that_of_float64(options):
    layer = make(**{**options, "gate_noise": 0.0})  # without noise, as it is drawn in float32
    exact = make(**{**options, "gate_noise": 0.0}).double()
    found, expected = results(layer, torch.float32, False), results(exact, torch.float64, False)
    assert torch.equal(layer.stats.demand, exact.stats.demand)
    for mine, wanted in zip(found, expected):
        assert float((mine - wanted).norm() / wanted.norm().clamp(min=1e-3)) < 2e-5


def test_a_layer_without_tokens_and_one_of_which_nothing_is_asked():
    layer = make(capacity_factor=0.0)
    y, aux = layer(torch.zeros(0, 50, 20))
    assert y.shape == (0, 50, 20) and float(aux.detach()) == 0
    y, aux = layer(draw(3, 50, 20, seed=3, dtype=torch.float32))  # of x no gradient, and of y none at all
    assert not layer.router.weight.grad and aux.requires_grad
    aux.backward()
    assert layer.router.weight.grad.any() and not layer.experts.fc1_weight.grad.any()
    layer.router.weight.requires_grad_(False)
    x = draw(3, 50, 20, seed=3, dtype=torch.float32).requires_grad_()
    layer(x)[0].sum().backward()
    assert x.grad.any() and layer.experts.fc1_weight.grad.any()


# Experts that are no whole vectors, and the options whose sums or exponentials are PyTorch's.
STEADY = {
    "top-1": {"num_experts": 12, "capacity_factor": 0.8},
    "top-2": {"num_experts": 12, "top_k": 2, "capacity_factor": 0.8, "normalize_gate": True, "z_loss_weight": 0.1},
    "100 experts": {"num_experts": 100, "top_k": 2, "balance_loss": "load_importance"},
    "sigmoid": {"num_experts": 12, "scores": "sigmoid", "balance_loss": "gshard", "top_k": 2, "capacity_factor": 0.0},
}


@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize("options", STEADY.values(), ids=STEADY)
@pytest.mark.parametrize(("dtype", "mixed"), PRECISIONS)
def test_a_layer_has_the_same_bits_on_every_number_of_threads(monkeypatch, dtype, mixed, options, in_one):
    """Of 3,000 tokens, whose sums PyTorch would share among threads."""
    layer = make(dtype, **options)  # rows few enough for AVX2 as well
    threads, found = torch.get_num_threads(), []
    if not in_one:
        monkeypatch.setattr(MoELayer, "_plan", lambda self, *a, **k: None)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            numbers = results(layer, dtype, mixed, images=60)
            found.append([*numbers, *(getattr(layer.stats, name).detach() for name in STATS)])
    finally:
        torch.set_num_threads(threads)
    assert found[0][3].shape == layer.router.weight.shape and found[0][3].any()
    for other in found[1:]:
        assert [n for n, (a, b) in enumerate(zip(found[0], other, strict=True)) if not torch.equal(a, b)] == []


@pytest.mark.skipif(extension.cpu_capability() != "avx512_bf16", reason="what this processor has is tested above")
def test_the_same_bits_with_avx2():
    environment = {**os.environ, "SWIN_MOE_CPU_CAPABILITY": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "same_bits_on_every"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


def test_when_a_layer_is_one_operator():
    x = draw(50, 20, seed=3, dtype=torch.float32)

    def takes(layer: MoELayer, x: Tensor = x, dtype: torch.dtype = torch.float32) -> bool:
        return layer._plan(x, dtype, 50, draws=False) is not None

    assert takes(make()) and takes(make(), dtype=torch.bfloat16)
    assert not takes(make(torch.float64), x.double(), torch.float64)
    assert not takes(make(router="cosine"))
    assert not takes(make(choice="expert", balance_loss="none", capacity_factor=1.0))
    assert not takes(make(num_experts=6, expert_groups=3, group_limit=2, balance_loss="gshard"))
    observed = make()
    observed.observer = lambda routing: None
    assert not takes(observed)
    hooked = make()
    hooked.router.register_forward_hook(lambda *a: None)
    assert not takes(hooked)


def test_a_layer_keeps_the_contract_of_an_operator():
    weights = [draw(*s, seed=n, dtype=torch.float32) for n, s in enumerate([(2, 5, 4), (2, 5), (2, 5, 4), (2, 4)])]
    x, router = draw(6, 4, seed=5, dtype=torch.float32), draw(2, 4, seed=6, dtype=torch.float32)
    slots = moe_layer.Slots(1, 6, None, None, False)
    options = moe_layer.Options(0, 0.0, 0.0, False, False, "gshard", 0.0, 6, 1.0, 0.1)
    arguments = x, router, None, *weights, None, None, *slots.numbers(), torch.float32, *options.numbers()
    torch.library.opcheck(torch.ops.swin_moe.moe_layer, arguments)
    y, *_, kept = torch.ops.swin_moe.moe_layer(*arguments)
    backward = y, None, x, router, weights[0], weights[2], None, kept, *options.numbers(), True, True, *[None] * 4
    torch.library.opcheck(torch.ops.swin_moe.moe_layer_backward, backward)
    noisy = options._replace(noise=0.5)
    with pytest.raises(ValueError, match="noise and dropout need words and the number of each of 6 tokens"):
        moe_layer.moe_layer(x, router, weights, slots, noisy, bias=None, words=None, token=None, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(tokens, channels\) and the router .* got \[6, 4\] and \[2, 3\]"):
        moe_layer.moe_layer(
            x, router[:, :3], weights, slots, options, bias=None, words=None, token=None, dtype=torch.float32
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_every_number_of_threads(dtype):
    tokens, threads, found = 1500, torch.get_num_threads(), []
    weights = [draw(*s, seed=n, dtype=dtype) for n, s in enumerate([(2, 36, 40), (2, 36), (2, 36, 40), (2, 40)])]
    x, gate = draw(tokens, 40, seed=5, dtype=dtype), draw(tokens, 2, seed=6, dtype=torch.float32)
    row = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(7))
    order = row_products.LayerOrder(row.view(tokens, 2), None, row.argsort(), torch.tensor([1000, 2000]))
    leaves = [t.requires_grad_() for t in (x, gate, *weights)]
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            y = row_products.expert_layer(leaves[0], leaves[1], leaves[2:], order, dtype=dtype, draw=None)
            found.append([y.detach(), *torch.autograd.grad(y, leaves, draw(tokens, 40, seed=8, dtype=dtype))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_when_it_is_taken():
    x = draw(50, 20, seed=3, dtype=torch.float32)

    def takes(layer: MoELayer, x: Tensor = x, dtype: torch.dtype = torch.float32) -> bool:
        routed = layer.choice.route(x, layer.router, tokens_per_image=50, training=False, random=None, token=None)
        return layer._is_in_one(routed, dtype)

    assert takes(make()) and takes(make(), dtype=torch.bfloat16)
    assert not takes(make(torch.float64), x.double(), torch.float64)
    assert not takes(make(), dtype=torch.float16)
    watched = make()
    watched.clock = PhaseClock(x.device)
    assert not takes(watched)
    padded = make()
    padded.dispatcher = PaddedDispatcher()
    assert not takes(padded)
    hooked = make()
    hooked.experts.register_forward_pre_hook(lambda *a: None)
    assert not takes(hooked)
    gathered = make()
    gathered.experts.gather = lambda parameter, name: parameter
    assert not takes(gathered)


def test_it_keeps_the_contract_of_an_operator():
    weights = [draw(*s, seed=n, dtype=torch.float32) for n, s in enumerate([(2, 5, 4), (2, 5), (2, 5, 4), (2, 4)])]
    x, gate = draw(3, 4, seed=5, dtype=torch.float32), draw(3, 1, seed=6, dtype=torch.float32)
    order = torch.tensor([[1], [0], [2]]), None, torch.tensor([1, 0, 2]), torch.tensor([1, 2])
    nothing = None, None, 0, 0, 0, 0.0, 1.0
    verb = torch.ops.swin_moe.expert_layer
    torch.library.opcheck(verb, (x, gate, *weights, *order, torch.float32, *nothing))
    y, *made = verb(x, gate, *weights, *order, torch.float32, *nothing)
    torch.library.opcheck(
        torch.ops.swin_moe.expert_layer_backward,
        (y, gate, *made, weights[0], weights[2], *order, *nothing, True, True, None, None, None, None),
    )
    with pytest.raises(ValueError, match=r"gate must be \[3, 1\] and contiguous, got \[3, 2\]"):
        verb(x, gate.expand(3, 2), *weights, *order, torch.float32, *nothing)
