"""Balance losses: by hand, against the slow reference, and where a naive formula gives nan."""

import math

import pytest
import torch

from swin_moe.moe import losses
from swin_moe.moe.routing import row_blocks
from tests.moe.reference import gshard_slowly, load_importance_slowly


def test_gshard_by_hand():
    scores = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    assert losses.gshard(scores, torch.tensor([0, 1]), group_size=2).item() == pytest.approx(1.0)  # perfect balance
    skewed = torch.tensor([[0.9, 0.1], [0.7, 0.3]], dtype=torch.float64)
    assert losses.gshard(skewed, torch.tensor([0, 0]), group_size=2).item() == pytest.approx(2 * 0.8)


def test_load_importance_by_hand():
    # Importance 1.5 and 0.5: variance 0.5, mean 1. Thresholds far below: everybody is loaded alike, variance 0.
    probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25]], dtype=torch.float64)
    threshold = torch.full((2,), -50.0, dtype=torch.float64)
    value = losses.load_importance(probabilities, threshold, noise_std=0.5, group_size=2)
    assert value.item() == pytest.approx(0.25, rel=1e-9)


@pytest.mark.parametrize("group_size", [4, 12])
def test_random_values_and_the_mean_over_groups(group_size):
    logits = torch.randn(12, 5, dtype=torch.float64)
    scores, first = torch.softmax(logits, 1), logits.argmax(1)
    threshold = logits.topk(2, dim=1).values[:, 1]
    parts = [slice(i, i + group_size) for i in range(0, 12, group_size)]
    expected = sum(gshard_slowly(scores[p], first[p].tolist()) for p in parts) / len(parts)
    assert losses.gshard(scores, first, group_size=group_size).item() == pytest.approx(float(expected), rel=1e-12)
    expected = sum(load_importance_slowly(scores[p], threshold[p], 0.2) for p in parts) / len(parts)
    value = losses.load_importance(scores, threshold, noise_std=0.2, group_size=group_size)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_shares_by_hand():
    # Shares 3/4, 1/4 and 1/5, 4/5; one first choice each: 2 * (0.475 * 0.5 + 0.525 * 0.5).
    scores = torch.tensor([[0.6, 0.2], [0.2, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(
        losses.score_sums(scores, 2, shares=True), torch.tensor([[0.95, 1.05]], dtype=torch.float64)
    )
    assert losses.gshard(scores, torch.tensor([0, 1]), group_size=2, shares=True).item() == pytest.approx(1.0)
    value = losses.gshard(scores, torch.tensor([1, 1]), group_size=2, shares=True).item()
    assert value == pytest.approx(2 * 0.525)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64, requires_grad=True)
    value = losses.z_loss(logits)
    assert value.item() == pytest.approx((math.log(2.0) ** 2 + math.log(4.0) ** 2) / 2)
    (grad,) = torch.autograd.grad(value, logits)
    two, four = math.log(2.0), math.log(4.0)
    expected = torch.tensor([[two / 2, two / 2], [four * 0.75, four * 0.25]], dtype=torch.float64)
    torch.testing.assert_close(grad, expected)


def test_balanced_over_all_groups_is_not_balanced_in_each():
    # Two groups of one token, each token sure of its own expert.
    scores, first = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64), torch.tensor([0, 1])
    assert losses.gshard(scores, first, group_size=1).item() == pytest.approx(1.8)
    assert losses.gshard(scores, first, group_size=2).item() == pytest.approx(1.0)


def test_entropy():
    p = torch.softmax(torch.randn(6, 4, dtype=torch.float64), 1)
    torch.testing.assert_close(losses.mean_entropy(p), -(p * p.log()).sum(1).mean())
    logits = torch.randn(6, 4, dtype=torch.float64)
    share = torch.sigmoid(logits) / torch.sigmoid(logits).sum(1, keepdim=True)
    torch.testing.assert_close(losses.mean_entropy(logits, logits=True), -(share * share.log()).sum(1).mean())
    assert losses.mean_entropy(p[:0]).item() == 0.0
    assert losses.mean_entropy(torch.tensor([[1.0, 0.0]])).item() == 0.0


@pytest.mark.parametrize("group_size", [1, 40, 200, 3000])
def test_blocks_of_tokens_change_nothing(group_size):
    tokens, experts = 6000, 64
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    assert len(row_blocks(logits)) > 2
    threshold = logits.topk(2, dim=1).values[:, 1]
    probabilities = torch.softmax(logits, 1).requires_grad_()
    threshold.requires_grad_()
    weight = torch.randn(tokens // group_size, experts, dtype=torch.float64)
    phi = torch.distributions.Normal(0.0, 0.1).cdf(probabilities - threshold[:, None])
    slow = {
        "load": phi.view(-1, group_size, experts).sum(1),
        "shares": (probabilities / probabilities.sum(1, keepdim=True)).view(-1, group_size, experts).sum(1),
    }
    fast = {
        "load": losses.load_of(probabilities, threshold, noise_std=0.1, group_size=group_size),
        "shares": losses.score_sums(probabilities, group_size, shares=True),
    }
    for name, value in fast.items():
        torch.testing.assert_close(value, slow[name], msg=lambda m, n=name: f"{n}: {m}")
        inputs = [probabilities, threshold] if name == "load" else [probabilities]
        grads = torch.autograd.grad((value * weight).sum(), inputs)
        torch.testing.assert_close(grads, torch.autograd.grad((slow[name] * weight).sum(), inputs))
    logits.requires_grad_()
    slow_z = torch.logsumexp(logits, dim=1).square().mean()
    torch.testing.assert_close(losses.z_loss(logits), slow_z)
    (grad,), (expected,) = (torch.autograd.grad(v, logits) for v in (losses.z_loss(logits), slow_z))
    torch.testing.assert_close(grad, expected)


def test_gradients():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def both(z):
        scores = torch.softmax(z, 1)
        balanced = losses.gshard(scores, z.detach().argmax(1), group_size=3) + losses.z_loss(z)
        balanced = balanced + losses.gshard(torch.sigmoid(z), z.detach().argmax(1), group_size=3, shares=True)
        return balanced + losses.load_importance(scores, z.max(1).values, noise_std=0.25, group_size=3)

    assert torch.autograd.gradcheck(both, (logits,))


@pytest.mark.parametrize(("tokens", "experts", "noise_std"), [(0, 4, 0.25), (0, 1, 1.0), (5, 1, 1.0), (5, 4, 0.0)])
def test_never_nan_and_always_a_gradient(tokens, experts, noise_std):
    logits = torch.randn(tokens, experts, requires_grad=True)
    scores = torch.softmax(logits, 1)
    first = torch.zeros(tokens, dtype=torch.long)
    value = losses.gshard(scores, first, group_size=max(tokens, 1))
    value = value + losses.load_importance(scores, logits[:, -1], noise_std=noise_std, group_size=max(tokens, 1))
    value = value + losses.gshard(torch.sigmoid(logits), first, group_size=max(tokens, 1), shares=True)
    value = value + losses.z_loss(logits)
    assert torch.isfinite(value)
    (grad,) = torch.autograd.grad(value, logits)
    assert grad.shape == logits.shape and torch.isfinite(grad).all()
    if tokens == 0:
        assert value.item() == 0.0
