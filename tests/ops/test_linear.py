"""Linear layers by oneDNN compute what PyTorch's compute; everything else is left to PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F

from swin_moe.ops import linear as linear_module
from swin_moe.ops.grouped_linear import grouped_linear
from swin_moe.ops.linear import SMALLEST_MACS, SMALLEST_ROWS, Linear, linear, serves

needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def by_onednn(monkeypatch):
    """Every product in float32 on the CPU goes to oneDNN, on any processor."""
    monkeypatch.setattr(linear_module, "faster_products", lambda: "a test wants it")
    monkeypatch.setattr(linear_module, "SMALLEST_MACS", 1)
    monkeypatch.setattr(linear_module, "SMALLEST_ROWS", 1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@needs_mkldnn
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3, 4), (SMALLEST_ROWS + 1,), (2, 200)])
def test_values_and_gradients_are_those_of_pytorch(by_onednn, rows, with_bias):
    tensors = [draw(*rows, 24), draw(40, 24, seed=1), draw(40, seed=2)][: 3 if with_bias else 2]
    weight = draw(*rows, 40, seed=3)
    exact = [t.double().requires_grad_() for t in tensors]
    mine = [t.clone().requires_grad_() for t in tensors]
    assert serves(mine[0], mine[1])
    expected, out = F.linear(*exact), linear(*mine)
    assert relative(out.detach(), expected.detach()) < 1e-6
    gradients = torch.autograd.grad((expected * weight).sum(), exact)
    for got, want in zip(torch.autograd.grad((out * weight).sum(), mine), gradients):
        assert got.shape == want.shape and relative(got, want) < 1e-6


@needs_mkldnn
def test_only_what_is_asked_for_gets_a_gradient(by_onednn):
    x, layer = draw(300, 24), Linear(24, 40)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None


@needs_mkldnn
def test_strided_inputs_and_gradients(by_onednn):
    x, weight = draw(24, 300).t(), draw(40, 48, seed=1)[:, ::2]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    mine = [t.detach().requires_grad_() for t in (x, weight)]
    (linear(*mine).t().contiguous().t() ** 2).sum().backward()
    (F.linear(*exact) ** 2).sum().backward()
    for got, want in zip(mine, exact):
        assert relative(got.grad, want.grad) < 1e-6


@needs_mkldnn
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [[300, 0, 17], [1, 2, 3], [0, 0, 320]])
def test_experts_compute_the_same_with_and_without(monkeypatch, transposed, counts):
    weight = draw(3, 40, 24, seed=1).transpose(1, 2) if transposed else draw(3, 24, 40, seed=1)
    x, bias, numbers = draw(320, 24), draw(3, 40, seed=2), torch.tensor(counts)
    kept = slice(0, sum(counts))

    def run() -> list[torch.Tensor]:
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
        y = grouped_linear(leaves[0], leaves[1], leaves[2], numbers)
        gradients = torch.autograd.grad((y[kept] * draw(320, 40, seed=3)[kept]).sum(), leaves)
        return [y.detach()[kept], *gradients]

    plain = run()
    monkeypatch.setattr(linear_module, "faster_products", lambda: "a test wants it")
    monkeypatch.setattr(linear_module, "SMALLEST_MACS", 1)
    monkeypatch.setattr(linear_module, "SMALLEST_ROWS", 1)
    for got, want in zip(run(), plain):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(linear_module, "faster_products", lambda: "a test wants it")
    x, weight = torch.zeros(SMALLEST_MACS // 1024, 32), torch.zeros(32, 32)
    assert serves(x, weight)
    assert not serves(x[1:], weight)  # too few products
    assert not serves(torch.zeros(SMALLEST_ROWS - 1, 4096), torch.zeros(4096, 4096))
    assert not serves(x.double(), weight.double())
    assert not serves(x.bfloat16(), weight.bfloat16())
    assert not serves(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu"):
        assert not serves(x, weight)
    assert torch.func.vmap(lambda row: torch.tensor(float(serves(x, weight))) + 0 * row)(torch.zeros(2)).tolist() == [
        0,
        0,
    ]
    monkeypatch.setattr(linear_module, "faster_products", lambda: None)
    assert not serves(x, weight)


@pytest.mark.parametrize("vendor", ["GenuineIntel", ""])
def test_processors_that_mkl_serves_well_or_that_say_nothing_keep_mkl(monkeypatch, vendor):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(linear_module, "cpu_field", lambda name: vendor)
    assert linear_module.faster_products.__wrapped__() is None


@needs_mkldnn
def test_a_layer_has_the_parameters_of_pytorchs_and_can_be_compiled(by_onednn):
    torch.manual_seed(0)
    mine = Linear(24, 40)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(24, 40)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(mine.state_dict()[name], theirs.state_dict()[name]) for name in mine.state_dict())
    x = draw(8, 24)
    compiled = torch.compile(copy.deepcopy(mine), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x))
