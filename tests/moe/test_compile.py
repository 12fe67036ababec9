"""torch.compile of the layer: one graph without breaks, the same result, and no new graph with every step."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from swin_moe.config import MoEConfig
from swin_moe.moe.dispatch import LocalDispatcher, PaddedDispatcher
from swin_moe.moe.layer import MoELayer
from swin_moe.randomness import RandomContext

DIM = 16
CASES = {
    "official": {"dropout": 0.1},
    "two choices": {"top_k": 2, "normalize_gate": True, "batch_prioritized": False, "balance_loss": "gshard"},
    "cosine": {"router": "cosine"},
    "by need": {"capacity_factor": 0.0},
    "groups of images": {"capacity_scope": "images", "group_images": 1},
}


def build(dispatcher, **options):
    layer = MoELayer(DIM, 32, MoEConfig(num_experts=4, **options), fc2_bias=True, layer=1, init_std=0.5)
    layer.init_weights(0, "layer")
    layer.dispatcher = dispatcher()
    return layer


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(layer, compiled, x, random, **tolerance):
    results = []
    for forward in (layer, compiled):
        y, aux = forward(x, random)
        if layer.training:
            results.append([y, aux, *torch.autograd.grad(y.square().sum() + aux, [x, *layer.parameters()])])
        else:
            results.append([y, aux])
    for eager, traced in zip(*results):
        torch.testing.assert_close(traced, eager, **tolerance)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dispatcher", [LocalDispatcher, PaddedDispatcher])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_one_graph_and_the_same_result(options, dispatcher, training):
    if dispatcher is PaddedDispatcher:  # capacity by need, the default of evaluation, has no static shape
        options = {"eval_capacity_factor": 1.0, **options}
    if dispatcher is PaddedDispatcher and options.get("capacity_factor") == 0.0:
        options = {**options, "capacity_factor": 1.5}
    layer = build(dispatcher, **options).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(5):
        x = torch.randn(3, 12, DIM, generator=torch.Generator().manual_seed(step)).requires_grad_()
        # A graph leaves the router's products to PyTorch, which adds up in another order.
        compare(layer, compiled, x, RandomContext(7, step, torch.arange(3) + step), rtol=2e-4, atol=2e-4)
    assert counter.frame_count <= 2  # one, and one in which the step is a variable


@pytest.mark.full
@pytest.mark.parametrize("dispatcher", [LocalDispatcher, PaddedDispatcher])
def test_with_generated_code(dispatcher):
    layer = build(dispatcher, **CASES["official"])
    x = torch.randn(3, 12, DIM, requires_grad=True)
    random = RandomContext(7, 1, torch.arange(3))
    compare(layer, torch.compile(layer, fullgraph=True), x, random, rtol=1e-4, atol=1e-4)
