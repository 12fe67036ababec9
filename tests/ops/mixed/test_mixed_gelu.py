"""Bias and GELU of bfloat16 rows against float64, PyTorch and other numbers of threads, and where they run."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.models.layers import Mlp
from swin_moe.ops.mixed import gelu as module
from swin_moe.ops.mixed.gelu import mixed_gelu

compiled = pytest.mark.skipif(not module.compiled(), reason="this build has no such kernel")
SIZES = [(n, c) for n in (0, 1, 3, 256, 257, 1568) for c in (1, 7, 16, 100, 384)]


def all_numbers() -> Tensor:
    """Returns the bfloat16 numbers that are finite and not so small that half of one is none."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return every[torch.isfinite(every) & ((every == 0) | (every.float().abs() > 1e-30))]


def given(rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + channels)
    x, grad = (2 * torch.randn(rows, channels, generator=generator) for _ in range(2))
    return x.bfloat16(), (grad + 0.1).bfloat16(), torch.randn(channels, generator=generator)


def differentiated(function, x: Tensor, grad: Tensor, bias: Tensor) -> list[Tensor]:
    """Returns what comes out, and the gradients of x and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("rows, channels", SIZES)
def test_equals_float64_but_for_one_rounding(rows, channels):
    x, grad, bias = given(rows, channels)
    ours = differentiated(mixed_gelu, x, grad, bias)
    rounded = bias.bfloat16().float()
    true = differentiated(lambda x, b: F.gelu(x.double() + b.double()), x, grad, rounded)
    torch.testing.assert_close(ours[0].double(), true[0], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), true[1].double(), rtol=2**-7, atol=1e-4)  # true is rounded, too
    assert ours[2].dtype == torch.float32
    size = max(float(grad.double().norm()), 1.0)
    off = (ours[2].double() - true[2].double()).norm()
    assert float(off) <= 2e-5 * size + 2**-8 * float(true[2].norm())
    copies = differentiated(mixed_gelu, x, grad, bias.bfloat16())  # of weights, which stand for autocast's cast
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, copies))


@compiled
def test_every_number_is_one_rounding_off_at_most_and_nearer_than_pytorchs():
    x, none = all_numbers()[:, None], torch.zeros(1)
    true = F.gelu(x.double())
    ours, theirs = torch.ops.swin_moe.mixed_gelu(x, none), F.gelu(x)
    rounded = true.bfloat16()
    inside = x > -6.5  # beyond, ours is -0 and what is true is less than 3e-10
    assert int((ours != rounded)[inside].sum()) < int((theirs != rounded)[inside].sum())
    torch.testing.assert_close(ours[inside].double(), true[inside], rtol=2**-8, atol=0)
    assert float(ours[~inside].abs().max()) < 3e-10
    slope = torch.ops.swin_moe.mixed_gelu_backward(torch.ones_like(x), x, none)[0]
    leaf = x.double().requires_grad_()
    wanted = torch.autograd.grad(F.gelu(leaf).sum(), leaf)[0]
    wanted = wanted.where(x.abs() < 30, (x > 0).double())  # where squares overflow
    torch.testing.assert_close(slope.double(), wanted, rtol=2**-8, atol=1.2e-5)


@compiled
def test_what_is_not_finite_is_as_pytorchs():
    x = torch.tensor([float("nan"), float("inf"), float("-inf")]).bfloat16()[:, None]
    y = torch.ops.swin_moe.mixed_gelu(x, torch.zeros(1))
    assert y[0].isnan() and y[1] == float("inf") and y[2].isnan() == F.gelu(x)[2].isnan()
    slope = torch.ops.swin_moe.mixed_gelu_backward(torch.ones_like(x), x, torch.zeros(1))[0]
    assert slope.isnan().tolist() == torch.ops.aten.gelu_backward(torch.ones_like(x), x).isnan().tolist()


@compiled
@pytest.mark.parametrize("rows, channels", [(257, 96), (1568, 384), (1568, 100)])
def test_the_bits_do_not_depend_on_the_number_of_threads(rows, channels):
    tensors, threads, found = given(rows, channels), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(differentiated(mixed_gelu, *tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0]))


@compiled
def test_a_feed_forward_network_under_autocast_is_as_near_to_float64_as_pytorchs():
    torch.manual_seed(0)
    layer = Mlp(24, 100, fc2_bias=True, drop=0.0, layer=0)
    x, grad = torch.randn(3, 5, 7, 24), torch.randn(3, 5, 7, 24)

    def gradients(call):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(leaf)
        return [y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad.to(y.dtype))]

    ours = gradients(layer)
    theirs = gradients(
        lambda x: F.linear(F.gelu(F.linear(x, layer.fc1.weight, layer.fc1.bias)), layer.fc2.weight, layer.fc2.bias)
    )
    wide = [p.detach().double().requires_grad_() for p in layer.parameters()]
    leaf = x.double().requires_grad_()
    y = F.linear(F.gelu(F.linear(leaf, *wide[:2])), *wide[2:])
    true = [y, *torch.autograd.grad(y, [leaf, *wide], grad.double())]
    for a, b, wanted in zip(ours, theirs, true):
        assert a.dtype == b.dtype
        assert (a.double() - wanted).norm() <= 1.1 * (b.double() - wanted).norm()


@compiled
def test_the_plain_form_is_the_same():
    x, grad, bias = given(37, 20)
    y = torch.ops.swin_moe.mixed_gelu(x, bias)
    torch.testing.assert_close(y, module._forward(x, bias), rtol=2**-7, atol=1e-6)
    found = torch.ops.swin_moe.mixed_gelu_backward(grad, x, bias)
    torch.testing.assert_close(found, module._backward(grad, x, bias), rtol=2**-7, atol=1e-3)


def test_the_operators_are_complete():
    x, grad, bias = given(5, 8)
    torch.library.opcheck(torch.ops.swin_moe.mixed_gelu, (x, bias))
    torch.library.opcheck(torch.ops.swin_moe.mixed_gelu_backward, (grad, x, bias))


@compiled
def test_bad_arguments_are_answered_by_a_sentence():
    x, grad, bias = given(5, 8)
    with pytest.raises(ValueError, match="x must be \\(..., channels\\)"):
        torch.ops.swin_moe.mixed_gelu(x, bias[1:])
    with pytest.raises(TypeError, match="x must be bfloat16 and bias float32"):
        torch.ops.swin_moe.mixed_gelu(x, bias.bfloat16())
    with pytest.raises(ValueError, match="of the shape and dtype of x"):
        torch.ops.swin_moe.mixed_gelu_backward(grad[1:], x, bias)
