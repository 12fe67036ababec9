"""Linear layers in bfloat16 against autocast's, float64 and other numbers of threads, where they run, and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.ops.linear import Linear
from swin_moe.ops.mixed import linear as module
from swin_moe.ops.mixed.linear import mixed_linear, serves

compiled = pytest.mark.skipif("cpu" not in module._COMPILED, reason="this build has no such kernel")
SIZES = [(0, 8, 4), (1, 8, 4), (3, 7, 5), (257, 96, 100), (5000, 32, 96), (5000, 96, 32), (1400, 384, 400)]
ALL = [True] * 3


def given(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns rows, what comes back from them, weight and bias, all float32."""
    generator = torch.Generator().manual_seed(rows + inputs + outputs)
    sizes = (rows, inputs), (rows, outputs), (outputs, inputs), (outputs,)
    x, grad, weight, bias = (torch.randn(size, generator=generator) for size in sizes)
    return x, grad, weight / inputs**0.5, bias


def differentiated(function, x: Tensor, grad: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Returns what comes out under autocast, and the gradients of x and the parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, inputs, outputs", SIZES)
def test_equals_autocast(rows, inputs, outputs, dtype):
    x, grad, weight, bias = given(rows, inputs, outputs)
    ours = differentiated(lambda x, w, b: mixed_linear(x, w, b), x.to(dtype), grad, weight, bias)
    theirs = differentiated(lambda x, w, b: F.linear(x, w, b), x.to(dtype), grad, weight, bias)
    true = [x.bfloat16().double() @ weight.bfloat16().double().t() + bias.bfloat16()]
    rounded = grad.bfloat16().double()
    true += [rounded @ weight.bfloat16().double(), rounded.t() @ x.bfloat16().double(), rounded.sum(0)]
    for found, wanted, exact in zip(ours, theirs, true):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=1e-4 * max(rows, 1) ** 0.5)
        assert (found.double() - exact).norm() <= 1.05 * (wanted.double() - exact).norm() + 1e-6


@compiled
def test_copies_of_weights_have_the_same_bits_as_weights_and_no_bias_is_a_bias_of_zeros():
    x, grad, weight, bias = given(300, 20, 12)
    wide = differentiated(lambda x, w, b: mixed_linear(x, w, b), x, grad, weight, bias)
    copies = differentiated(lambda x, w, b: mixed_linear(x, w, b), x, grad, weight.bfloat16(), bias.bfloat16())
    assert [g.dtype for g in copies[2:]] == [torch.bfloat16] * 2
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(wide, copies))
    without = differentiated(lambda x, w: mixed_linear(x, w, None), x, grad, weight)
    zeros = differentiated(lambda x, w, b: mixed_linear(x, w, b), x, grad, weight, torch.zeros_like(bias))
    assert all(torch.equal(a, b) for a, b in zip(without, zeros))


@compiled
@pytest.mark.parametrize("rows, inputs, outputs", [(257, 96, 100), (5000, 32, 96)])
def test_the_bits_do_not_depend_on_the_number_of_threads(rows, inputs, outputs):
    tensors, threads, found = given(rows, inputs, outputs), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(differentiated(lambda x, w, b: mixed_linear(x, w, b), *tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0]))


@compiled
def test_only_what_is_asked_for_is_computed_and_other_strides_give_the_same():
    x, grad, weight, _ = (t.bfloat16() for t in given(40, 8, 12))
    whole = torch.ops.swin_moe.mixed_linear_backward(grad, x, weight, True, ALL)
    for needs in ([False, True, False], [True, False, False], [False, False, True]):
        found = torch.ops.swin_moe.mixed_linear_backward(grad, x, weight, True, needs)
        assert [g is not None and g.numel() > 0 for g in found] == needs
        assert all(torch.equal(a, b) for a, b, needed in zip(found, whole, needs) if needed)
    turned = [t.t().contiguous().t() for t in (grad, x)]
    again = torch.ops.swin_moe.mixed_linear_backward(*turned, weight, True, ALL)
    assert all(torch.equal(a, b) for a, b in zip(again, whole))


@compiled
def test_serves_what_autocast_gives_in_bfloat16_where_it_is_differentiated():
    x, weight = torch.randn(4, 8), nn.Parameter(torch.randn(3, 8))
    assert not serves(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert serves(x, weight) and serves(x.bfloat16(), weight) and serves(x, nn.Parameter(weight.bfloat16()))
        assert not serves(x.double(), weight) and not serves(x.half(), weight)
        assert not serves(x, weight.detach()) and not serves(x.to("meta"), weight)
        layer = Linear(8, 3)
        assert "MixedLinear" in type(layer(x).grad_fn).__name__
        with torch.no_grad():
            assert not serves(x, weight)
        per_sample = torch.vmap(torch.func.grad(lambda w, row: F.linear(row, w).float().sum()), in_dims=(None, 0))
        assert per_sample(weight.detach(), x).shape == (4, 3, 8)
    with torch.autocast("cpu", torch.float16):
        assert not serves(x, weight)


@compiled
def test_memory_that_one_step_left_is_the_nexts():
    weight = torch.randn(1 << 20)[None]  # 2 MiB in bfloat16

    def place() -> int:
        return torch.ops.swin_moe.half_weight(weight).data_ptr()

    assert place() == place()
    held = torch.ops.swin_moe.half_weight(weight)
    other = torch.ops.swin_moe.half_weight(weight)
    assert held.data_ptr() != other.data_ptr() and torch.equal(held, weight.bfloat16())
    held.resize_(2, 1 << 20)  # as any tensor
    assert torch.equal(held[0], weight[0].bfloat16())


def test_the_plain_form_and_the_operator_are_the_same():
    x, grad, weight, bias = (t.bfloat16() for t in given(37, 20, 12))
    verb, back = torch.ops.swin_moe.mixed_linear, torch.ops.swin_moe.mixed_linear_backward
    torch.testing.assert_close(verb(x, weight, bias), module._forward(x, weight, bias), rtol=2**-7, atol=1e-3)
    for wide in (True, False):
        found, plain = back(grad, x, weight, wide, ALL), module._backward(grad, x, weight, wide, ALL)
        torch.testing.assert_close(found, plain, rtol=2**-7, atol=1e-2)
    wide_weight = torch.tensor([[1.0, 1.00390625, -0.0, float("inf")]])
    assert torch.equal(torch.ops.swin_moe.half_weight(wide_weight), wide_weight.bfloat16())


def test_the_operators_are_complete():
    x, grad, weight, bias = given(5, 8, 4)
    torch.library.opcheck(torch.ops.swin_moe.half_weight, (weight,))
    half = [t.bfloat16() for t in (x, grad, weight, bias)]
    torch.library.opcheck(torch.ops.swin_moe.mixed_linear, (half[0], half[2], half[3]))
    for needs in (ALL, [False, True, False]):
        torch.library.opcheck(torch.ops.swin_moe.mixed_linear_backward, (half[1], half[0], half[2], True, needs))


@compiled
def test_bad_arguments_are_answered_by_a_sentence():
    x, grad, weight, bias = (t.bfloat16() for t in given(5, 8, 4))
    with pytest.raises(ValueError, match="x must be \\(..., inputs\\)"):
        torch.ops.swin_moe.mixed_linear(x[:, 1:], weight, bias)
    with pytest.raises(ValueError, match="bias must be \\(outputs,\\)"):
        torch.ops.swin_moe.mixed_linear(x, weight, bias[1:])
    with pytest.raises(TypeError, match="x and weight must be bfloat16"):
        torch.ops.swin_moe.mixed_linear(x.float(), weight, bias)
    with pytest.raises(TypeError, match="weight must be float32"):
        torch.ops.swin_moe.half_weight(weight)
    with pytest.raises(ValueError, match="grad must be \\(..., outputs\\)"):
        torch.ops.swin_moe.mixed_linear_backward(grad[1:], x, weight, True, ALL)
