"""The whole layer in one process: against the slow reference, its gradients, its random draws, its precision."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from swin_moe.config import MoEConfig
from swin_moe.moe import MoELayer
from swin_moe.moe.losses import load_importance, z_loss
from swin_moe.moe.routing import group_parts
from swin_moe.randomness import RandomContext, normal
from tests.moe.reference import experts_choose_slowly, experts_slowly, gshard_slowly, layer_slowly

DIM, HIDDEN, LAYER = 6, 8, 5


def build(*, seed=3, std=0.5, fc2_bias=True, **options):
    config = MoEConfig(**{"num_experts": 4, "cosine_dim": 5, "aux_loss_weight": 1.0, **options})
    layer = MoELayer(DIM, HIDDEN, config, fc2_bias=fc2_bias, layer=LAYER, init_std=std)
    layer.init_weights(seed, "layers.0.blocks.1.mlp")
    return layer.double()


def images(batch=3, tokens=4, dim=DIM):
    return torch.randn(batch, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


def weights(layer):
    return [getattr(layer.experts, n) for n in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]


def test_a_layer_that_draws_nothing_makes_no_words(monkeypatch):
    def refuse(random):
        raise AssertionError("words were made")

    after = []
    for options in ({"gate_noise": 0.0}, {"gate_noise": 1.0}, {"gate_noise": 0.0, "dropout": 0.5}):
        layer = build(**options).train()
        torch.manual_seed(0)
        layer(images())
        after.append(float(torch.rand(())))  # a fresh context has been drawn in any case
        with monkeypatch.context() as patch:
            patch.setattr("swin_moe.moe.layer.with_words", refuse)
            if options == {"gate_noise": 0.0}:
                layer(images())
            else:
                with pytest.raises(AssertionError, match="words were made"):
                    layer(images())
    assert after[0] == after[1] == after[2]


CASES = {
    "official": ({}, {"capacity": 3}),
    "gshard": ({"balance_loss": "gshard", "batch_prioritized": False}, {"capacity": 3}),
    "top-2": ({"top_k": 2, "capacity_factor": 0.5}, {"capacity": 2, "top_k": 2}),
    "top-2, normalized": ({"top_k": 2, "normalize_gate": True}, {"capacity": 6, "top_k": 2, "normalize_gate": True}),
    "cosine": ({"router": "cosine"}, {"capacity": 3}),
    "by need": ({"capacity_factor": 0.0}, {"capacity": None}),
    "capped": ({"capacity_factor": -0.5}, {"capacity": 1}),
    "no slots": ({"capacity_factor": 0.1}, {"capacity": 0}),
    "groups": (
        {"capacity_scope": "images", "group_images": 1, "capacity_factor": 1.0},
        {"capacity": 1, "group_size": 4},
    ),
}


@pytest.mark.parametrize(("options", "expected"), CASES.values(), ids=CASES)
def test_training_equals_the_slow_reference(options, expected):
    layer, x = build(**options), images().requires_grad_()
    random = RandomContext(7, 3, torch.tensor([20, 21, 22]))
    y, aux = layer(x, random=random)
    rows = x.reshape(-1, DIM)
    token = torch.arange(80, 92)  # images 20 to 22 of 4 tokens
    noise = normal(random.key("gate_noise", LAYER), token, 4).double() * (1.0 / 4)
    clean = layer.router(rows)
    bpr = layer.config.batch_prioritized
    arguments = {"top_k": 1, "batch_prioritized": bpr, **expected}
    slow, dropped = layer_slowly(rows, clean + noise, weights(layer), **arguments)
    torch.testing.assert_close(y.reshape(-1, DIM), slow)
    inputs = [x, *layer.parameters()]
    seen = torch.randn(slow.shape, dtype=torch.float64)
    grads = torch.autograd.grad((y.reshape(-1, DIM) * seen).sum(), inputs, retain_graph=True, allow_unused=True)
    slow_grads = torch.autograd.grad((slow * seen).sum() + 0 * x.sum(), inputs, allow_unused=True)
    for grad, wanted, parameter in zip(grads, slow_grads, inputs):
        torch.testing.assert_close(grad, torch.zeros_like(parameter) if wanted is None else wanted)
    assert int(layer.stats.dropped) == dropped == int((layer.stats.demand - layer.stats.kept).sum())
    assert torch.equal(layer.stats.aux, aux.detach())
    size = expected.get("group_size", 12)
    probabilities, total = torch.softmax(clean, 1), 0.0
    if layer.config.balance_loss == "gshard":
        noisy = torch.softmax(clean + noise, 1)
        total = gshard_slowly(noisy, noisy.argmax(1).tolist())
    else:
        kth = (clean + noise).topk(layer.config.top_k, dim=1).values[:, -1]
        for start in range(0, 12, size):
            part = slice(start, start + size)
            total = total + load_importance(probabilities[part], kth[part], noise_std=0.25, group_size=size) * size / 12
    torch.testing.assert_close(aux, total)


def test_evaluation_draws_nothing_and_has_its_own_capacity():
    layer, x = build(capacity_factor=0.1, dropout=0.5).eval(), images()
    y, _ = layer(x)
    assert torch.equal(y, layer(x, random=RandomContext(1, 2, torch.arange(3)))[0])
    slow, dropped = layer_slowly(x.view(-1, DIM), layer.router(x.view(-1, DIM)), weights(layer), top_k=1, capacity=None)
    torch.testing.assert_close(y.view(-1, DIM), slow)
    assert dropped == 0
    same = build(capacity_factor=0.1, eval_capacity_factor=None).eval()
    assert not same(x)[0].any()


BALANCED = {"scores": "sigmoid", "bias_rate": 0.1, "balance_loss": "gshard", "top_k": 2, "normalize_gate": True}
LIMITED = {"expert_groups": 4, "group_limit": 2, "top_k": 2, "balance_loss": "gshard", "z_loss_weight": 0.5}
EXPERTS_CHOOSE = {"choice": "expert", "balance_loss": "none", "top_k": 2}
SOFT = {"choice": "soft", "balance_loss": "none", "slots": 2}
# Every way in which tokens and experts come together.
KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "sigmoid": BALANCED,
    "limited": LIMITED,
    "experts": EXPERTS_CHOOSE,
    "soft": SOFT,
    "shared": {"shared_experts": 2},
    "global": {"balance_scope": "global"},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def test_experts_choose_as_the_slow_reference():
    layer, x = build(**EXPERTS_CHOOSE, capacity_factor=0.75), images()
    random = RandomContext(7, 3, torch.tensor([20, 21, 22]))
    y, _ = layer(x, random=random)
    rows = x.view(-1, DIM)
    noise = normal(random.key("gate_noise", LAYER), torch.arange(80, 92), 4).double() / 4
    scores = torch.softmax(layer.router(rows) + noise, 1)
    taken = experts_choose_slowly(scores, capacity=2 * int(0.75 * 3), group_size=12)
    expected = torch.stack(
        [
            sum(
                (scores[t, e] * experts_slowly(rows[t], e, *weights(layer)) for e in experts), torch.zeros(DIM).double()
            )
            for t, experts in enumerate(taken)
        ]
    )
    torch.testing.assert_close(y.view(-1, DIM), expected)
    assert layer.stats.demand.tolist() == [4] * 4 and any(not experts for experts in taken)


def test_an_image_is_evaluated_by_itself_where_experts_choose():
    layer, x = build(**EXPERTS_CHOOSE, capacity_factor=1.25).eval(), images()
    torch.testing.assert_close(layer(x)[0][1:2], layer(x[1:2])[0])
    assert layer.stats.demand.tolist() == [2] * 4  # by need has no meaning: 2 * int(1.25 * ceil(4 / 4))
    low = build(**EXPERTS_CHOOSE, capacity_factor=1.25, eval_capacity_factor=2.0).eval()
    low(x)
    assert low.stats.demand.tolist() == [12] * 4  # all tokens of three images: no more than there are


def test_a_bias_moves_the_choice_alone():
    layer, x = build(**BALANCED).eval(), images()
    x_rows = x.view(-1, DIM)
    with torch.no_grad():
        layer.router.balance.bias.copy_(torch.tensor([9.0, 0.0, 9.0, 0.0]))
    layer(x)
    assert layer.stats.demand.tolist() == [12, 0, 12, 0]
    y, aux = layer(x)
    scores = torch.sigmoid(layer.router(x_rows))[:, [0, 2]]
    gates = scores / scores.sum(1, keepdim=True)
    expected = [
        gates[t, 0] * experts_slowly(x_rows[t], 0, *weights(layer))
        + gates[t, 1] * experts_slowly(x_rows[t], 2, *weights(layer))
        for t in range(12)
    ]
    torch.testing.assert_close(y.view(-1, DIM), torch.stack(expected))
    assert not layer.router.balance.bias.requires_grad


def test_a_shared_expert_is_added_and_changes_no_other_weight():
    alone, layer, x = build(), build(shared_experts=3), images()
    random = RandomContext(7, 3, torch.arange(3))
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, layer.state_dict()[name])
    assert layer.shared.fc1.weight.shape == (3 * HIDDEN, DIM) and layer.shared.fc1.weight.std() > 0.2
    torch.testing.assert_close(layer(x, random)[0], alone(x, random)[0] + layer.shared(x))


def test_weights_of_the_losses():
    x, random = images(), RandomContext(7, 3, torch.arange(3))
    layer = build(aux_loss_weight=0.25, z_loss_weight=0.5, top_k=2)
    _, aux = layer(x, random)
    z = z_loss(layer.router(x.view(-1, DIM)))  # of the logits without noise
    torch.testing.assert_close(aux.detach(), layer.stats.aux * 0.25 + z * 0.5)


def test_global_balance_is_over_all_groups():
    groups = {"capacity_scope": "images", "group_images": 1}
    x, random = images(), RandomContext(7, 3, torch.arange(3))
    for loss in ("gshard", "load_importance"):
        whole = build(balance_loss=loss)(x, random)[1]
        apart = build(balance_loss=loss, **groups)(x, random)[1]
        torch.testing.assert_close(build(balance_loss=loss, balance_scope="global", **groups)(x, random)[1], whole)
        assert not torch.allclose(apart, whole)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2, "normalize_gate": True, "router": "cosine", "dropout": 0.3},
        {**BALANCED, "dropout": 0.3},
        LIMITED,
        {**EXPERTS_CHOOSE, "dropout": 0.3},
        {**SOFT, "dropout": 0.3},
        {"shared_experts": 2, "balance_scope": "global"},
    ],
)
def test_gradcheck(options):
    layer, x = build(std=1.0, **options), images(batch=2).requires_grad_()
    random = RandomContext(7, 3, torch.arange(2))
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, random=random), (x, *parameters), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 2, "capacity_factor": 0.0}, {**EXPERTS_CHOOSE, "capacity_scope": "images", "group_images": 1}, SOFT],
)
def test_draws_follow_the_sample_not_its_place(options):
    layer, x = build(**options, dropout=0.5), images()
    sample = torch.tensor([5, 9, 2])
    y, _ = layer(x, random=RandomContext(1, 2, sample))
    again, _ = layer(x.flip(0), random=RandomContext(1, 2, sample.flip(0)))
    torch.testing.assert_close(again.flip(0), y)
    other, _ = layer(x, random=RandomContext(1, 3, sample))
    assert not torch.allclose(other, y)


def test_dropout_differs_between_choices():
    layer = build(top_k=4, capacity_factor=0.0, dropout=0.5, gate_noise=1e-9)
    with torch.no_grad():
        layer.router.weight.zero_()
        for p in weights(layer):
            p.copy_(p[:1].expand_as(p))
    same = images(batch=1, tokens=1)
    y, _ = layer(same, random=RandomContext(1, 2, torch.tensor([0])))
    single = build(top_k=1, capacity_factor=0.0, dropout=0.5, gate_noise=1e-9)
    single.load_state_dict(layer.state_dict())
    alone, _ = single(same, random=RandomContext(1, 2, torch.tensor([0])))
    assert not torch.allclose(y, alone * 4)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2, "balance_loss": "gshard"},
        {"router": "cosine", "dropout": 0.2},
        *({**options, "dropout": 0.2} for options in KINDS.values()),
    ],
)
def test_no_tokens(options):
    layer = build(**options)
    x = torch.zeros(0, 4, DIM, dtype=torch.float64, requires_grad=True)
    y, aux = layer(x, random=RandomContext(1, 2, torch.empty(0, dtype=torch.long)))
    assert y.shape == (0, 4, DIM) and aux.item() == 0.0
    (y.sum() + aux).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters() if p.requires_grad)
    assert layer.stats.demand.tolist() == [0] * 4 and layer.stats.entropy.item() == 0.0


def test_one_expert_is_a_plain_network():
    layer, x = build(num_experts=1), images()
    y, aux = layer(x)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (w[0] for w in weights(layer))
    torch.testing.assert_close(y, torch.nn.functional.gelu(x @ fc1_weight.t() + fc1_bias) @ fc2_weight + fc2_bias)
    (y.sum() + aux).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters()) and torch.isfinite(aux)


def test_an_incomplete_last_group_competes_for_its_own_share():
    options = {"capacity_scope": "images", "group_images": 2, "capacity_factor": 1.0, "gate_noise": 1e-9}
    layer, x = build(**options), images(batch=5)
    sample = torch.arange(5)
    y, aux = layer(x, random=RandomContext(1, 2, sample))
    parts = [layer(x[p], random=RandomContext(1, 2, sample[p])) for p in (slice(0, 4), slice(4, 5))]
    torch.testing.assert_close(y, torch.cat([part for part, _ in parts]))
    torch.testing.assert_close(aux, (parts[0][1] * 4 + parts[1][1]) / 5)


def test_group_parts():
    assert group_parts(12, 4) == [(12, 4)]
    assert group_parts(14, 4) == [(12, 4), (2, 2)]
    assert group_parts(3, 4) == [(3, 3)]
    assert group_parts(0, 4) == [(0, 1)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", [{"capacity_factor": 0.0}, {**SOFT, "shared_experts": 1}])
def test_autocast_reaches_the_experts_but_not_the_router(options, device):
    layer, x = build(**options).float().to(device), images().float().to(device)
    random = RandomContext(1, 2, torch.arange(3, device=device))
    full, aux = layer(x, random=random)
    seen = []
    layer.experts.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    with torch.autocast(device, dtype=torch.bfloat16):
        y, low_aux = layer(x, random=random)
    assert seen == [(torch.bfloat16, torch.bfloat16)] and y.dtype == torch.float32
    assert torch.equal(aux, low_aux)  # routing is the same to the bit
    assert (y - full).norm() < 0.02 * full.norm()
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_kind
def test_runs_in_the_dtype_of_the_model(options, dtype):
    layer, x = build(**options).to(dtype), images().to(dtype)
    y, aux = layer(x)
    assert y.dtype == dtype and aux.dtype == torch.float32
    (y.float().sum() + aux).backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters() if p.requires_grad)


def test_statistics():
    layer = build(capacity_factor=0.5, gate_noise=1e-9)
    layer(images())
    stats = layer.stats
    assert int(stats.demand.sum()) == 12 and stats.kept.max() <= 1 and not stats.aux.requires_grad
    p = torch.softmax(layer.router(images().view(-1, DIM)), 1)
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(1).mean())


@every_kind
def test_recomputation_gives_the_same_gradients(options):
    layer, x = build(**{"top_k": 2, "dropout": 0.5, **options, **({"top_k": 1} if options is SOFT else {})}), images()
    x.requires_grad_()
    random = RandomContext(1, 2, torch.arange(3))
    trained = [p for p in layer.parameters() if p.requires_grad]
    grads = []
    for recompute in (False, True):
        y, aux = checkpoint(layer, x, random, use_reentrant=False) if recompute else layer(x, random)
        grads.append(torch.autograd.grad(y.square().sum() + aux, [x, *trained]))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_can_be_copied_after_a_forward_and_built_on_meta():
    layer = build()
    layer(images())[0].sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.eval()(images())[0], layer.eval()(images())[0])
    with torch.device("meta"):
        empty = MoELayer(DIM, HIDDEN, MoEConfig(num_experts=4), fc2_bias=False, layer=0, init_std=0.02)
    assert all(p.is_meta for p in empty.parameters()) and not empty.experts.fc2_bias.requires_grad
    empty = empty.to_empty(device="cpu")
    empty.init_weights(3, "x")
    assert sorted(n for n, _ in empty.named_parameters()) == sorted(
        ["router.weight", "experts.fc1_weight", "experts.fc1_bias", "experts.fc2_weight", "experts.fc2_bias"]
    )
