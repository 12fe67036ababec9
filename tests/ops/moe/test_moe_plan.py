"""The order of rows for experts as one operator: by hand, and the same as the Python form."""

import pytest
import torch

from swin_moe.moe.choices.expert import route_by_expert
from swin_moe.moe.dispatch import make_order, make_padded_order, padded_rows
from swin_moe.moe.routing import join, route
from swin_moe.ops.moe import moe_plan
from swin_moe.ops.moe.moe_plan import order_rows

compiled = pytest.mark.skipif("cpu" not in moe_plan.COMPILED, reason="the compiled kernels are not built")


def logits_of(tokens, experts=5):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))


ROUTINGS = {
    "one group": lambda: route(logits_of(12), top_k=2, capacity=3),
    "groups": lambda: route(logits_of(24), top_k=2, capacity=2, group_size=6),
    "a smaller last group": lambda: join(
        [route(logits_of(12), top_k=2, capacity=2, group_size=6), route(logits_of(4), top_k=2, capacity=1)]
    ),
    "by need": lambda: route(logits_of(12), top_k=3, capacity=None, group_size=4),
    "no slots": lambda: route(logits_of(12), top_k=1, capacity=0),
    "no tokens": lambda: route(logits_of(0), top_k=2, capacity=3, group_size=4),
    "experts choose": lambda: route_by_expert(torch.softmax(logits_of(24), 1), capacity=3, group_size=12),
    "many tokens": lambda: route(logits_of(20000), top_k=2, capacity=70, group_size=200),
}


def plans_of(routing):
    """Returns every order of a routing: rows known, unknown, and padded."""
    orders = [make_order(routing, int(routing.kept.sum())), make_order(routing, None)]
    return [*orders, make_padded_order(routing, padded_rows(routing))]


@compiled
@pytest.mark.parametrize("make", ROUTINGS.values(), ids=ROUTINGS)
def test_equals_the_python_form(monkeypatch, make):
    routing = make()
    found = plans_of(routing)
    monkeypatch.setattr(moe_plan, "available", lambda expert: False)
    for one, two in zip(found, plans_of(routing)):
        for name in ("position", "keep", "pair", "vacant"):
            mine, other = getattr(one, name), getattr(two, name)
            same = mine is other if other is None else torch.equal(mine, other) and mine.dtype == other.dtype
            assert same, (name, mine, other)


@compiled
def test_by_hand():
    expert = torch.tensor([[1], [0], [1], [1]])
    slot, keep = torch.tensor([[0], [0], [0], [1]]), torch.tensor([[True], [True], [True], [False]])
    arguments = (expert, slot, keep, torch.tensor([[1, 1], [0, 1]]))  # two groups of two tokens
    order = order_rows(*arguments, group_size=2)
    assert order.position.flatten().tolist() == [1, 0, 2, 0]
    assert order.pair.tolist() == [1, 0, 2]
    assert order.counts.tolist() == [1, 2] and len(order.vacant) == 0
    assert order_rows(*arguments, group_size=2, num_rows=4).pair.tolist() == [1, 0, 2, 0]
    padded = order_rows(*arguments, group_size=2, padded_rows=2)
    assert padded.pair.tolist() == [1, 0, 0, 2] and padded.position.flatten().tolist() == [2, 0, 3, 0]
    assert padded.vacant.tolist() == [False, True, False, False]


@compiled
def test_contracts_of_the_operator():
    routing = ROUTINGS["groups"]()
    columns = (routing.expert, routing.slot, routing.keep, routing.kept)
    for rows, padded in ((48, -1), (-1, 10)):
        torch.library.opcheck(torch.ops.swin_moe.moe_plan.default, (*columns, 6, rows, padded))


@compiled
def test_refuses_in_one_sentence():
    routing = ROUTINGS["groups"]()
    columns = [routing.expert, routing.slot, routing.keep, routing.kept]
    with pytest.raises(IndexError, match="more pairs are kept than the 3 rows hold"):
        order_rows(*columns, group_size=6, num_rows=3)
    with pytest.raises(ValueError, match="groups of 2 tokens for 24"):
        order_rows(*columns, group_size=2)
    with pytest.raises(ValueError, match="must be \\(tokens, choices\\)"):
        order_rows(routing.expert[:3], *columns[1:], group_size=6)
    with pytest.raises(TypeError, match="keep bool"):
        order_rows(*columns[:2], routing.keep.long(), routing.kept, group_size=6)
