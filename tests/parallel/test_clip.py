"""Gradient norm and clipping of a single process; over ranks: tests/equivalence."""

import pytest
import torch
from torch import nn

from swin_moe.parallel.clip import clip_by_norm, global_grad_norm
from swin_moe.parallel.groups import single_process_groups


def model_with(*gradients):
    model = nn.ParameterList([nn.Parameter(torch.zeros(len(g))) for g in gradients])
    for p, g in zip(model, gradients):
        p.grad = torch.tensor(g)
    return model


def test_by_hand():
    model = model_with([3.0, 0.0], [0.0, 4.0])
    model.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    norm = global_grad_norm(model, single_process_groups())
    assert norm.item() == 5.0 and norm.dtype == torch.float64
    clip_by_norm(model.parameters(), norm, 10.0)
    assert model[0].grad.tolist() == [3.0, 0.0]
    clip_by_norm(model.parameters(), norm, 1.0)
    assert model[1].grad.tolist() == pytest.approx([0.0, 0.8])


@pytest.mark.parametrize("as_number", [False, True])
def test_equals_torch(as_number):
    gradients = [torch.randn(n).tolist() for n in (5, 70, 1)]
    ours, theirs = model_with(*gradients), model_with(*gradients)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
    norm = global_grad_norm(ours, single_process_groups())
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    clip_by_norm(ours.parameters(), float(norm) if as_number else norm, 0.7)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


def test_large_gradients_do_not_overflow():
    assert global_grad_norm(model_with([3e30], [4e30]), single_process_groups()).item() == pytest.approx(5e30)


def test_not_finite_is_told():
    assert global_grad_norm(model_with([float("inf")]), single_process_groups()).item() == float("inf")
    assert global_grad_norm(model_with([float("nan")]), single_process_groups()).isnan()


def test_nothing_to_clip():
    assert global_grad_norm(nn.Linear(2, 2), single_process_groups()).item() == 0.0
    clip_by_norm(nn.Linear(2, 2).parameters(), 1.0, 0.5)
