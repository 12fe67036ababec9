"""The kernels' draws against the Python form of swin_moe/randomness.py, bit for bit, and their gradients."""

import numpy as np
import pytest
import torch

from swin_moe.ops import extension, random_draws
from swin_moe.ops.random_draws import drop_path_factors, drop_units, gate_noise, with_words
from swin_moe.randomness import RandomContext, derive_key, keep_mask, normal

ROWS = torch.tensor([0, 1, 5, 2**31, 2**32, 2**40 + 7, 123456789])
SEEDS = [(0, 0), (7, 3), (2**31 - 1, 10**6), (2**62 + 5, 1)]
needs_kernels = pytest.mark.skipif(not extension.available("cpu"), reason="needs the compiled library")


def context(seed=7, step=3, rows=ROWS):
    return RandomContext(seed, step, rows)


def equal_bits(a, b):
    """Returns whether all is the same, the sign of zero too; which nan it is does not count."""
    assert a.dtype == b.dtype
    a, b = (value.masked_fill(value.isnan(), 0).view(torch.uint8) for value in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("seed, step", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_path_is_the_draw_of_every_layer(seed, step, dtype):
    random, rates = context(seed, step, torch.arange(50) * 3), [0.0, 0.1, 0.35, 0.5, 0.9]
    factors = drop_path_factors(random, rates, dtype)
    assert factors.shape == (2, 5, 50)
    for purpose, own in zip(("drop_path_mixer", "drop_path_ffn"), factors):
        for layer, rate in enumerate(rates):
            keep = keep_mask(random.key(purpose, layer), random.sample, 1, drop=rate)[:, 0]
            assert equal_bits(own[layer], keep.to(dtype).div_(1.0 - rate))


@pytest.mark.parametrize("seed, step", SEEDS)
@pytest.mark.parametrize("site", [None, 0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("units, drop", [(1, 0.5), (48, 0.1), (67, 0.9), (33, 0.0)])
def test_dropped_units_are_the_mask(seed, step, site, dtype, units, drop):
    random, scale = context(seed, step), 1.0 / (1.0 - drop)
    x = torch.randn(len(ROWS), units).to(dtype)
    x[0, 0], x[1, 0], x[2, 0] = float("inf"), float("nan"), -0.0
    x.requires_grad_()
    y = drop_units(x, random, ROWS, purpose="dropout", layer=2, site=site, drop=drop, scale=scale)
    key = random.key("dropout", 2)
    factor = keep_mask(key if site is None else derive_key(key, site), ROWS, units, drop=drop).to(dtype).mul_(scale)
    expected = x.detach() * factor
    assert equal_bits(y.detach(), expected) and torch.equal(y.isnan(), expected.isnan())
    grad = torch.randn(len(ROWS), units).to(dtype)
    y.backward(grad)
    assert equal_bits(x.grad, grad * factor)


@pytest.mark.parametrize("seed, step", SEEDS)
@pytest.mark.parametrize("units", [1, 8, 129])
def test_noise_is_the_normal_draw(seed, step, units):
    rows = torch.cat([ROWS, torch.arange(500)])
    random = context(seed, step)
    assert equal_bits(gate_noise(random, rows, units, layer=4), normal(random.key("gate_noise", 4), rows, units))


@needs_kernels
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_kernels_and_python_agree_on_any_number_of_rows(rows):
    random = with_words(context(rows=torch.arange(rows)))
    x = torch.randn(9, rows).t()
    for name, *arguments in (
        ("drop_path_factors", random.words, random.sample, [0.2], [1, 2], torch.float32),
        ("random_dropout", x, random.words, 1, 3, -1, random.sample, 0.4, 1.25),
        ("random_normal", random.words, 0, 0, random.sample, 5),
    ):
        kernel = getattr(random_draws, f"_{name}")
        assert equal_bits(getattr(torch.ops.swin_moe, name)(*arguments), kernel(*arguments))
        torch.library.opcheck(getattr(torch.ops.swin_moe, name), arguments)


@needs_kernels
def test_threads_draw_the_same(monkeypatch):
    random, x = context(rows=torch.arange(4096)), torch.randn(4096, 96)
    draw = lambda: drop_units(x, random, random.sample, purpose="dropout", layer=0, drop=0.5, scale=2.0)  # noqa: E731
    alone = draw()
    torch.set_num_threads(3)
    try:
        assert equal_bits(draw(), alone)
    finally:
        torch.set_num_threads(1)


def test_words_are_the_seed_and_the_step_and_made_once():
    random = with_words(context(2**62 + 5, 9))
    assert random.words.tolist() == [2**62 + 5, 9]
    assert with_words(random) is random


@pytest.mark.parametrize("wrong", ["words", "rows", "drop"])
@needs_kernels
def test_what_is_wrong_is_named(wrong):
    random = with_words(context())
    arguments = {"words": random.words, "rows": ROWS, "drop": 0.5}
    arguments[wrong] = {"words": random.words.int(), "rows": ROWS[1:], "drop": 1.0}[wrong]
    with pytest.raises(
        ValueError, match={"words": "seed, step", "rows": "x must be", "drop": "drop must be in"}[wrong]
    ):
        torch.ops.swin_moe.random_dropout(
            torch.randn(len(ROWS), 4), arguments["words"], 0, 0, -1, arguments["rows"], arguments["drop"], 1.0
        )


def test_a_compiled_draw_serves_every_step():
    def draw(x, random):
        return drop_units(x, with_words(random), random.sample, purpose="dropout", layer=1, drop=0.5, scale=2.0) * 2

    x, graphs = torch.randn(len(ROWS), 16, requires_grad=True), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(draw, fullgraph=True, backend=backend)
    for step in range(5):
        random = context(step=step)
        y = compiled(x, random)
        assert torch.equal(y, draw(x, random))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, torch.autograd.grad(draw(x, random).sum(), x)[0])
    assert len(graphs) <= 2  # the second, where the step turned out to vary


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.7])
def test_dropout_divides_as_it_always_did(rate):
    from swin_moe.models.layers import dropout, dropout_factor, token_rows

    random = RandomContext(3, 1, torch.tensor([4, 9]))
    x = torch.randn(2, 3, 5, 6)
    rows = token_rows(random.sample, 15)
    key = derive_key(random.key("dropout", 2), 1)
    factor = keep_mask(key, rows, 6, drop=rate).float().div_(1.0 - rate)
    assert equal_bits(dropout_factor(rate, rows, 6, random, layer=2, site=1), factor)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        expected = x.to(dtype) * factor.view(x.shape).to(dtype)
        assert equal_bits(dropout(x.to(dtype), rate, random, layer=2, site=1), expected)
    assert np.isclose(factor.max(), 1 / (1 - rate))
