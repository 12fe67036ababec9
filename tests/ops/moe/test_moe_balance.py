"""Balance losses and z-loss as one operator: the same bits as moe/losses.py by autograd, and contracts."""

import pytest
import torch

from swin_moe.moe import losses
from swin_moe.ops.moe import moe_balance
from swin_moe.ops.moe.moe_balance import KINDS, auxiliary_loss

compiled = pytest.mark.skipif("cpu" not in moe_balance.COMPILED, reason="the compiled kernels are not built")
EXPERTS = 6


def inputs_of(tokens, dtype, kind):
    """Returns (scores, threshold, expert, logits), leaves of their own."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, EXPERTS, generator=generator, dtype=dtype)
    scores = torch.sigmoid(logits) if kind == "gshard of shares" else torch.softmax(logits, 1)
    threshold = logits.topk(2, dim=1).values[:, 1] * 0.3
    return scores.requires_grad_(), threshold.requires_grad_(), logits.topk(2, dim=1).indices, logits.requires_grad_()


def slowly(scores, threshold, expert, *, kind, noise_std, group_size, weight, logits, z_weight):
    """Returns what auxiliary_loss returns, of the functions of losses.py, one part after the other."""
    tokens = len(scores)
    size = max(min(group_size, tokens), 1)
    full = tokens - tokens % size
    bounds = [(0, full, size)] + ([(full, tokens, tokens - full)] if full < tokens else [])
    balance = scores.new_zeros(())
    for begin, end, count in bounds if kind != "none" else []:
        rows = scores[begin:end]
        if kind == "load_importance":
            options = {"noise_std": noise_std, "group_size": count}
            loss = losses.load_importance(rows, threshold[begin:end], **options)
        else:
            loss = losses.gshard(rows, expert[begin:end, 0], group_size=count, shares=kind != "gshard")
        balance = balance + loss * ((end - begin) / max(tokens, 1))
    aux = balance * weight
    return (aux if logits is None else aux + losses.z_loss(logits) * z_weight), balance.detach()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 24, 31, 30000])
@pytest.mark.parametrize("group_size", [1, 8, 15000])
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_python_form_to_the_bit(kind, with_z, group_size, tokens, dtype):
    options = dict(kind=kind, noise_std=0.2, group_size=group_size, weight=0.03, z_weight=0.7)
    results = []
    for form in (auxiliary_loss, slowly):
        scores, threshold, expert, logits = inputs_of(tokens, dtype, kind)
        aux, balance = form(scores, threshold, expert, logits=logits if with_z else None, **options)
        grads = [None] * 3
        if aux.requires_grad:
            grads = torch.autograd.grad(aux * 1.7, (scores, threshold, logits), allow_unused=True)
        results.append((aux.detach(), balance, *grads))
    for found, expected in zip(*results):
        if expected is None or found is None:
            other = expected if found is None else found
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@compiled
def test_a_step_instead_of_noise_has_no_gradient():
    scores, threshold, expert, _ = inputs_of(24, torch.float64, "load_importance")
    options = dict(kind="load_importance", noise_std=0.0, group_size=8, weight=1.0, logits=None, z_weight=0.0)
    (found, _), (expected, _) = (f(scores, threshold, expert, **options) for f in (auxiliary_loss, slowly))
    assert torch.equal(found, expected)
    for one, two in zip(*(torch.autograd.grad(v, (scores, threshold)) for v in (found, expected))):
        assert torch.equal(one, two)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_differences(kind):
    scores, threshold, expert, logits = inputs_of(12, torch.float64, kind)

    def loss(scores, threshold, logits):
        options = dict(kind=kind, noise_std=0.5, group_size=5, weight=2.0, z_weight=0.3)
        return auxiliary_loss(scores, threshold, expert, logits=logits, **options)[0]

    assert torch.autograd.gradcheck(loss, (scores, threshold, logits))


@compiled
def test_contracts_of_the_operators():
    ops, tests = torch.ops.swin_moe, ("test_schema", "test_faketensor")
    for name, kind in KINDS.items():
        scores, threshold, expert, logits = (v.detach() for v in inputs_of(31, torch.float64, name))
        given = threshold if name == "load_importance" else None
        options = (kind, 0.2, 8, 0.03, 0.7)
        torch.library.opcheck(ops.moe_balance.default, (scores, given, expert, logits, *options), test_utils=tests)
        aux, _, *sums = ops.moe_balance(scores, given, expert, logits, *options)
        arguments = (aux, scores, given, logits, *sums, *options)
        torch.library.opcheck(ops.moe_balance_backward.default, arguments, test_utils=tests)


@compiled
def test_refuses_in_one_sentence():
    scores, threshold, expert, _ = inputs_of(24, torch.float64, "load_importance")
    options = dict(noise_std=0.2, group_size=8, weight=1.0, logits=None, z_weight=0.0)
    with pytest.raises(ValueError, match="scores and experts must be"):
        auxiliary_loss(scores, threshold, expert[:3], kind="gshard", **options)
    with pytest.raises(ValueError, match="a threshold for each of 24 tokens"):
        auxiliary_loss(scores, threshold[:3], expert, kind="load_importance", **options)
    aux, _ = auxiliary_loss(scores, threshold, expert, kind="load_importance", **options)
    (grad,) = torch.autograd.grad(aux.square(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
