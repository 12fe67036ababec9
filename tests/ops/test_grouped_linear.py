"""One product per expert: by hand, against plain products, gradients, and the contracts of a custom operator."""

import pytest
import torch

from swin_moe.ops import grouped_linear as module
from swin_moe.ops.grouped_linear import grouped_linear, row_ends

COUNTS = {"ragged": [8, 0, 24, 3], "two of four": [16, 16, 0, 0], "none": [0, 0, 0, 0], "one": [0, 0, 0, 35]}


def random_inputs(rows, *, transposed=False, dtype=torch.float64, device="cpu"):
    """Returns x, weight, bias of 4 experts, 16 -> 32 channels; `transposed` weights lie in memory as fc1 does."""
    generator = torch.Generator().manual_seed(5)
    shape = (4, 32, 16) if transposed else (4, 16, 32)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((rows, 16), shape, (4, 32)))
    weight = weight.to(device, dtype)
    weight = weight.transpose(1, 2) if transposed else weight
    return tuple(t.to(device, dtype).detach().requires_grad_() for t in (x, weight, bias))


def test_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [1.0]]])  # first, second, sum of both
    bias = torch.tensor([[0.0], [10.0], [20.0]])
    assert grouped_linear(x, weight, bias, torch.tensor([1, 0, 2])).flatten().tolist() == [1.0, 27.0, 31.0]


@pytest.mark.parametrize("left_over", [0, 5])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_plain_products(counts, transposed, left_over):
    num_rows = sum(counts)
    x, weight, bias = random_inputs(num_rows + left_over, transposed=transposed)
    y = grouped_linear(x, weight, bias, torch.tensor(counts))
    plain = torch.cat([part @ w + b for part, w, b in zip(x[:num_rows].split(counts), weight, bias)])
    torch.testing.assert_close(y[:num_rows], plain)
    assert not y[num_rows:].any()
    seen = torch.randn(y.shape, dtype=y.dtype)  # a gradient that comes back for left-over rows counts for nothing
    grads = torch.autograd.grad(y, (x, weight, bias), seen)
    torch.testing.assert_close(grads, torch.autograd.grad(plain, (x, weight, bias), seen[:num_rows]))
    assert grads[1].stride() == weight.stride()


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("left_over", [0, 5])
@pytest.mark.parametrize("counts", [c for c in COUNTS.values() if any(c)], ids=[n for n, c in COUNTS.items() if any(c)])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_grouped_product_equals_the_loop(device, dtype, counts, transposed, left_over):
    num_rows = sum(counts)
    inputs = random_inputs(num_rows + left_over, transposed=transposed, dtype=dtype, device=device)
    seen = torch.randn(num_rows + left_over, 32, generator=torch.Generator().manual_seed(6)).to(device, dtype)
    results = []
    for grouped in (False, True):
        y = grouped_linear(*inputs, torch.tensor(counts, device=device), grouped=grouped)
        grad_x, *grads = torch.autograd.grad(y, inputs, seen)
        results.append([y[:num_rows], grad_x[:num_rows], *grads])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 8e-2}
    torch.testing.assert_close(results[0], results[1], **tolerance)
    assert results[1][2].stride() == inputs[1].stride()


@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_grouped_product_leaves_unset_is_not_used(monkeypatch, transposed):
    counts, num_rows = torch.tensor([8, 0, 24, 0]), 40  # 8 rows belong to no expert
    inputs = random_inputs(num_rows, transposed=transposed, dtype=torch.bfloat16)
    seen = torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(6)).bfloat16()
    expected = torch.autograd.grad(grouped_linear(*inputs, counts, grouped=False), inputs, seen)
    product = torch.nn.functional.grouped_mm

    def poisoned(left, right, *, offs):
        result = product(left, right, offs=offs)
        if result.dim() == 3:
            return result.masked_fill_((counts == 0)[:, None, None], float("nan"))
        result[int(offs[-1]) :] = float("nan")
        return result

    monkeypatch.setattr(module.F, "grouped_mm", poisoned)
    monkeypatch.setattr(module, "_leaves_empty_unset", lambda device: True)
    y = grouped_linear(*inputs, counts, grouped=True, ends=row_ends(counts, inputs[0]))
    found = torch.autograd.grad(y, inputs, seen)
    assert y[32:].isnan().all() and found[0][32:].isnan().all()  # nothing reads these rows
    pairs = zip((found[0][:32], *found[1:]), (expected[0][:32], *expected[1:]))
    for ours, wanted in pairs:
        torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=8e-2)
    assert not found[1][1].any() and not found[2][3].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_no_gradient_of_a_grouped_weight_is_copied(monkeypatch, transposed):
    inputs, counts = random_inputs(32, transposed=transposed, dtype=torch.bfloat16), torch.tensor([8, 0, 16, 8])
    product, made = torch.nn.functional.grouped_mm, []
    monkeypatch.setattr(module.F, "grouped_mm", lambda *a, **k: made.append(product(*a, **k)) or made[-1])
    y = grouped_linear(*inputs, counts, grouped=True)
    grad = torch.autograd.grad(y.sum(), inputs[1])[0]
    assert grad.stride() == inputs[1].stride()
    assert grad.data_ptr() in {result.data_ptr() for result in made}


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_weight_of_another_dtype_is_converted_an_expert_at_a_time(counts, transposed, weight_dtype):
    dtype = torch.bfloat16 if weight_dtype == torch.float32 else torch.float32
    x, _, bias = random_inputs(sum(counts) + 5, dtype=dtype)
    _, weight, _ = random_inputs(1, transposed=transposed, dtype=weight_dtype)
    results = []
    for given in (weight, weight.to(dtype)):
        y = grouped_linear(x, given, bias, torch.tensor(counts))
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    for ours, expected in zip(*results):
        assert ours.dtype == expected.dtype and ours.stride() == expected.stride()
        assert torch.equal(ours, expected)  # the same roundings


def test_gradients_by_finite_differences():
    x, weight, bias = (t.detach()[..., :5].contiguous().requires_grad_() for t in random_inputs(6))
    weight = weight.detach()[:, :5].contiguous().requires_grad_()
    counts = torch.tensor([2, 0, 3, 1])
    assert torch.autograd.gradcheck(lambda *a: grouped_linear(*a, counts), (x, weight, bias))
    transposed = weight.detach().transpose(1, 2).contiguous().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, w, b: grouped_linear(a, w.transpose(1, 2), b, counts), (x, transposed, bias)
    )


@pytest.mark.parametrize(
    ("grouped", "dtype", "weight_dtype"),
    [
        (False, torch.float64, torch.float64),
        (False, torch.bfloat16, torch.float32),
        (True, torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_keeps_the_contract_of_an_operator(grouped, dtype, weight_dtype, transposed):
    x, _, bias = random_inputs(12, dtype=dtype)
    _, weight, _ = random_inputs(12, transposed=transposed, dtype=weight_dtype)
    counts = torch.tensor([4, 0, 7, 1])
    arguments = (x, weight, bias, row_ends(counts, x) if grouped else counts, grouped)
    torch.library.opcheck(torch.ops.swin_moe.grouped_linear, arguments)


def test_what_needs_no_gradient_gets_none():
    x, weight, bias = random_inputs(4)
    weight.requires_grad_(False)
    grouped_linear(x, weight, bias, torch.tensor([1, 1, 1, 1])).sum().backward()
    assert weight.grad is None and x.grad is not None and (bias.grad == 1).all()


def test_no_experts_and_no_rows():
    x, weight, bias = (t.detach()[:0].requires_grad_() for t in random_inputs(3))
    y = grouped_linear(x, weight, bias, torch.empty(0, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 32) and all(t.grad.shape == t.shape for t in (x, weight, bias))
