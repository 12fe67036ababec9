"""Expert choice: by hand, random cases against the slow reference, what a dispatcher makes of it."""

import pytest
import torch

from swin_moe.moe.choices.expert import _route_to_all, route_by_expert
from swin_moe.moe.dispatch import LocalDispatcher, PaddedDispatcher
from swin_moe.moe.routing import FILLER_SLOT, join, row_blocks
from tests.moe.reference import experts_choose_slowly


def test_by_hand():
    # Expert 0 takes tokens 0 and 2, expert 1 takes 2 and 3; nobody takes token 1.
    scores = torch.tensor([[0.9, 0.1], [0.3, 0.2], [0.8, 0.7], [0.2, 0.8]], requires_grad=True)
    routing = route_by_expert(scores, capacity=2, group_size=4)
    assert routing.expert.tolist() == [[0, 0], [0, 0], [0, 1], [1, 0]]
    assert routing.slot.tolist() == [[0, FILLER_SLOT], [FILLER_SLOT] * 2, [1, 0], [1, FILLER_SLOT]]
    assert routing.keep.tolist() == [[True, False], [False, False], [True, True], [True, False]]
    torch.testing.assert_close(routing.gate, torch.tensor([[0.9, 0.0], [0.0, 0.0], [0.8, 0.7], [0.8, 0.0]]))
    assert routing.demand.tolist() == [[2, 2]] and routing.capacity == 2
    (grad,) = torch.autograd.grad(routing.gate.sum(), scores)
    assert grad.tolist() == [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
    dispatcher, x = LocalDispatcher(), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    dispatched = dispatcher.dispatch(x, routing, routing.expert)
    assert dispatched.tokens.flatten().tolist() == [1.0, 3.0, 3.0, 4.0] and dispatched.pair.tolist() == [0, 0, 1, 1]
    y = dispatcher.combine(dispatched.tokens, dispatched, routing.gate)
    torch.testing.assert_close(y, torch.tensor([[0.9], [0.0], [4.5], [3.2]]))


def test_cells_of_a_program_hold_the_same_pairs():
    for seed in range(300):
        scores, arguments = random_case(seed)
        size, experts = arguments["group_size"], scores.shape[1]
        if not len(scores):
            continue
        expected = route_by_expert(scores, **arguments)
        found = _route_to_all(scores, len(scores) // size, min(arguments["capacity"], size), size)
        pairs = [
            sorted(
                (t, int(r.expert[t, c]), int(r.slot[t, c]), float(r.gate[t, c])) for t, c in r.keep.nonzero().tolist()
            )
            for r in (found, expected)
        ]
        assert pairs[0] == pairs[1], f"seed {seed}"
        assert found.top_k == experts and torch.equal(found.demand, expected.demand)
        assert torch.equal(found.is_pair, found.keep) and not found.gate[~found.keep].any()


def test_equal_scores_go_to_the_lower_token():
    routing = route_by_expert(torch.ones(6, 2), capacity=2, group_size=3)
    assert routing.keep.tolist() == [[True, True], [True, True], [False, False]] * 2


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    experts, size, groups = number(1, 9), number(1, 12), number(0, 4)
    scores = torch.rand(size * groups, experts, generator=generator, dtype=torch.float64)
    if number(0, 1):
        scores = scores.mul(4).round()  # ties
    return scores, {"capacity": number(0, size + 1), "group_size": size}


def test_1000_random_cases_equal_the_slow_reference():
    seen = set()
    for seed in range(1000):
        scores, arguments = random_case(seed)
        routing = route_by_expert(scores, **arguments)
        expected = experts_choose_slowly(scores, **arguments)
        message = f"seed {seed}: {tuple(scores.shape)} {arguments}"
        for t, taken in enumerate(expected):
            kept = routing.keep[t]
            assert dict(zip(routing.expert[t, kept].tolist(), routing.slot[t, kept].tolist())) == taken, message
            assert routing.expert[t, kept].tolist() == sorted(taken), message
            torch.testing.assert_close(routing.gate[t, kept], scores[t, sorted(taken)])
        assert torch.equal(routing.is_pair, routing.keep) and not routing.gate[~routing.keep].any()
        assert routing.top_k == max([1, *map(len, expected)])
        assert int(routing.kept.sum()) == sum(map(len, expected))
        seen |= {"no tokens"} if not len(scores) else set()
        seen |= {"nothing taken"} if len(scores) and arguments["capacity"] == 0 else set()
        seen |= {"all experts of one token"} if routing.top_k == scores.shape[1] > 2 else set()
        seen |= {"everything taken"} if arguments["capacity"] > arguments["group_size"] and len(scores) else set()
    assert seen == {"no tokens", "nothing taken", "all experts of one token", "everything taken"}


def test_large_enough_for_blocks_of_experts():
    scores = torch.randint(0, 40, (6000, 24)).double()
    assert len(row_blocks(scores.t())) > 1
    routing = route_by_expert(scores, capacity=100, group_size=3000)
    for group in range(2):
        for e in (0, 11, 23):
            best = scores[group * 3000 : (group + 1) * 3000, e].sort(descending=True, stable=True).indices[:100]
            rows = slice(group * 3000, (group + 1) * 3000)
            taken = (routing.keep[rows] & (routing.expert[rows] == e)).any(dim=1).nonzero().squeeze(1)
            assert torch.equal(taken, best.sort().values)


def test_groups_of_unequal_width_are_joined():
    wide = route_by_expert(torch.tensor([[0.9, 0.9], [0.1, 0.1]]), capacity=1, group_size=2)
    narrow = route_by_expert(torch.tensor([[0.9, 0.1], [0.1, 0.9]]), capacity=1, group_size=2)
    both = join([narrow, wide])
    assert both.keep.tolist() == [[True, False], [True, False], [True, True], [False, False]]
    assert both.is_pair.tolist() == both.keep.tolist() and both.demand.tolist() == [[1, 1], [1, 1]]
    dispatched = LocalDispatcher().dispatch(torch.arange(4.0)[:, None], both, None)
    assert dispatched.tokens.flatten().tolist() == [0.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_expert_is_full_whatever_the_scores(dtype):
    routing = route_by_expert(torch.randn(64, 8).softmax(1).to(dtype), capacity=10, group_size=32)
    for e in range(8):
        assert int((routing.keep & (routing.expert == e)).sum()) == 20


@pytest.mark.parametrize("group_size", [5, 15])
def test_dispatchers_take_fillers_for_nothing(group_size):
    scores = torch.rand(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(group_size))
    routing = route_by_expert(scores, capacity=group_size // 2, group_size=group_size)
    assert not routing.keep.all() and routing.keep.any(dim=1).sum() < 30
    factor = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    taken = experts_choose_slowly(scores, capacity=group_size // 2, group_size=group_size)
    weight = torch.tensor(
        [sum(float(scores[t, e] * factor[e]) for e in taken[t]) for t in range(30)], dtype=torch.float64
    )
    x = torch.randn(30, 3, dtype=torch.float64)
    for dispatcher in (LocalDispatcher(), PaddedDispatcher()):
        dispatched = dispatcher.dispatch(x, routing, routing.expert)
        rows = dispatched.tokens * factor[dispatched.pair][:, None]
        torch.testing.assert_close(dispatcher.combine(rows, dispatched, routing.gate), x * weight[:, None])
