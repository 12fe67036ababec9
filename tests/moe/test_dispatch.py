"""Dispatch and combine: by hand, against indexing in a loop, gradients by finite differences."""

import pytest
import torch

from swin_moe.moe import route
from swin_moe.moe.dispatch import (
    LocalDispatcher,
    PaddedDispatcher,
    combine_tokens,
    make_order,
    make_padded_order,
    padded_rows,
    take_tokens,
)


def random_routing(tokens=12, experts=4, top_k=2, capacity=3, **arguments):
    logits = torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
    return route(logits, top_k=top_k, capacity=capacity, **arguments)


def test_by_hand():
    # Tokens 0, 1, 2 choose experts 1, 0, 1; expert 1 has one slot.
    routing = route(torch.tensor([[0.0, 5.0], [5.0, 0.0], [0.0, 5.0]]), top_k=1, capacity=1)
    x = torch.tensor([[1.0], [2.0], [3.0]])
    dispatched = LocalDispatcher().dispatch(x, routing, torch.tensor([[10], [11], [12]]))
    assert dispatched.tokens.tolist() == [[2.0], [1.0]]
    assert dispatched.counts.tolist() == [1, 1] and dispatched.pair.tolist() == [11, 10]
    y = LocalDispatcher().combine(torch.tensor([[7.0], [9.0]]), dispatched, torch.tensor([[0.5], [1.0], [0.5]]))
    assert y.tolist() == [[4.5], [7.0], [0.0]]


CASES = {
    "all kept": {"capacity": None},
    "some dropped": {},
    "all dropped": {"capacity": 0},
    "one choice": {"top_k": 1},
    "every expert": {"top_k": 4},
    "groups": {"group_size": 3, "capacity": 1},
    "groups, confident first": {"group_size": 4, "capacity": 2, "batch_prioritized": True},
    "no tokens": {"tokens": 0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_loop(case):
    routing = random_routing(**case)
    num_tokens, top_k = routing.expert.shape
    x = torch.randn(num_tokens, 5, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(num_tokens, top_k, dtype=torch.float64, requires_grad=True)
    dispatcher = LocalDispatcher()
    pairs = torch.arange(num_tokens * top_k).view(num_tokens, top_k)
    dispatched = dispatcher.dispatch(x, routing, pairs)
    assert dispatched.counts.tolist() == [int((routing.keep & (routing.expert == e)).sum()) for e in range(4)]
    start = 0
    for e, count in enumerate(dispatched.counts.tolist()):
        for row in range(start, start + count):
            t, choice = divmod(int(dispatched.pair[row]), top_k)
            assert routing.expert[t, choice] == e and routing.keep[t, choice]
            assert torch.equal(dispatched.tokens[row], x[t])
        start += count
    assert dispatched.pair.unique().numel() == int(routing.keep.sum())
    factor = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    y = dispatched.tokens * factor.repeat_interleave(dispatched.counts)[:, None]
    out = dispatcher.combine(y, dispatched, gate)
    weight = (gate * routing.keep * factor[routing.expert]).sum(1, keepdim=True)
    torch.testing.assert_close(out, x * weight)
    grads = torch.autograd.grad(out.sin().sum(), (x, gate))
    torch.testing.assert_close(grads, torch.autograd.grad((x * weight).sin().sum(), (x, gate)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_padding_changes_nothing(case):
    routing = random_routing(**case)
    num_tokens, top_k = routing.expert.shape
    pairs = torch.arange(num_tokens * top_k).view(num_tokens, top_k)
    results = []
    for dispatcher in (LocalDispatcher(), PaddedDispatcher()):
        x = torch.randn(num_tokens, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        gate = torch.rand(num_tokens, top_k, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
        gate.requires_grad_()
        dispatched = dispatcher.dispatch(x, routing, pairs)
        counts = dispatched.counts
        rows = counts if torch.is_tensor(counts) else torch.full((4,), counts)
        y = dispatched.tokens * weight.repeat_interleave(rows)[:, None] + 1  # padding is computed as well
        out = dispatcher.combine(y, dispatched, gate)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, gate, weight))))
    torch.testing.assert_close(*results)


def test_padding_by_hand():
    # Tokens 0, 1, 2 choose experts 1, 0, 1; two slots each.
    routing = route(torch.tensor([[0.0, 5.0], [5.0, 0.0], [0.0, 5.0]]), top_k=1, capacity=2)
    dispatched = PaddedDispatcher().dispatch(torch.tensor([[1.0], [2.0], [3.0]]), routing, None)
    assert dispatched.counts == 2 and dispatched.order.vacant.tolist() == [False, True, False, False]
    assert dispatched.tokens[[0, 2, 3]].tolist() == [[2.0], [1.0], [3.0]]


@pytest.mark.parametrize("top_k", [1, 2])
def test_rows_of_no_tokens_are_padding_and_have_a_gradient(top_k):
    """Other ranks may have tokens, and all send equally many rows."""
    routing = random_routing(tokens=0, top_k=top_k)
    order = make_padded_order(routing, 3)
    x, y, gate = (torch.randn(n, d, requires_grad=True) for n, d in ((0, 5), (12, 5), (0, top_k)))
    rows, out = take_tokens(x, order), combine_tokens(y, gate, order)
    assert rows.shape == (12, 5) and out.shape == (0, 5) and order.vacant.all()
    (rows.sum() + out.sum()).backward()
    assert x.grad.shape == x.shape and gate.grad.shape == gate.shape and torch.equal(y.grad, torch.zeros(12, 5))


def test_padding_holds_what_groups_need_together_and_no_more_than_all_tokens():
    assert padded_rows(random_routing(group_size=3, capacity=1)) == 4
    assert padded_rows(random_routing(capacity=99)) == 12
    assert padded_rows(random_routing(tokens=0)) == 0


def test_left_over_rows_belong_to_no_expert():
    routing = random_routing()
    exact, longer = make_order(routing, int(routing.kept.sum())), make_order(routing, None)
    assert longer.num_rows == routing.expert.numel() > exact.num_rows
    assert torch.equal(longer.pair[: exact.num_rows], exact.pair) and torch.equal(longer.position, exact.position)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradcheck(case, padded):
    routing = random_routing(**case)
    order = make_padded_order(routing, padded_rows(routing)) if padded else make_order(routing, int(routing.kept.sum()))
    num_tokens, top_k = routing.expert.shape
    x = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(order.num_rows, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(num_tokens, top_k, dtype=torch.float64, requires_grad=True)
    rows = slice(None) if order.vacant is None else ~order.vacant  # what padding holds has no gradient
    assert torch.autograd.gradcheck(lambda a: take_tokens(a, order)[rows], (x,))
    assert torch.autograd.gradcheck(lambda a, b: combine_tokens(a, b, order), (y, gate))


def test_a_dropped_pair_does_not_see_other_rows():
    routing = route(torch.tensor([[0.0, 5.0], [0.0, 5.0]]), top_k=1, capacity=1)
    order = make_order(routing, 1)
    y = torch.tensor([[float("inf")]], requires_grad=True)
    out = combine_tokens(y, torch.ones(2, 1, requires_grad=True), order)
    assert out.tolist() == [[float("inf")], [0.0]]
    x = torch.ones(2, 1, requires_grad=True)
    take_tokens(x, order).backward(torch.tensor([[float("nan")]]))
    assert x.grad[1].item() == 0.0


def test_half_precision_rows_meet_single_precision_gates():
    routing = random_routing()
    order = make_order(routing, int(routing.kept.sum()))
    y = torch.randn(order.num_rows, 8).bfloat16().requires_grad_()
    gate = torch.rand(12, 2, requires_grad=True)
    out = combine_tokens(y, gate, order)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert y.grad.dtype == torch.bfloat16 and gate.grad.dtype == torch.float32
