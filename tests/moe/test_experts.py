"""Grouped experts: against one plain network per expert, in every dtype, with experts that get nothing."""

import pytest
import torch
import torch.nn.functional as F

from swin_moe.moe.experts import Dropout, GroupedExperts, grouped_linear
from swin_moe.randomness import keep_mask


def random_experts(dim=6, hidden=10, experts=4, *, fc2_bias=True):
    module = GroupedExperts(dim, hidden, experts, fc2_bias=fc2_bias).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def test_linear_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [1.0]]])  # first, second, sum of both
    bias = torch.tensor([[0.0], [10.0], [20.0]])
    assert grouped_linear(x, weight, bias, [1, 0, 2]).flatten().tolist() == [1.0, 27.0, 31.0]


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 0], [0, 9, 0, 0]])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_equals_one_network_per_expert(counts, rate):
    module = random_experts()
    x = torch.randn(sum(counts), 6, dtype=torch.float64, requires_grad=True)
    pair = torch.arange(100, 100 + len(x))
    dropout = Dropout(rate, 77, pair) if rate else None
    y = module(x, counts, dropout)
    keep = keep_mask(77, pair, 10, drop=rate).double() / (1 - rate)
    rows = []
    for e, (part, mask) in enumerate(zip(x.split(counts), keep.split(counts))):
        hidden = F.gelu(part @ module.fc1_weight[e].t() + module.fc1_bias[e]) * mask
        rows.append(hidden @ module.fc2_weight[e] + module.fc2_bias[e])
    expected = torch.cat(rows)
    torch.testing.assert_close(y, expected)
    inputs = (x, *module.parameters())
    grads = torch.autograd.grad(y.sin().sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sin().sum(), inputs))
    for e, count in enumerate(counts):
        if count == 0:
            assert not grads[1][e].any() and not grads[3][e].any()


def test_gradcheck():
    weight = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: grouped_linear(*a, [2, 0, 4]), (x, weight, bias))
    transposed = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, transposed, bias)
    assert torch.autograd.gradcheck(lambda a, w, b: grouped_linear(a, w.transpose(1, 2), b, [2, 0, 4]), inputs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("counts", [[8, 0, 24, 3], [16, 16, 0, 0]])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_product_equals_the_loop(device, counts, transposed):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (4, 32, 16) if transposed else (4, 16, 32)
    generator = torch.Generator().manual_seed(5)
    x, weight, bias, seen = (
        torch.randn(s, generator=generator).to(device, dtype).requires_grad_()
        for s in ((sum(counts), 16), shape, (4, 32), (sum(counts), 32))
    )
    results = []
    for grouped in (False, True):
        y = grouped_linear(x, weight.transpose(1, 2) if transposed else weight, bias, counts, grouped=grouped)
        results.append((y, *torch.autograd.grad((y * seen).sum(), (x, weight, bias))))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(results[0], results[1], **tolerance)


def test_a_rank_without_experts_keeps_its_gradients():
    module = random_experts()
    module.keep({name: ((4, 0), *((0, n) for n in shape[1:])) for name, shape in module.global_shapes().items()})
    x = torch.randn(0, 6, dtype=torch.float64, requires_grad=True)
    y = module(x, [])
    assert y.shape == (0, 6)
    y.sum().backward()
    assert x.grad.shape == (0, 6)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


def test_frozen_weights_get_no_gradient():
    module = random_experts(fc2_bias=False)
    module.fc1_weight.requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    module(x, [1, 1, 1, 1]).sum().backward()
    assert module.fc2_bias.grad is None and module.fc1_weight.grad is None
    assert module.fc2_weight.grad is not None and x.grad is not None


def test_initial_weights_do_not_depend_on_what_is_held():
    whole = GroupedExperts(4, 9, 5, fc2_bias=True)
    whole.init_weights(3, "layers.0.blocks.1.mlp", 0.5)
    part = GroupedExperts(4, 9, 5, fc2_bias=True)
    box = {"fc1_weight": ((2, 2), (5, 4), (0, 4)), "fc1_bias": ((2, 2), (5, 4))}
    part.keep(box | {"fc2_weight": box["fc1_weight"], "fc2_bias": ((2, 2), (2, 2))})
    part.init_weights(3, "layers.0.blocks.1.mlp", 0.5)
    assert part.first_expert == 2 and part.num_local_experts == 2
    assert torch.equal(part.fc1_weight, whole.fc1_weight[2:4, 5:9])
    assert torch.equal(part.fc2_weight, whole.fc2_weight[2:4, 5:9])
    assert not torch.equal(whole.fc1_weight[0], whole.fc1_weight[1])
    other = GroupedExperts(4, 9, 5, fc2_bias=True)
    other.init_weights(3, "layers.0.blocks.3.mlp", 0.5)
    assert not torch.equal(whole.fc1_weight, other.fc1_weight)
    assert 0.3 < float(whole.fc1_weight.detach().std()) < 0.7 and not whole.fc1_bias.any() and not whole.fc2_bias.any()
