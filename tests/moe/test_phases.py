"""The clock of a layer: phases by hand with a slow part, and no effect on the result."""

import time

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.phases import PHASES, PhaseClock, mark
from swin_moe.randomness import RandomContext

CPU = torch.device("cpu")


def test_seconds_go_to_the_phase_that_ends():
    clock = PhaseClock(CPU)
    clock.end("")
    time.sleep(0.02)
    clock.end("experts")
    clock.end("")
    time.sleep(0.02)
    clock.end("")  # nobody's
    clock.end("combine")
    seconds = clock.seconds()
    assert tuple(seconds) == PHASES and seconds["experts"] >= 0.02
    assert seconds["combine"] < 0.02 and seconds["route"] == seconds["dispatch"] == 0.0


def test_without_a_clock_a_mark_is_nothing():
    x = torch.ones(2, requires_grad=True)
    assert mark(x, None, forward="route", backward="route") is x


class _Slow(torch.autograd.Function):
    """Sleeps 20 ms forward and 30 ms backward."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.02)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.03)
        return grad


def slow(function):
    return lambda *arguments: _Slow.apply(function(*arguments))


@pytest.mark.parametrize("phase", ["route", "experts", "combine"])
def test_a_slow_phase_is_found_in_both_directions(phase, monkeypatch):
    layer = MoELayer(8, 16, MoEConfig(num_experts=4, dropout=0.1), fc2_bias=True, layer=0, init_std=0.5)
    layer.init_weights(0, "layer")
    x = torch.randn(2, 6, 8, requires_grad=True)
    random = RandomContext(1, 2, torch.arange(2))
    plain = layer(x, random)
    if phase == "route":
        monkeypatch.setattr(layer.router, "forward", slow(layer.router.forward))
    elif phase == "experts":
        monkeypatch.setattr(layer.experts, "forward", slow(layer.experts.forward))
    else:
        monkeypatch.setattr(layer.dispatcher, "combine", slow(layer.dispatcher.combine), raising=False)
    layer.clock = PhaseClock(CPU)
    timed = layer(x, random)
    assert torch.equal(plain[0], timed[0]) and torch.equal(plain[1], timed[1])
    (timed[0].sum() + timed[1]).backward()
    seconds = layer.clock.seconds()
    assert seconds[phase] >= 0.05
    assert max(seconds, key=seconds.get) == phase
