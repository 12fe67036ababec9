"""Rows for experts and back as operators: by hand, against indexing in a loop, adjoints, contracts, refusals."""

import pytest
import torch

from swin_moe.moe import route
from swin_moe.moe.dispatch import combine_tokens, make_order, make_padded_order, padded_rows, take_tokens
from swin_moe.ops.moe.moe_permute import gate_gradient, permute, unpermute

GPU = pytest.mark.gpu
DTYPES = [  # of rows and of gates
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]
CASES = {
    "all kept": dict(capacity=None),
    "some dropped": dict(capacity=3),
    "all dropped": dict(capacity=0),
    "one choice": dict(top_k=1, capacity=3),
    "every expert": dict(top_k=4, capacity=5),
    "no tokens": dict(tokens=0, capacity=3),
}


def order_of(*, tokens=12, top_k=2, capacity, padded=False, device="cpu"):
    logits = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(1)).to(device)
    routing = route(logits, top_k=top_k, capacity=capacity)
    return make_padded_order(routing, padded_rows(routing)) if padded else make_order(routing, int(routing.kept.sum()))


def random_tensor(*shape, dtype=torch.float64, device="cpu", seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def test_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    gate = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    pair = torch.tensor([3, 0, 1, 0])  # token 1, choice 1; token 0, both choices; vacant
    vacant = torch.tensor([False, False, False, True])
    position = torch.tensor([[1, 2], [0, 0]])
    keep = torch.tensor([[True, True], [False, True]])
    assert permute(x, pair[:3], 2).tolist() == [[3, 4], [1, 2], [1, 2]]
    assert permute(x, pair, 2, gate=gate, vacant=vacant).tolist() == [[9, 12], [0.5, 1], [2, 4], [0, 0]]
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert unpermute(rows, position, keep=keep).tolist() == [[1, 2], [1, 0]]
    assert unpermute(rows, position, keep=keep, gate=gate).tolist() == [[2, 2.5], [3, 0]]
    assert gate_gradient(rows, x, position, keep=keep).tolist() == [[2, 3], [0, 3]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_parts_are_adjoint(case, padded):
    """<permute(x), r> = <x, unpermute(r)>, and the same with gates: what makes each the other's gradient."""
    order = order_of(**case, padded=padded)
    tokens, top_k = order.position.shape
    x, rows = random_tensor(tokens, 5), random_tensor(order.num_rows, 5, seed=2)
    gate = random_tensor(tokens, top_k, seed=3)
    gated = permute(x, order.pair, top_k, gate=gate, vacant=order.vacant)
    out = unpermute(rows, order.position, keep=order.keep, gate=gate)
    torch.testing.assert_close((gated * rows).sum(), (x * out).sum())
    torch.testing.assert_close((gate_gradient(rows, x, order.position, keep=order.keep) * gate).sum(), (x * out).sum())


@pytest.mark.parametrize("fill", [float("inf"), float("nan")])
def test_row_of_dropped_pairs_is_never_multiplied(fill):
    rows = torch.tensor([[fill], [2.0]])
    position, keep = torch.tensor([[0], [1]]), torch.tensor([[False], [True]])
    assert unpermute(rows, position, keep=keep, gate=torch.zeros(2, 1)).tolist() == [[0.0], [0.0]]
    assert unpermute(rows, position, keep=keep).tolist() == [[0.0], [2.0]]
    assert gate_gradient(rows, torch.ones(2, 1), position, keep=keep).tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_contracts_of_an_operator(device):
    order = order_of(capacity=3, padded=True, device=device)
    x, gate = random_tensor(12, 8, device=device), random_tensor(12, 2, device=device)
    rows = random_tensor(order.num_rows, 8, device=device)
    ops = torch.ops.swin_moe
    for dtype in (None, torch.float32):
        torch.library.opcheck(ops.moe_permute.default, (x, order.pair, 2, gate, order.vacant, dtype))
    torch.library.opcheck(ops.moe_permute.default, (x, order.pair, 2, None, None))
    torch.library.opcheck(ops.moe_unpermute.default, (rows, order.position, order.keep, gate))
    torch.library.opcheck(ops.moe_unpermute.default, (rows.float(), order.position, None, gate))
    torch.library.opcheck(ops.moe_gate_gradient.default, (rows, x, order.position, order.keep))


@GPU
@pytest.mark.parametrize("channels", [8, 96, 7, 1024])
@pytest.mark.parametrize(("rows_dtype", "gate_dtype"), DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cuda_equals_the_cpu(case, rows_dtype, gate_dtype, channels):
    results = []
    for device in ("cpu", "cuda"):
        order = order_of(**case, padded=True, device=device)
        tokens, top_k = order.position.shape
        x = random_tensor(tokens, channels, dtype=rows_dtype, device=device).requires_grad_()
        gate = random_tensor(tokens, top_k, dtype=gate_dtype, device=device, seed=3).requires_grad_()
        rows = take_tokens(x, order)
        out = combine_tokens(rows, gate, order)
        grads = torch.autograd.grad(out, (x, gate), random_tensor(*out.shape, dtype=out.dtype, device=device, seed=4))
        assert out.dtype == torch.promote_types(rows_dtype, gate_dtype)
        results.append([t.detach().cpu().double() for t in (rows, out, *grads)])
    coarse = max(torch.finfo(rows_dtype).eps, torch.finfo(gate_dtype).eps)
    for expected, found in zip(*results):
        assert (found - expected).norm() <= 2 * coarse * expected.norm()


@GPU
def test_cuda_refuses_in_one_sentence():
    rows, position = torch.zeros(3, 4, device="cuda"), torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="int64 on the device"):
        unpermute(rows, position.int(), keep=None)
    with pytest.raises(ValueError, match="gate must be"):
        unpermute(rows, position, keep=None, gate=torch.zeros(2, 1, device="cuda"))
    with pytest.raises(ValueError, match="a mask must be bool"):
        gate_gradient(rows, torch.zeros(2, 4, device="cuda"), position, keep=torch.zeros(2, 1, device="cuda").bool())
