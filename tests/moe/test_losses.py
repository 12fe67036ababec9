"""Balance losses: by hand, against the slow reference, and where a naive formula gives nan."""

import pytest
import torch

from swin_moe.moe import losses
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


def test_gradients():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def both(z):
        scores = torch.softmax(z, 1)
        balanced = losses.gshard(scores, z.detach().argmax(1), group_size=3)
        return balanced + losses.load_importance(scores, z.max(1).values, noise_std=0.25, group_size=3)

    assert torch.autograd.gradcheck(both, (logits,))


@pytest.mark.parametrize(("tokens", "experts", "noise_std"), [(0, 4, 0.25), (0, 1, 1.0), (5, 1, 1.0), (5, 4, 0.0)])
def test_never_nan_and_always_a_gradient(tokens, experts, noise_std):
    logits = torch.randn(tokens, experts, requires_grad=True)
    scores = torch.softmax(logits, 1)
    first = torch.zeros(tokens, dtype=torch.long)
    value = losses.gshard(scores, first, group_size=max(tokens, 1))
    value = value + losses.load_importance(scores, logits[:, -1], noise_std=noise_std, group_size=max(tokens, 1))
    assert torch.isfinite(value)
    (grad,) = torch.autograd.grad(value, logits)
    assert grad.shape == logits.shape and torch.isfinite(grad).all()
    if tokens == 0:
        assert value.item() == 0.0
