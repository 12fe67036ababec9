"""The residual sum and LayerNorm as one operator against the plain expression, and where the network uses it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import swin_moe
from swin_moe.models.layers import add_and_norm, norm_and_add
from swin_moe.ops.layer_norm import LayerNorm
from swin_moe.ops.residual_norm import (
    LARGEST_CHANNELS,
    add_branch,
    is_fused,
    is_replaceable,
    norm_residual,
    residual_norm,
)
from swin_moe.randomness import RandomContext

SHAPES = [(3, 4, 5, 96), (2, 7, 33), (5, 1), (0, 4, 8)]


def inputs(shape, dtype, branch_dtype, *, factor):
    generator = torch.Generator().manual_seed(sum(shape))
    x, branch = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator, dtype=dtype) for _ in range(2))
    factors = (torch.arange(shape[0]) % 3).to(dtype) * 0.7 if factor else None
    tensors = x, branch.to(branch_dtype), weight, bias
    return [t.requires_grad_() for t in tensors], factors


def results(function, tensors):
    total, normed = function(*tensors)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(total.shape, generator=generator).to(total) for _ in range(2)]
    loss = (total * weights[0]).sum() + (normed * weights[1]).sum()
    return [total, normed, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_plain_expression(shape, dtypes, factor):
    tensors, factors = inputs(shape, *dtypes, factor=factor)

    def plain(x, branch, weight, bias):
        total = add_branch(x, branch, factors)
        return total, F.layer_norm(total, weight.shape, weight, bias, 1e-5)

    def strided(x, branch, weight, bias):
        x, branch = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, branch))
        return residual_norm(x, branch, factors, weight, bias, 1e-5)

    expected = results(plain, tensors)
    for function in (lambda x, branch, *rest: residual_norm(x, branch, factors, *rest, 1e-5), strided):
        for made, wanted in zip(results(function, tensors), expected):
            assert made.dtype == wanted.dtype
            # The gradient of a bfloat16 branch is rounded before the factor here and after it there.
            torch.testing.assert_close(made, wanted, rtol=2**-7 if made.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_of_a_branch_equals_the_plain_expression(shape, dtypes, factor):
    tensors, factors = inputs(shape, *dtypes, factor=factor)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtypes[0])

    def plain(x, branch, weight, bias):
        return add_branch(x, F.layer_norm(branch.to(x.dtype), weight.shape, weight, bias, 1e-5), factors)

    def strided(x, branch, *rest):
        x, branch = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, branch))
        return norm_residual(x, branch, factors, *rest, 1e-5)

    made = []
    for function in (plain, strided, lambda x, branch, *rest: norm_residual(x, branch, factors, *rest, 1e-5)):
        out = function(*tensors)
        made.append([out, *torch.autograd.grad(out, tensors, weights)])
    for expected, *others in zip(*made):
        for found in others:
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_norm_of_a_branch():
    tensors, factors = inputs((3, 2, 5), torch.float64, torch.float64, factor=True)
    x, branch, *parameters = tensors
    assert torch.autograd.gradcheck(lambda *t: norm_residual(t[0], t[1], factors, *t[2:], 1e-5), tensors)
    assert torch.autograd.gradcheck(lambda *t: norm_residual(x, t[0], None, *parameters, 1e-5), [branch])
    torch.library.opcheck(torch.ops.swin_moe.norm_residual, (x, branch, factors, *parameters, 1e-5))


def test_gradients_and_operator():
    tensors, factors = inputs((3, 2, 5), torch.float64, torch.float64, factor=True)
    x, branch, *parameters = tensors
    assert torch.autograd.gradcheck(lambda *t: residual_norm(t[0], t[1], factors, *t[2:], 1e-5), tensors)
    # A result that nobody uses has no gradient.
    assert torch.autograd.gradcheck(lambda *t: residual_norm(t[0], t[1], factors, *t[2:], 1e-5)[1], tensors)
    assert torch.autograd.gradcheck(lambda *t: residual_norm(t[0], t[1], None, *t[2:], 1e-5)[0], tensors)
    torch.library.opcheck(torch.ops.swin_moe.residual_norm, (x, branch, factors, *parameters, 1e-5))


def test_the_cpu_keeps_its_operators():
    norm = nn.LayerNorm(8)
    x, branch = torch.randn(2, 2, 3, 8)
    assert not is_fused(norm, x, branch)
    total, normed = add_and_norm(x, branch, None, norm)
    assert torch.equal(total, x + branch) and torch.equal(normed, norm(x + branch))
    assert torch.equal(norm_and_add(x, branch, None, norm), x + norm(branch))


def test_a_norm_that_does_more_is_called():
    assert is_replaceable(nn.LayerNorm(8), 8) and is_replaceable(LayerNorm(8), 8)
    hooked, own = nn.LayerNorm(8), nn.LayerNorm(8)
    hooked.register_forward_hook(lambda *_: None)
    own.forward = lambda x: x
    others = [nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8, bias=False), nn.Identity()]
    others += [nn.LayerNorm(8).bfloat16(), nn.LayerNorm((2, 8)), hooked, own]
    assert not any(is_replaceable(norm, 8) for norm in others)
    assert not is_replaceable(nn.LayerNorm(LARGEST_CHANNELS + 1), LARGEST_CHANNELS + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_a_block_on_the_device(name, dtype, monkeypatch):
    block = (
        swin_moe.create_model(
            name, img_size=32, patch_size=2, embed_dim=32, depths=[2], num_heads=[2], window_size=8, drop_path_rate=0.3
        )
        .layers[0]
        .blocks[1]
        .cuda()
    )
    x = torch.randn(4, 16, 16, 32, device="cuda", requires_grad=True)
    factors = torch.tensor([[0.0, 1.4, 1.4, 1.4], [1.4, 0.0, 1.4, 1.4]], device="cuda")
    random, made = RandomContext(1, 2, torch.arange(4, device="cuda")), []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("swin_moe.models.layers.is_fused", lambda *_: False)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            y = block(x, random, True, factors)[0]
        made.append([y, *torch.autograd.grad(y.float().square().mean(), [x, *block.parameters()])])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for fused, plain in zip(*made):
        assert (fused - plain).norm() <= tolerance * plain.norm() + 1e-7
