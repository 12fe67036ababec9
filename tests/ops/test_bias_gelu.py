"""Bias of each row's expert, GELU and dropout as one operator, and networks with it, against the plain operators."""

import pytest
import torch
import torch.nn.functional as F

import swin_moe
from swin_moe.models.layers import Mlp
from swin_moe.moe.experts import Dropout, GroupedExperts
from swin_moe.moe.shared import SharedExpert
from swin_moe.ops import bias_gelu as module
from swin_moe.ops import extension
from swin_moe.ops.bias_gelu import add_expert_bias_, bias_gelu, expert_bias_gradient, is_fused
from swin_moe.ops.random_draws import UnitDraw
from swin_moe.randomness import RandomContext, keep_mask

# Rows of each expert; None: all have as many. Two rows belong to none where they are counted.
COUNTS = {"one": None, "ragged": [3, 0, 5, 2], "nothing": [0, 0], "no expert": []}


def unit_draw(rows, drop=0.4):
    numbers = torch.arange(rows) * 3 + 2**33
    return UnitDraw(RandomContext(7, 3, numbers), numbers, "expert_dropout", layer=5, drop=drop, scale=1 / (1 - drop))


def problem(case, dtype, *, channels=6):
    """Returns (x, bias, ends, expert of each row, rows that belong to one)."""
    counts = COUNTS[case]
    owned = 7 if counts is None else sum(counts)
    experts = 1 if counts is None else len(counts)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(owned + (2 if counts is not None else 0), channels, generator=generator, dtype=dtype)
    bias = torch.randn(experts, channels, generator=generator, dtype=dtype)
    ends = None if counts is None else torch.tensor(counts, dtype=torch.int64).cumsum(0).to(torch.int32)
    expert = torch.arange(experts).repeat_interleave(
        torch.tensor([owned] if counts is None else counts, dtype=torch.int64)
    )
    return x.requires_grad_(), bias.requires_grad_(), ends, expert, owned


def plain(x, bias, expert, owned, draw):
    hidden = F.gelu(x[:owned] + bias[expert])
    if draw is not None:
        key = draw.random.key("expert_dropout", 5)
        hidden = hidden * keep_mask(key, draw.rows[:owned], x.shape[1], drop=draw.drop) * draw.scale
    return torch.cat([hidden, hidden.new_zeros(len(x) - owned, x.shape[1])])


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", COUNTS)
def test_equals_the_plain_operators(case, dtype, drops):
    x, bias, ends, expert, owned = problem(case, dtype)
    draw = unit_draw(len(x)) if drops else None
    results = []
    for y in (
        bias_gelu(x, bias, ends=ends, draw=draw),
        bias_gelu(x.t().contiguous().t(), bias, ends=ends, draw=draw),
        plain(x, bias, expert, owned, draw),
    ):
        results.append([y, *torch.autograd.grad(y.sin().sum(), (x, bias))])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_sums_of_16_bits_are_wide():
    x, bias, ends, _, _ = problem("ragged", torch.float32)
    x, bias = x.detach().bfloat16().requires_grad_(), bias.detach().requires_grad_()
    y = bias_gelu(x, bias, ends=ends, draw=None)
    wide = bias_gelu(x.double(), bias.double(), ends=ends, draw=None)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wide, rtol=2**-8, atol=2**-14)  # one rounding
    grads = torch.autograd.grad(y.float().sum(), (x, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(grads[1], torch.autograd.grad(wide.sum(), bias)[0], rtol=1e-6, atol=1e-6)


def test_equal_parts_are_rows_by_their_place():
    x, bias = torch.randn(12, 5), torch.randn(4, 5)
    ends = torch.tensor([3, 6, 9, 12], dtype=torch.int32)
    assert torch.equal(*(bias_gelu(x, bias, ends=e, draw=None) for e in (ends, None)))


def test_the_bias_alone_and_its_gradient():
    x, bias, ends, expert, owned = problem("ragged", torch.float32)
    y = x.detach().clone()
    y[owned:] = float("nan")
    add_expert_bias_(y, bias.detach(), ends)
    assert torch.equal(y[:owned], x.detach()[:owned] + bias.detach()[expert]) and y[owned:].isnan().all()
    expected = torch.zeros(4, 6).index_add_(0, expert, x.detach()[:owned])
    torch.testing.assert_close(expert_bias_gradient(torch.where(y.isnan(), y, x.detach()), ends), expected)


@pytest.mark.parametrize("case", COUNTS)
def test_operators_are_what_they_say(case):
    x, bias, ends, _, _ = problem(case, torch.float32)
    operands = unit_draw(len(x)).operands()
    for draw in (operands, module.NO_DRAW):
        torch.library.opcheck(torch.ops.swin_moe.bias_gelu, (x, bias, ends, *draw))
        grad, given = torch.ones_like(x), (x.detach(), bias.detach(), ends, *draw)
        torch.library.opcheck(torch.ops.swin_moe.bias_gelu_backward, (grad, *given))
    if ends is not None:
        torch.library.opcheck(torch.ops.swin_moe.add_expert_bias_, (x.detach().clone(), bias.detach(), ends))
        torch.library.opcheck(torch.ops.swin_moe.expert_bias_gradient, (x.detach(), ends))


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Networks take the operators, which run in their Python form."""
    used = []

    def take(x, compiled):
        used.append(x.shape)
        return True

    def switch(on):
        monkeypatch.setattr(extension, "kernels_take", take if on else lambda x, compiled: False)
        return used

    return switch


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["ragged", "padded", "chunks of none"])
def test_experts_are_the_same_with_it(as_on_cuda, kind, rate):
    torch.manual_seed(0)
    experts = GroupedExperts(6, 10, 4, fc2_bias=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    counts = 3 if kind == "padded" else torch.tensor([5, 0, 4, 3])
    x = torch.randn(0 if kind == "chunks of none" else 12, 6, requires_grad=True)
    counts = torch.zeros(4, dtype=torch.int64) if kind == "chunks of none" else counts
    pair = torch.arange(len(x)) + 100
    dropout = Dropout(rate, RandomContext(1, 2, pair), 5, pair) if rate else None
    results = []
    for on in (False, True):
        used = as_on_cuda(on)
        y = experts(x, counts, dropout)
        results.append([y, *torch.autograd.grad(y.sin().sum(), (x, *experts.parameters()))])
    assert used
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_dense_network_is_the_same_with_it(as_on_cuda, rate):
    torch.manual_seed(0)
    mlp, shared = Mlp(6, 10, fc2_bias=True, drop=rate, layer=3), SharedExpert(6, 10, fc2_bias=True)
    parameters = [*mlp.parameters(), *shared.parameters()]
    x, random = torch.randn(2, 3, 4, 6, requires_grad=True), RandomContext(1, 2, torch.tensor([5, 9]))
    results = []
    for on in (False, True):
        used = as_on_cuda(on)
        y = mlp(x, random) + shared(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), (x, *parameters))])
    assert used
    torch.testing.assert_close(*results)


def test_a_layer_with_a_hook_is_called(as_on_cuda):
    as_on_cuda(True)
    mlp, seen = Mlp(6, 10, fc2_bias=True, drop=0.0, layer=3), []
    mlp.fc1.register_forward_hook(lambda *given: seen.append(given))
    mlp(torch.randn(1, 2, 2, 6))
    assert len(seen) == 1


def test_float64_and_the_cpu_keep_their_operators(as_on_cuda):
    assert not is_fused(torch.randn(3, 4))
    as_on_cuda(True)
    assert is_fused(torch.randn(3, 4)) and not is_fused(torch.randn(3, 4).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert is_fused(torch.randn(3, 4).double())


def test_a_network_in_bfloat16_is_as_near_with_it(as_on_cuda):
    torch.manual_seed(0)
    model = swin_moe.create_model("digits_swin_moe").train()
    images, random = torch.randn(2, 3, *model.img_size), RandomContext(0, 1, torch.arange(2))
    grads = []
    for on in (False, True):
        used = as_on_cuda(on)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits, aux = model(images, random)
        (logits.float().square().mean() + aux).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert len(used) > 4
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()
