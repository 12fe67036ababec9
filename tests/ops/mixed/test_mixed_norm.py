"""LayerNorm of bfloat16 rows against float64, PyTorch and other numbers of threads, and where it runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.ops.layer_norm import LayerNorm, layer_norm
from swin_moe.ops.mixed import norm as module
from swin_moe.ops.mixed.norm import mixed_norm

compiled = pytest.mark.skipif(not module.compiled(), reason="this build has no such kernel")
SIZES = [(n, c) for n in (0, 1, 3, 256, 257, 6272) for c in (1, 7, 16, 96, 100, 768) if n * c < 1_000_000]
ALL = [True] * 3


def given(rows: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns rows, what comes back to them, weight and bias; gradients are not 0 in the mean, as a bias' is not."""
    generator = torch.Generator().manual_seed(seed + rows + channels)
    x, grad = (torch.randn(rows, channels, generator=generator).add(0.1).bfloat16() for _ in range(2))
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    return x, grad, weight, bias


def differentiated(function, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Returns what comes out, and the gradients of x, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def in_float64(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.double(), weight.shape, weight.double(), bias.double())


@pytest.mark.parametrize("rows, channels", SIZES)
def test_equals_float64_but_for_one_rounding(rows, channels):
    x, grad, weight, bias = given(rows, channels)
    ours = differentiated(lambda *leaves: mixed_norm(*leaves, 1e-5), x, grad, weight, bias)
    true = differentiated(in_float64, x, grad, weight, bias)
    torch.testing.assert_close(ours[0].double(), true[0], rtol=2**-8, atol=1e-5)
    if channels > 1:  # the gradient of one channel is 0, times a rstd of 300; what is compared with is rounded, too
        torch.testing.assert_close(ours[1].double(), true[1].double(), rtol=2**-7, atol=2e-4)
    size = max(float(grad.double().norm()), 1.0)
    for found, wanted in zip(ours[2:], true[2:]):
        assert found.dtype == torch.float32
        assert float((found.double() - wanted).norm()) <= 4e-6 * max(size, float(wanted.norm()))


@pytest.mark.parametrize("rows, channels", [(256, 96), (257, 100)])
def test_no_further_from_float64_than_pytorch(rows, channels):
    x, grad, weight, bias = given(rows, channels)
    true = differentiated(in_float64, x, grad, weight, bias)
    ours = differentiated(lambda *leaves: mixed_norm(*leaves, 1e-5), x, grad, weight, bias)
    theirs = differentiated(lambda x, w, b: F.layer_norm(x, w.shape, w, b), x, grad, weight, bias)
    for a, b, wanted in zip(ours, theirs, true):
        assert (a.double() - wanted.double()).norm() <= 1.02 * (b.double() - wanted.double()).norm()


@compiled
@pytest.mark.parametrize("rows, channels", [(257, 96), (6272, 96), (6272, 100)])
def test_the_bits_do_not_depend_on_the_number_of_threads(rows, channels):
    tensors, threads, found = given(rows, channels), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(differentiated(lambda *leaves: mixed_norm(*leaves, 1e-5), *tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0]))


@compiled
def test_only_what_is_asked_for_is_computed_and_other_strides_give_the_same():
    x, grad, weight, bias = given(24, 8)
    y, mean, rstd = torch.ops.swin_moe.mixed_norm(x, weight, bias, 1e-5)
    whole = torch.ops.swin_moe.mixed_norm_backward(grad, x, mean, rstd, weight, ALL)
    for needs in ([False, True, False], [True, False, False], [False, False, True]):
        found = torch.ops.swin_moe.mixed_norm_backward(grad, x, mean, rstd, weight, needs)
        assert [g is not None and g.numel() > 0 for g in found] == needs
        assert all(torch.equal(a, b) for a, b, needed in zip(found, whole, needs) if needed)
    turned = [t.t().contiguous().t() for t in (x, grad)]
    assert torch.equal(torch.ops.swin_moe.mixed_norm(turned[0], weight, bias, 1e-5)[0], y)
    again = torch.ops.swin_moe.mixed_norm_backward(turned[1], turned[0], mean, rstd, weight, ALL)
    assert all(torch.equal(a, b) for a, b in zip(again, whole))


@compiled
def test_norms_of_bfloat16_rows_are_this_one_and_their_second_derivative_is_pytorchs():
    x, grad, _, _ = given(6, 8)
    norm = LayerNorm(8)
    rows = x.clone().requires_grad_()
    assert "MixedNorm" in type(norm(rows).grad_fn).__name__
    assert "MixedNorm" not in type(norm(rows.float()).grad_fn).__name__

    def second(function):
        leaf, weight = x.clone().requires_grad_(), nn.Parameter(torch.ones(8))
        first = torch.autograd.grad(function(leaf, weight).float().square().sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(first.float().pow(3).sum(), weight)[0]

    bias = torch.zeros(8)
    found = second(lambda x, w: layer_norm(x, w, bias))
    torch.testing.assert_close(found, second(lambda x, w: F.layer_norm(x, (8,), w, bias)), rtol=0.05, atol=0.1)


@compiled
def test_the_plain_form_is_the_same():
    x, grad, weight, bias = given(37, 20)
    y, mean, rstd = torch.ops.swin_moe.mixed_norm(x, weight, bias, 1e-5)
    plain = module._forward(x, weight, bias, 1e-5)
    torch.testing.assert_close((y, mean, rstd), plain, rtol=2**-7, atol=1e-6)
    found = torch.ops.swin_moe.mixed_norm_backward(grad, x, mean, rstd, weight, ALL)
    torch.testing.assert_close(found, module._backward(grad, x, mean, rstd, weight, ALL), rtol=2**-7, atol=1e-4)


def test_the_operators_are_complete():
    x, grad, weight, bias = given(5, 8)
    torch.library.opcheck(torch.ops.swin_moe.mixed_norm, (x, weight, bias, 1e-5))
    _, mean, rstd = torch.ops.swin_moe.mixed_norm(x, weight, bias, 1e-5)
    for needs in (ALL, [False, True, False]):
        torch.library.opcheck(torch.ops.swin_moe.mixed_norm_backward, (grad, x, mean, rstd, weight, needs))


@compiled
def test_bad_arguments_are_answered_by_a_sentence():
    x, grad, weight, bias = given(5, 8)
    _, mean, rstd = torch.ops.swin_moe.mixed_norm(x, weight, bias, 1e-5)
    verb, back = torch.ops.swin_moe.mixed_norm, torch.ops.swin_moe.mixed_norm_backward
    with pytest.raises(ValueError, match="x must be \\(..., channels\\)"):
        verb(x, weight[1:], bias, 1e-5)
    with pytest.raises(ValueError, match="bias must be of the shape of weight"):
        verb(x, weight, bias[1:], 1e-5)
    with pytest.raises(TypeError, match="x must be bfloat16"):
        verb(x.float(), weight, bias, 1e-5)
    with pytest.raises(TypeError, match="must be float32"):
        verb(x, weight.bfloat16(), bias, 1e-5)
    with pytest.raises(ValueError, match="of the shape and dtype of x"):
        back(grad.float(), x, mean, rstd, weight, ALL)
    with pytest.raises(ValueError, match="one number for each of 5 rows"):
        back(grad, x, mean[1:], rstd, weight, ALL)
