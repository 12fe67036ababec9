"""Dispatch, experts and combine as one operator: the bits of the steps one after the other, and when it is taken."""

import pytest
import torch
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe.dispatch import PaddedDispatcher
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.phases import PhaseClock
from swin_moe.ops import row_products

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


def results(layer: MoELayer, dtype: torch.dtype, mixed: bool) -> list[Tensor]:
    x, grad = draw(3, 50, 20, seed=3, dtype=dtype).requires_grad_(), draw(3, 50, 20, seed=4, dtype=dtype)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        y, aux = layer(x)
    leaves = [x, *layer.parameters()]
    return [y.detach(), aux.detach(), *torch.autograd.grad([y, aux], leaves, [grad, torch.tensor(0.5)])]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("top_k", "factor"), [(1, 0.0), (1, 0.6), (2, 0.0), (3, 0.6)])
@pytest.mark.parametrize(("dtype", "mixed"), PRECISIONS)
def test_one_operator_has_the_bits_of_its_steps(monkeypatch, dtype, mixed, top_k, factor, dropout):
    layer = make(dtype, top_k=top_k, capacity_factor=factor, dropout=dropout)
    taken: list[int] = []
    real = MoELayer._in_one
    monkeypatch.setattr(MoELayer, "_in_one", lambda self, *a: taken.append(1) or real(self, *a))
    found = results(layer, dtype, mixed)
    monkeypatch.setattr(MoELayer, "_is_in_one", lambda self, *a: False)
    expected = results(layer, dtype, mixed)
    assert taken == [1] and (factor == 0 or int(layer.stats.dropped) > 0)
    for mine, wanted in zip(found, expected):
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted)


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
