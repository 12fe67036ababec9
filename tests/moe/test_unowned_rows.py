"""Rows that no expert owns: a grouped product leaves them as memory was, and nothing of it may show.

Where the host does not know how many pairs are kept (CUDA, traced graphs) there is a row for every pair, and those of
dropped pairs lie beyond the experts' rows.
"""

from contextlib import contextmanager

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe import experts
from swin_moe.moe.dispatch import Dispatched, LocalDispatcher, make_order, take_tokens
from swin_moe.moe.layer import MoELayer
from swin_moe.ops import grouped_linear as grouped
from swin_moe.randomness import RandomContext

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class AskingNoHost(LocalDispatcher):
    """Dispatches on the CPU as on a device."""

    def dispatch(self, x, routing, pair):
        order = make_order(routing, None)
        return Dispatched(
            take_tokens(x, order), routing.kept.sum(dim=0), None if pair is None else pair.flatten()[order.pair], order
        )


@contextmanager
def memory_full_of(value, device):
    """New memory holds nan, or what it holds."""
    if value != value:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not initialized, on every device
    blocks = [torch.full((4 << 20,), value, device=device) for _ in range(4)]  # and an allocator's own, on CUDA
    del blocks
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def in_one_product(monkeypatch):
    monkeypatch.setattr(grouped, "use_grouped", lambda device, dtype, *_: dtype == torch.bfloat16)
    monkeypatch.setattr(experts, "takes", lambda *_: False)  # the kernels for few rows fill what is left over


def step(value, device):
    """Returns y, the gradients, and how many pairs were dropped, of a layer with 8 slots for 16 pairs an expert."""
    layer = MoELayer(16, 32, MoEConfig(num_experts=4, capacity_factor=0.5), fc2_bias=True, layer=0, init_std=0.5)
    layer.init_weights(0, "layer")
    layer.dispatcher = AskingNoHost()
    layer.to(device).train()
    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    with memory_full_of(value, device):
        with torch.autocast(device, dtype=torch.bfloat16):
            y, aux = layer(x, RandomContext(1, 2, torch.arange(4, device=device)))
        grads = torch.autograd.grad(y.float().square().sum() + aux, [x, *layer.parameters()])
    dropped = layer.stats.demand.sum() - layer.stats.demand.clamp(max=8).sum()
    return [y.detach(), *grads], int(dropped)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_them_shows(device):
    found, dropped = step(float("nan"), device)
    expected, _ = step(0.0, device)
    assert dropped > 0
    for ours, other in zip(found, expected):
        assert ours.isfinite().all() and torch.equal(ours, other)


@pytest.mark.parametrize("device", DEVICES)
def test_the_test_sees_them(device, monkeypatch):
    """The weight of a row that is not owned, but read: what the layer must not do."""
    original = experts.grouped_linear

    def reads_all(x, weight, bias, counts, **options):
        y = original(x, weight, bias, counts, **options)
        return y + y.sum(0, keepdim=True) * 0

    monkeypatch.setattr(experts, "grouped_linear", reads_all)
    found, _ = step(float("nan"), device)
    assert not all(t.isfinite().all() for t in found)
