"""LayerNorm's backward on the CPU against float64, the plain form and other numbers of threads, and where it runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swin_moe
from swin_moe.ops import layer_norm as module
from swin_moe.ops.layer_norm import LayerNorm, layer_norm, layer_norm_backward, serves
from tests.models.reference import TINY

compiled = pytest.mark.skipif("cpu" not in module._COMPILED, reason="this build has no such kernel")
ROWS, CHANNELS = (1, 7, 256, 257, 25088), (1, 96, 100, 768)
SIZES = [(n, c) for n in ROWS for c in CHANNELS if n * c < 5_000_000]
ALL = [True] * 3


def given(rows: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns the tensors that the operator takes; gradients are not 0 in the mean, as a bias' is not."""
    generator = torch.Generator().manual_seed(rows + channels)
    x, grad = (torch.randn(rows, channels, generator=generator).add(0.1).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    _, mean, rstd = torch.native_layer_norm(x, [channels], weight, bias, 1e-5)
    return [grad, x, mean, rstd, weight, bias]


def off(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, channels", SIZES)
def test_sums_equal_those_in_float64_and_the_gradient_of_x_is_pytorchs(rows, channels, dtype):
    tensors = given(rows, channels, dtype)
    grad_x, *sums = torch.ops.swin_moe.layer_norm_backward(*tensors, ALL)
    _, *true = layer_norm_backward(*(t.double() for t in tensors), ALL)
    _, *plain = layer_norm_backward(*tensors, ALL)
    grad, x, mean, rstd, weight, bias = tensors
    size = float(grad.double().norm())  # a channel's weight has gradients that cancel, or none with one channel
    for found, wanted, same in zip(sums, true, plain):
        assert found.dtype == torch.float32 and found.shape == (channels,)
        assert float((found.double() - wanted).norm()) <= 2e-6 * max(size, float(wanted.norm()))
        torch.testing.assert_close(found, same, rtol=1e-4, atol=2e-6 * max(size, 1))
    whole = torch.ops.aten.native_layer_norm_backward
    assert torch.equal(grad_x, whole(grad, x, [channels], mean, rstd, weight, bias, ALL)[0])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, channels", [(257, 96), (6272, 96), (6272, 100)])
def test_the_bits_do_not_depend_on_the_number_of_threads(rows, channels, dtype):
    tensors, threads, found = given(rows, channels, dtype), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(torch.ops.swin_moe.layer_norm_backward(*tensors, ALL))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0]))


@compiled
def test_bfloat16_rows_have_gradients_as_exact_as_their_values():
    torch.manual_seed(0)
    x, grad = torch.randn(6272, 96), torch.randn(6272, 96) + 0.1

    def gradients(function, rows, parameters):
        weight, bias = torch.ones(96, dtype=parameters), torch.zeros(96, dtype=parameters)
        leaves = [x.to(rows).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        y = function(leaves[0], (96,), *leaves[1:]) if function is F.layer_norm else function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    true = gradients(F.layer_norm, torch.float64, torch.float64)
    ours = gradients(layer_norm, torch.bfloat16, torch.float32)
    theirs = gradients(F.layer_norm, torch.bfloat16, torch.float32)
    for found, same, wanted in zip(ours[:2], theirs, true):
        assert off(found.detach(), wanted.detach()) <= 1.01 * off(same.detach(), wanted.detach())
    for found, wanted in zip(ours[1:], true[1:]):
        assert off(found, wanted) < 0.005


@compiled
def test_the_norms_of_a_mixed_step_have_the_gradients_that_pytorch_sums_in_float64(monkeypatch):
    """Each norm of a network that is trained under autocast, by what it was given and what came back to it."""
    torch.manual_seed(0)
    model = swin_moe.create_model("swin", **{**TINY, "img_size": 64, "embed_dim": 16}).train()
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.LayerNorm)}
    assert norms and all(type(norm) is LayerNorm for norm in norms.values())
    seen = {}

    def watch(name):
        def after(norm, inputs, y):
            seen[name] = [inputs[0].detach()]
            y.register_hook(lambda grad: seen[name].append(grad))

        return after

    for name, norm in norms.items():
        norm.register_forward_hook(watch(name))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(8, 3, 64, 64))
    F.cross_entropy(out.float(), torch.arange(8) % 3).backward()
    assert any(x.dtype == torch.bfloat16 for x, _ in seen.values())
    for name, (x, grad) in seen.items():
        weight, bias = (p.detach().double().requires_grad_() for p in (norms[name].weight, norms[name].bias))
        y = F.layer_norm(x.double(), weight.shape, weight, bias, norms[name].eps)
        true = torch.autograd.grad(y, (weight, bias), grad.double())
        assert off(norms[name].weight.grad, true[0]) < 0.02, name
        assert off(norms[name].bias.grad, true[1]) < 0.02, name


@compiled
def test_a_second_derivative_is_pytorchs():
    torch.manual_seed(0)
    leaves = [torch.randn(3, 5, 8), torch.randn(8), torch.randn(8)]

    def second(function):
        own = [t.clone().requires_grad_() for t in leaves]
        y = function(*own)
        first = torch.autograd.grad(y.square().sum(), own, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(3).sum() for g in first), own)]

    for found, wanted in zip(second(layer_norm), second(lambda x, w, b: F.layer_norm(x, (8,), w, b))):
        torch.testing.assert_close(found, wanted)


@compiled
def test_only_what_is_asked_for_is_computed_and_other_strides_give_the_same():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 6, 8, requires_grad=True), torch.randn(8), torch.randn(8)
    for needs in ([False, True, False], [False, False, True], [True, False, True]):
        leaves = [t.detach().clone().requires_grad_(needed) for t, needed in zip((x, weight, bias), needs)]
        layer_norm(*leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == needs
    plain, turned = (LayerNorm(8) for _ in range(2))
    plain(x).square().sum().backward()
    turned(x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)).square().sum().backward()
    assert torch.equal(plain.weight.grad, turned.weight.grad) and torch.equal(plain.bias.grad, turned.bias.grad)


def test_empty_rows_give_zeros():
    norm = LayerNorm(4)
    norm(torch.zeros(0, 4, requires_grad=True)).sum().backward()
    assert not norm.weight.grad.any() and not norm.bias.grad.any()


def test_a_layer_is_pytorchs_by_name_values_and_bits():
    ours, theirs = LayerNorm(8), nn.LayerNorm(8)
    assert ours.state_dict().keys() == theirs.state_dict().keys() and repr(ours) == repr(theirs)
    x = torch.randn(2, 3, 8)
    assert torch.equal(ours(x), theirs(x))
    others = [(LayerNorm(8, bias=False), nn.LayerNorm(8, bias=False))]
    others += [(LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8, elementwise_affine=False))]
    others += [(LayerNorm((3, 8)), nn.LayerNorm((3, 8)))]
    for a, b in others:
        assert torch.equal(a(x), b(x))
    copied = copy.deepcopy(ours).double()
    assert torch.equal(copied(x.double()), theirs.double()(x.double()))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        ours(torch.zeros(2, 7))


@compiled
def test_serves_training_on_the_cpu_in_the_dtypes_that_it_has():
    x, weight, bias = torch.randn(2, 8), nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
    assert all(serves(x.to(t), weight, bias) for t in (torch.float32, torch.bfloat16, torch.float16))
    assert not serves(x.double(), weight, bias) and not serves(x.to("meta"), weight, bias)
    assert not serves(x, weight.detach(), bias.detach()) and not serves(x, weight.bfloat16(), bias.bfloat16())
    with torch.no_grad():
        assert not serves(x, weight, bias)
    per_sample = torch.vmap(torch.func.grad(lambda w, row: layer_norm(row, w, bias).sum()), in_dims=(None, 0))
    assert per_sample(weight.detach(), x).shape == (2, 8)


def test_the_operator_is_complete():
    for needs in (ALL, [False, True, False]):
        torch.library.opcheck(torch.ops.swin_moe.layer_norm_backward, (*given(5, 8, torch.float32), needs))


@compiled
def test_bad_arguments_are_answered_by_a_sentence():
    grad, x, mean, rstd, weight, bias = given(5, 8, torch.float32)
    verb = torch.ops.swin_moe.layer_norm_backward
    with pytest.raises(ValueError, match="one number for each of 5 rows"):
        verb(grad, x, mean[1:], rstd, weight, bias, ALL)
    with pytest.raises(ValueError, match="must be \\(..., channels\\)"):
        verb(grad[1:], x, mean, rstd, weight, bias, ALL)
    with pytest.raises(TypeError, match="of the dtype of x"):
        verb(grad.bfloat16(), x, mean, rstd, weight, bias, ALL)
    with pytest.raises(TypeError, match="must be float32"):
        verb(grad, x, mean.double(), rstd, weight, bias, ALL)
