"""Routing: hand-checked numbers, the recorded cases of the official code, random cases against the slow reference."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from swin_moe.config import MoEConfig
from swin_moe.moe import expert_capacity, losses, route
from swin_moe.moe.dispatch import LocalDispatcher
from swin_moe.moe.experts import GroupedExperts
from swin_moe.moe.routers import CosineRouter, LinearRouter
from swin_moe.moe.routing import _count_slots, _sort_slots, choose_experts, join, row_blocks
from tests.moe.reference import route_slowly

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "numbers.json").read_text())["moe_routing"]


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "expected"),
    [
        (24, 4, 1, 1.25, 7),  # int(1.25 * 6)
        (24, 4, 2, 1.25, 14),  # 2 * 7, not int(15)
        (24, 4, 1, 0.5, 3),
        (25, 4, 1, 1.0, 7),  # ceil(25 / 4)
        (18432, 32, 1, 1.25, 720),  # stage 3 of Swin-MoE at 128 images
        (4, 8, 2, 0.5, 0),  # nobody gets a slot
        (24, 4, 1, 0.0, None),
        (24, 4, 2, -1.25, 14),
        (0, 4, 1, 1.25, 0),
    ],
)
def test_expert_capacity(tokens, experts, top_k, factor, expected):
    assert expert_capacity(tokens, experts, top_k=top_k, factor=factor) == expected


def logits_of(rows):
    """Returns logits whose softmax is proportional to the rows."""
    return torch.tensor(rows, dtype=torch.float64).log()


def test_slots_by_hand():
    # First choices 0 0 1, second choices 1 1 0: second choices queue behind the group's first choices.
    routing = route(logits_of([[6, 3, 1], [5, 4, 1], [2, 7, 1]]), top_k=2, capacity=2)
    assert routing.expert.tolist() == [[0, 1], [0, 1], [1, 0]]
    assert routing.slot.tolist() == [[0, 1], [1, 2], [0, 2]]
    assert routing.keep.tolist() == [[True, True], [True, False], [True, False]]
    assert routing.demand.tolist() == [[3, 3, 0]] and routing.kept.tolist() == [[2, 2, 0]]
    torch.testing.assert_close(routing.gate, torch.tensor([[0.6, 0.3], [0.5, 0.4], [0.7, 0.2]], dtype=torch.float64))


def test_confident_tokens_first_by_hand():
    # Token 2 is the most confident, 0 and 3 are equally so: the lower token first.
    rows = [[6, 4], [9, 11], [9, 1], [6, 4]]
    routing = route(logits_of(rows), top_k=1, capacity=1, batch_prioritized=True)
    assert routing.slot.tolist() == [[1], [0], [0], [2]]
    assert routing.keep.tolist() == [[False], [True], [True], [False]]


def test_groups_by_hand():
    routing = route(logits_of([[6, 4], [7, 3], [8, 2], [1, 9]]), top_k=1, capacity=1, group_size=2)
    assert routing.slot.tolist() == [[0], [1], [0], [0]]
    assert routing.demand.tolist() == [[2, 0], [1, 1]] and routing.kept.tolist() == [[1, 0], [1, 1]]


def test_normalized_gates_by_hand():
    routing = route(logits_of([[6, 3, 1]]), top_k=2, capacity=None, normalize_gate=True)
    torch.testing.assert_close(routing.gate, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))
    assert route(logits_of([[6, 3, 1]]), top_k=1, capacity=None, normalize_gate=True).gate.item() == pytest.approx(0.6)


def test_a_bias_chooses_but_does_not_weigh_by_hand():
    scores = torch.tensor([[0.6, 0.5, 0.2], [0.9, 0.1, 0.3]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.2, 0.0])
    routing = route(scores, top_k=2, capacity=None, scores=scores, bias=bias, normalize_gate=True)
    assert routing.expert.tolist() == [[1, 0], [0, 1]]  # 0.5 + 0.2 before 0.6; 0.1 + 0.2 equals 0.3: the lower expert
    expected = torch.tensor([[5 / 11, 6 / 11], [0.9, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(routing.gate, expected)


def test_group_limit_by_hand():
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.29]])
    options = {"expert_groups": 2, "group_limit": 1}
    assert choose_experts(scores, 2, **options).tolist() == [[2, 3]]  # 0.59 in the second group, 0.5 in the first
    assert choose_experts(scores, 1, **options).tolist() == [[0]]  # by the best expert alone
    assert choose_experts(scores, 2, expert_groups=2, group_limit=2).tolist() == [[0, 2]]
    even = torch.tensor([[0.2, 0.3, 0.3, 0.2]])
    assert choose_experts(even, 2, **options).tolist() == [[1, 0]]  # equal groups: the lower
    pushed = choose_experts(even, 2, bias=torch.tensor([0.0, 0.0, 0.0, 0.25]), **options)
    assert pushed.tolist() == [[3, 2]]


@pytest.mark.parametrize("top_k", [1, 3, 8, 9, 12])
def test_equal_scores_go_to_the_lower_expert(top_k):
    scores = torch.ones(5, 12)
    assert choose_experts(scores, top_k).tolist() == [list(range(top_k))] * 5
    scores[:, 7] = 2.0
    assert choose_experts(scores, top_k).tolist() == [[7, *(e for e in range(12) if e != 7)][:top_k]] * 5


def test_a_pass_of_max_and_a_sort_choose_alike():
    scores = torch.randint(0, 6, (200, 16)).float()  # many ties
    by_sort = scores.sort(dim=1, descending=True, stable=True).indices
    for top_k in (1, 2, 5, 8):
        assert torch.equal(choose_experts(scores, top_k), by_sort[:, :top_k])


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_recorded_cases(name):
    """The official routing, loss and output; with confident-first and capacity by need it drops tokens, a defect."""
    case = GOLDEN["cases"][name]
    k, bpr, norm, factor, loss = name.split("_")
    defect = bpr == "bpr1" and factor == "cf0.0"

    def wave(function, scale, slope, shift, *shape):
        n = torch.arange(math.prod(shape), dtype=torch.float64)
        return (scale * function(slope * n + shift)).view(shape)

    x, gate_weight = wave(torch.sin, 1.0, 1.3, 0.2, 24, 6), wave(torch.cos, 1.0, 0.9, 0.0, 4, 6)
    experts = GroupedExperts(6, 8, 4, fc2_bias=True).double()
    with torch.no_grad():
        experts.fc1_weight.copy_(wave(torch.sin, 0.3, 0.17, 0.0, 4, 8, 6))
        experts.fc1_bias.copy_(wave(torch.cos, 0.1, 1.0, 0.0, 4, 8))
        experts.fc2_weight.copy_(wave(torch.cos, 0.3, 0.13, 0.0, 4, 8, 6))
        experts.fc2_bias.copy_(wave(torch.sin, 0.1, 1.0, 0.0, 4, 6))
    logits = x @ gate_weight.t()
    assert logits.sum().item() == pytest.approx(GOLDEN["logits_sum"], abs=1e-12)
    top_k, capacity = int(k[1:]), expert_capacity(24, 4, top_k=int(k[1:]), factor=float(factor[2:]))
    if defect:
        capacity = case["capacity"]
    routing = route(
        logits, top_k=top_k, capacity=capacity, batch_prioritized=bpr == "bpr1", normalize_gate=norm == "norm1"
    )
    for choice in range(top_k):
        assert routing.expert[:, choice].tolist() == case[f"idx{choice}"]
        assert routing.slot[:, choice].tolist() == case[f"loc{choice}"]
    assert (int(routing.demand.max()) if routing.capacity is None else routing.capacity) == case["capacity"]
    assert int((~routing.keep).sum()) == int((routing.demand - routing.kept).sum()) == case["dropped"]
    dispatcher = LocalDispatcher()
    dispatched = dispatcher.dispatch(x, routing, None)
    y = dispatcher.combine(experts(dispatched.tokens, dispatched.counts), dispatched, routing.gate)
    assert y.sum().item() == pytest.approx(case["out_sum"], abs=1e-6)  # Tutel dispatches float64 through float32
    assert y.abs().sum().item() == pytest.approx(case["out_abs_sum"], abs=1e-6)
    scores = torch.softmax(logits, dim=1)
    if loss == "gshard":
        aux = losses.gshard(scores, routing.expert[:, 0], group_size=24)
    else:
        threshold = logits.gather(1, routing.expert[:, -1:]).squeeze(1)
        aux = losses.load_importance(scores, threshold, noise_std=1.0 / 4, group_size=24)
    assert aux.item() == pytest.approx(case["aux"], rel=1e-6)  # Tutel computes load_importance in float32
    if defect:
        needed = route(logits, top_k=top_k, capacity=None, batch_prioritized=True)
        assert case["dropped"] > 0 and bool(needed.keep.all()) and not int((needed.demand - needed.kept).sum())


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    experts = pick([1, 2, 3, 5, 8, 16])
    top_k = pick([1, min(2, experts), min(3, experts), experts])
    group_size, groups = pick([1, 3, 7, 24]), pick([0, 1, 2, 5])
    logits = torch.randn(group_size * groups, experts, generator=generator, dtype=torch.float64)
    shape = pick(["smooth", "ties", "one expert", "alike"])
    if shape == "ties":
        logits = logits.mul(2).round()
    elif shape == "one expert":
        logits[:, experts // 2] += 50.0
    elif shape == "alike":
        logits.zero_()
    capacity = pick([None, 0, 1, 2, group_size, 3 * group_size])
    use_groups = groups > 1 or pick([True, False])
    arguments = {"top_k": top_k, "capacity": capacity, "batch_prioritized": pick([True, False])}
    arguments["group_size"] = group_size if use_groups and groups else None
    if pick([True, False]):
        arguments["scores"] = torch.sigmoid(logits)
        arguments["bias"] = torch.randint(-2, 3, (experts,), generator=generator).double() / 8
    if pick([True, False]):
        divisors = [n for n in range(1, experts + 1) if experts % n == 0]
        arguments["expert_groups"] = expert_groups = pick(divisors)
        size = experts // expert_groups
        arguments["group_limit"] = pick([n for n in range(1, expert_groups + 1) if n * size >= top_k])
    return logits, arguments


def test_1000_random_cases_equal_the_slow_reference():
    seen = set()
    for seed in range(1000):
        logits, arguments = random_case(seed)
        routing = route(logits, **arguments)
        seen |= kinds(logits, **arguments)
        expert, slot, keep = route_slowly(logits, **arguments)
        message = f"seed {seed}: {tuple(logits.shape)} {arguments}"
        assert routing.expert.tolist() == expert, message
        assert routing.slot.tolist() == slot, message
        assert routing.keep.tolist() == keep, message
        assert routing.capacity == arguments["capacity"], message
        assert int(routing.kept.sum()) == int(routing.keep.sum()) and int(routing.demand.sum()) == routing.slot.numel()
        gate = arguments.get("scores", torch.softmax(logits, dim=1)).gather(1, routing.expert)
        torch.testing.assert_close(routing.gate, gate, msg=message)
    assert seen == {
        "no tokens",
        "every expert",
        "one expert only",
        "ties",
        "nothing kept",
        "dropless",
        "groups",
        "bias",
        "limit",
    }


def kinds(logits, *, top_k, capacity, batch_prioritized, group_size, **options):
    """Returns the edge cases that a random case is one of, so that none of them is lost from the generator."""
    tokens, experts = logits.shape
    checks = {
        "no tokens": tokens == 0,
        "every expert": top_k == experts > 1,
        "one expert only": tokens > 1 < experts and len(logits.argmax(dim=1).unique()) == 1 and top_k == 1,
        "ties": tokens > 0 and any(len(row.unique()) < experts for row in logits),
        "nothing kept": tokens > 0 and capacity == 0,
        "dropless": tokens > 0 and capacity is None,
        "groups": group_size is not None and tokens > group_size and batch_prioritized,
        "bias": tokens > 0 and "bias" in options and batch_prioritized,
        "limit": tokens > 0 and 1 <= options.get("group_limit", 1) < options.get("expert_groups", 1) and top_k > 1,
    }
    return {name for name, is_so in checks.items() if is_so}


def test_join_equals_routing_apart():
    logits = torch.randn(11, 4)
    whole = join([route(logits[:8], top_k=2, capacity=3, group_size=4), route(logits[8:], top_k=2, capacity=1)])
    expected = [route(part, top_k=2, capacity=c) for part, c in ((logits[:4], 3), (logits[4:8], 3), (logits[8:], 1))]
    assert torch.equal(whole.slot, torch.cat([r.slot for r in expected]))
    assert torch.equal(whole.kept, torch.cat([r.kept for r in expected]))
    assert whole.group_size == 4 and whole.capacity == 3
    assert bool(whole.is_pair.all())


@pytest.mark.parametrize("groups, top_k, size, experts", [(1, 1, 1, 1), (3, 2, 50, 4), (2, 3, 7, 9), (4, 1, 300, 200)])
def test_counted_slots_are_the_sorted_ones(groups, top_k, size, experts):
    expert = torch.randint(experts, (groups, top_k, size), generator=torch.Generator().manual_seed(size))
    for found, expected in zip(_count_slots(expert, experts), _sort_slots(expert, experts)):
        assert torch.equal(found, expected)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"model.moe.top_k must be in \[1, 4\], got 5"):
        route(torch.zeros(3, 4), top_k=5, capacity=1)
    with pytest.raises(ValueError, match="7 tokens do not fill routing groups of 3"):
        route(torch.zeros(7, 4), top_k=1, capacity=1, group_size=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_routers_compute_in_single_precision_or_better(dtype):
    x = torch.randn(10, 8).to(dtype)
    for router in (LinearRouter(8, 4, MoEConfig()), CosineRouter(8, 4, MoEConfig(cosine_dim=6, cosine_init_t=0.5))):
        router.init_weights(torch.Generator().manual_seed(1), 0.02)
        router = router.to(dtype)
        logits = router(x)
        assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and logits.shape == (10, 4)


def test_cosine_router_by_hand():
    router = CosineRouter(2, 2, MoEConfig(cosine_dim=2, cosine_init_t=0.5)).double()
    with torch.no_grad():
        router.projector.weight.copy_(torch.eye(2))
        router.projector.bias.zero_()
        router.sim_matrix.copy_(torch.tensor([[1.0, 5.0], [0.0, 5.0]]))
        router.temperature.fill_(math.log(2.0))
    logits = router(torch.tensor([[3.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    half = math.sqrt(0.5)
    torch.testing.assert_close(logits, torch.tensor([[2.0, 2 * half], [2 * half, 2.0]], dtype=torch.float64))
    with torch.no_grad():
        router.temperature.fill_(50.0)
    assert router(torch.tensor([[3.0, 0.0]], dtype=torch.float64))[0, 0].item() == pytest.approx(100.0)


def test_gate_gradient_equals_autograd_of_softmax():
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 2, dtype=torch.float64)
    routing = route(logits, top_k=2, capacity=3, normalize_gate=True)
    (grad,) = torch.autograd.grad((routing.gate * weight).sum(), logits)
    one_hot = F.one_hot(routing.expert, 5).double()
    picked = (one_hot * torch.softmax(logits, 1)[:, None]).sum(-1)
    (expected,) = torch.autograd.grad((picked / picked.sum(1, keepdim=True) * weight).sum(), logits)
    torch.testing.assert_close(grad, expected)


def test_blocks_cover_all_rows_once():
    for shape in ((0, 4), (5, 4), (1000, 128), (3, 10**6)):
        value = torch.empty(shape, device="meta")
        for size in (value, torch.empty(shape)):
            blocks = row_blocks(size)
            assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(shape[0]))
    assert len(row_blocks(torch.empty(4096, 128))) > 4


def test_a_choice_in_blocks_is_the_choice_of_every_row():
    scores = torch.randint(0, 50, (3000, 64)).float()
    by_sort = scores.sort(dim=1, descending=True, stable=True).indices
    assert len(row_blocks(scores)) > 1
    for top_k in (2, 9):
        assert torch.equal(choose_experts(scores, top_k), by_sort[:, :top_k])
