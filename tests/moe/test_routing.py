"""The rule between logits and routing: how much memory it takes, and that it compiles."""

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe.choices import build_choice
from swin_moe.moe.routers import build_router
from swin_moe.randomness import RandomContext
from tests.moe.live_tensors import LiveTensors
from tests.moe.test_layer import BALANCED, EXPERTS_CHOOSE, KINDS, LIMITED

TOKENS, EXPERTS, DIM, PER_IMAGE = 4096, 128, 16, 64


def rule_and_router(experts, **options):
    config = MoEConfig(**{"num_experts": experts, "cosine_dim": 5, **options})
    router = build_router(DIM, config)
    router.init_weights(torch.Generator().manual_seed(1), 0.5)
    return build_choice(config, 3), router


def routed(rule, router, x, *, training=True):
    images = len(x) // PER_IMAGE
    random = RandomContext(1, 2, torch.arange(images)) if training else None
    token = torch.arange(len(x)) if training else None
    return rule.route(x, router, tokens_per_image=PER_IMAGE, training=training, random=random, token=token)


# Options -> tensors of T x E elements or more: at once in forward, kept for backward, at once in forward or backward.
# Forward: logits, noisy logits, scores, probabilities. Backward: a gradient for each that stayed, and the next one.
MEMORY = {
    "official": ({"top_k": 2}, (4, 2, 6)),
    "official, by token": ({"top_k": 2, "batch_prioritized": False}, (4, 2, 6)),
    "gshard": ({"balance_loss": "gshard", "top_k": 2}, (4, 1, 4)),
    "gshard without noise": ({"balance_loss": "gshard", "gate_noise": 0.0, "top_k": 2}, (2, 1, 3)),
    "many choices": ({"top_k": 16}, (4, 2, 6)),
    "sigmoid": (BALANCED, (3, 1, 4)),
    "sigmoid without a loss": ({**BALANCED, "balance_loss": "none", "gate_noise": 0.0}, (2, 1, 3)),
    "limited, z-loss": ({**LIMITED, "gate_noise": 0.0}, (2, 2, 4)),
    "experts choose": (EXPERTS_CHOOSE, (4, 1, 4)),
}


@pytest.mark.parametrize(("options", "expected"), MEMORY.values(), ids=MEMORY)
def test_nothing_is_as_large_as_the_scores_but_the_scores(options, expected):
    rule, router = rule_and_router(EXPERTS, **options)
    x = torch.randn(TOKENS, DIM, requires_grad=True)
    with LiveTensors(TOKENS * EXPERTS) as live:
        result = routed(rule, router, x)
        forward, made = live.peak, live.at_peak
        stayed = live.count
        (result.routing.gate.sum() + result.aux).backward()
    found = (forward, stayed, live.peak)
    assert all(a <= b for a, b in zip(found, expected)), (found, made, live.at_peak)
    assert live.peak_bytes <= expected[2] * TOKENS * EXPERTS * 4  # none is wider than float32


def test_the_measure_sees_what_it_should():
    x = torch.randn(64, 32, requires_grad=True)
    with LiveTensors(64 * 32) as live:
        y = torch.softmax(x, 1)
        mask = y > 0.5
        del mask
        one_hot = torch.zeros(64, 32, dtype=torch.int64)
        assert live.count == 2 and live.peak == 2
        del one_hot
        small = y[:10].clone()
        assert live.count == 1 and small.numel() < 64 * 32
        del y
    assert live.peak == 2 and live.peak_bytes == 64 * 32 * (4 + 8)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"router": "cosine", "capacity_factor": 0.0}, BALANCED, LIMITED])
def test_compiles_without_a_break(options):
    rule, router = rule_and_router(8, **options)
    x = torch.randn(4 * PER_IMAGE, DIM, requires_grad=True)

    def run(x):
        result = routed(rule, router, x)
        return (x * result.routing.gate.sum(1, keepdim=True)).sum() + result.aux, result.routing.slot

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (loss, slot), (expected, expected_slot) = compiled(x), run(x)
    assert torch.equal(slot, expected_slot)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_evaluation_draws_nothing_and_pairs_have_numbers_of_their_own(options):
    rule, router = rule_and_router(8, **options)
    x = torch.randn(4 * PER_IMAGE, DIM)
    one, two = routed(rule, router, x, training=False), routed(rule, router, x, training=False)
    assert torch.equal(one.routing.gate, two.routing.gate) and torch.equal(one.rows, two.rows)
    pairs = rule.pairs(one.routing, RandomContext(1, 2, torch.arange(4)), torch.arange(len(x)))
    assert pairs.shape == one.routing.expert.shape
    kept = pairs[one.routing.is_pair]
    assert kept.unique().numel() == kept.numel()


def test_the_bias_is_asked_for_once_a_forward():
    """An engine may gather it over ranks then, and ranks have unequally many parts at the end of an epoch."""
    rule, router = rule_and_router(8, **BALANCED, capacity_scope="images", group_images=3)
    calls = []
    router.balance.register_forward_hook(lambda *_: calls.append(1))
    for images in (4, 3, 0):  # two parts, one, none
        routed(rule, router, torch.randn(images * PER_IMAGE, DIM))
    assert len(calls) == 3
