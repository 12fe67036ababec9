"""Memory comes back when the last tensor in it is gone, and not before."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from swin_moe.ops.grouped_linear import grouped_linear
from swin_moe.ops.reused_memory import empty_like_reused
from swin_moe.planner.trace import LiveBytes

LARGE = (4, 1024, 2048)  # 32 MiB of float32


def test_memory_is_used_again_once_it_is_free():
    first = empty_like_reused(torch.empty(LARGE))
    address = first.data_ptr()
    view = first[1]
    second = empty_like_reused(torch.empty(LARGE))
    assert second.data_ptr() != address
    del first
    third = empty_like_reused(torch.empty(LARGE))
    assert third.data_ptr() not in (address, second.data_ptr())  # a view holds it
    del view
    gc.collect()
    assert empty_like_reused(torch.empty(LARGE)).data_ptr() == address


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(LARGE),
        torch.empty(LARGE).transpose(1, 2),
        torch.empty(LARGE, dtype=torch.float64),
        torch.empty(3),
        torch.empty(0),
        torch.empty(LARGE)[:, ::2],
        torch.empty(LARGE, device="meta"),
    ],
)
def test_looks_like_the_tensor(tensor):
    made = empty_like_reused(tensor)
    expected = torch.empty_like(tensor)
    assert made.shape == tensor.shape and made.stride() == expected.stride()
    assert (made.dtype, made.device) == (tensor.dtype, tensor.device)


def test_gradients_of_two_steps_do_not_share_memory():
    x, bias, counts = torch.ones(8, 1024), torch.zeros(4, 2048), torch.tensor([2, 2, 2, 2])
    weight = torch.zeros(LARGE, requires_grad=True)
    grouped_linear(x, weight, bias, counts).sum().backward()
    kept = weight.grad
    weight.grad = None
    grouped_linear(3 * x, weight, bias, counts).sum().backward()
    assert (kept == 2).all() and (weight.grad == 6).all()
    grouped_linear(x, weight, bias, counts).sum().backward()  # accumulated
    assert (weight.grad == 8).all()


def test_tracing_allocates_nothing():
    with FakeTensorMode():
        inputs = [torch.empty(s, requires_grad=True) for s in ((8, 1024), LARGE, (4, 2048))]
        y = grouped_linear(*inputs, torch.empty(4, dtype=torch.int64))
        (grad,) = torch.autograd.grad(y.sum(), [inputs[1]])
    assert isinstance(grad, FakeTensor) and grad.shape == LARGE


def test_who_watches_operators_sees_it():
    tensor = torch.empty(LARGE)
    with LiveBytes([tensor]) as seen:
        made = empty_like_reused(tensor)
        assert seen.live == tensor.nbytes
        made.zero_()
        del made
        gc.collect()
        assert seen.live == 0 and seen.peak == tensor.nbytes
