"""The residual sum of bfloat16 maps: PyTorch's bits, its gradients, and where it runs."""

import pytest
import torch
from torch import Tensor

from swin_moe.ops.mixed import residual as module
from swin_moe.ops.mixed.residual import mixed_residual, serves
from swin_moe.ops.residual_norm import add_branch

compiled = pytest.mark.skipif("cpu" not in module._COMPILED, reason="this build has no such kernel")
SIZES = [(0, 3, 4), (1, 1), (3, 5, 7), (2, 9, 9, 33), (5, 100, 400)]


def given(*size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(size))
    x, branch, grad = (torch.randn(size, generator=generator).bfloat16() for _ in range(3))
    return x, branch, grad, torch.rand(size[0], generator=generator).mul(2).round() / 0.9


def differentiated(function, x: Tensor, branch: Tensor, grad: Tensor, factor: Tensor | None) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, branch)]
    y = function(*leaves, factor)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("drops", [True, False])
def test_the_bits_are_pytorchs_for_any_number_of_threads(size, drops):
    x, branch, grad, factor = given(*size)
    scale = factor.bfloat16().view(-1, *(1,) * (len(size) - 1)) if drops else torch.ones(1, dtype=torch.bfloat16)
    wanted = [torch.addcmul(x, branch, scale), grad, grad * scale]
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found = differentiated(mixed_residual, x, branch, grad, factor if drops else None)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    finally:
        torch.set_num_threads(threads)


def test_other_strides_give_the_same():
    x, branch, grad, factor = given(4, 6)
    turned = [t.t().contiguous().t() for t in (x, branch, grad)]
    plain = differentiated(mixed_residual, x, branch, grad, factor)
    assert all(torch.equal(a, b) for a, b in zip(plain, differentiated(mixed_residual, *turned, factor)))


@compiled
def test_serves_the_branches_of_a_mixed_step():
    x, branch, _, factor = given(3, 5, 7)
    leaf = x.clone().requires_grad_()
    assert serves(leaf, branch) and "MixedResidual" in type(add_branch(leaf, branch, factor).grad_fn).__name__
    assert not serves(x, branch) and not serves(leaf.float(), branch) and not serves(leaf, branch[:1])
    with torch.no_grad():
        assert not serves(leaf, branch)


def test_the_operators_are_complete():
    x, branch, _, factor = given(3, 5)
    torch.library.opcheck(torch.ops.swin_moe.mixed_residual, (x, branch, factor.bfloat16()))
    torch.library.opcheck(torch.ops.swin_moe.mixed_residual, (x, branch, None))
    torch.library.opcheck(torch.ops.swin_moe.scaled_images, (x, factor.bfloat16()))


@compiled
def test_bad_arguments_are_answered_by_a_sentence():
    x, branch, _, factor = given(3, 5)
    with pytest.raises(ValueError, match="of the shape and dtype of branch"):
        torch.ops.swin_moe.mixed_residual(x[1:], branch, None)
    with pytest.raises(ValueError, match="factor must be \\(images,\\)"):
        torch.ops.swin_moe.mixed_residual(x, branch, factor)
    with pytest.raises(TypeError, match="maps must be bfloat16"):
        torch.ops.swin_moe.scaled_images(x.float(), factor.bfloat16())
