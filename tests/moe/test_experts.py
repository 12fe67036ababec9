"""Grouped experts: against one plain network per expert, in every dtype, with experts that get nothing."""

import pytest
import torch
import torch.nn.functional as F

from swin_moe.moe.experts import Dropout, GroupedExperts
from swin_moe.randomness import RandomContext, keep_mask


def random_experts(dim=6, hidden=10, experts=4, *, fc2_bias=True):
    module = GroupedExperts(dim, hidden, experts, fc2_bias=fc2_bias).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 0], [0, 9, 0, 0]])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_equals_one_network_per_expert(counts, rate):
    module = random_experts()
    x = torch.randn(sum(counts), 6, dtype=torch.float64, requires_grad=True)
    pair = torch.arange(100, 100 + len(x))
    random = RandomContext(7, 3, torch.arange(1))
    dropout = Dropout(rate, random, 5, pair) if rate else None
    y = module(x, torch.tensor(counts), dropout)
    keep = keep_mask(random.key("expert_dropout", 5), pair, 10, drop=rate).double() / (1 - rate)
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


@pytest.mark.parametrize("rows", [0, 3])
def test_padded_rows_equal_ragged_ones(rows):
    module = random_experts()
    x = torch.randn(4 * rows, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for counts in (torch.full((4,), rows), rows):
        y = module(x, counts)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, *module.parameters()))))
    torch.testing.assert_close(*results)


def test_a_rank_without_experts_keeps_its_gradients():
    module = random_experts()
    module.keep({name: ((4, 0), *((0, n) for n in shape[1:])) for name, shape in module.global_shapes().items()})
    x = torch.randn(0, 6, dtype=torch.float64, requires_grad=True)
    y = module(x, torch.empty(0, dtype=torch.int64))
    assert y.shape == (0, 6)
    y.sum().backward()
    assert x.grad.shape == (0, 6)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


def test_frozen_weights_get_no_gradient():
    module = random_experts(fc2_bias=False)
    module.fc1_weight.requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    module(x, torch.ones(4, dtype=torch.int64)).sum().backward()
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
