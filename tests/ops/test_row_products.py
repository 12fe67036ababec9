"""Products of few rows by our kernels: against float64, for every order in memory, and the same bits on all threads."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.ops import extension, row_products
from swin_moe.ops import grouped_linear as grouped_module
from swin_moe.ops.grouped_linear import grouped_linear
from swin_moe.ops.linear import Linear, serves_few
from swin_moe.ops.random_draws import UnitDraw
from swin_moe.randomness import RandomContext

pytestmark = pytest.mark.skipif(not row_products._has_kernels(), reason="this build or processor has no such kernels")
DTYPES = (torch.float32, torch.bfloat16)
# (rows, inputs, outputs): one of each, tails of vectors, panels and blocks of steps, odd pairs, several parts,
# several runs of rows in a weight's gradient.
SHAPES = [(1, 1, 1), (5, 33, 17), (49, 96, 384), (200, 300, 70), (300, 520, 40), (31, 2, 300), (2600, 20, 12)]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_layer_and_its_gradients(shape, dtype, weight_dtype):
    rows, inputs, outputs = shape
    bound = BOUNDS[torch.bfloat16 if torch.bfloat16 in (dtype, weight_dtype) else torch.float32]
    for transposed in (False, True):
        weight = draw(*(inputs, outputs)[:: 1 if transposed else -1], seed=1, dtype=weight_dtype)
        given = [draw(rows, inputs, seed=0, dtype=dtype), weight.t() if transposed else weight]
        given.append(draw(outputs, seed=2, dtype=weight_dtype))
        seen = draw(rows, outputs, seed=3, dtype=dtype)
        mine = [t.detach().requires_grad_() for t in given]
        exact = [t.detach().double().requires_grad_() for t in given]
        y, expected = row_products.row_linear(*mine), F.linear(*exact)
        assert y.dtype == dtype and error(y.detach(), expected.detach()) < bound
        pairs = zip(torch.autograd.grad(y, mine, seen), torch.autograd.grad(expected, exact, seen.double()), given)
        for found, wanted, leaf in pairs:
            assert found.dtype == leaf.dtype and found.shape == leaf.shape and error(found, wanted) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [[70, 0, 3, 240], [0, 0, 0, 0], [0, 313, 0, 0]])
def test_experts_and_their_gradients(counts, transposed, dtype):
    shape = (4, 24, 40)
    weight = draw(4, 40, 24, seed=1, dtype=dtype).transpose(1, 2) if transposed else draw(*shape, seed=1, dtype=dtype)
    x, bias, numbers = draw(320, 24, seed=0, dtype=dtype), draw(4, 40, seed=2, dtype=dtype), torch.tensor(counts)

    def run(kind: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, weight, bias)]
        y = grouped_linear(leaves[0], leaves[1], leaves[2], numbers)
        return [y.detach(), *torch.autograd.grad(y, leaves, draw(320, 40, seed=3).to(kind))]

    assert grouped_module._is_few(x, weight)
    found, exact = run(dtype), run(torch.float64)
    for mine, wanted in zip(found, exact):
        assert mine.stride() == wanted.stride() and error(mine, wanted) < BOUNDS[dtype]
    assert not found[0][sum(counts) :].any() and not found[1][sum(counts) :].any()


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(DTYPES[0], DTYPES[0]), (DTYPES[1], DTYPES[0])])
def test_experts_as_one_operator_round_as_its_parts(dtype, weight_dtype, dropped):
    counts = torch.tensor([30, 0, 3, 60])
    shapes = [(100, 24), (4, 40, 24), (4, 40), (4, 40, 24), (4, 24)]
    kinds = [dtype, weight_dtype, dtype, weight_dtype, dtype]
    given = [draw(*shape, seed=n, dtype=kind) for n, (shape, kind) in enumerate(zip(shapes, kinds))]
    random = RandomContext(seed=3, step=5, sample=torch.zeros(1, dtype=torch.int64))
    units = UnitDraw(random, torch.arange(100), purpose="expert_dropout", layer=2, drop=0.3, scale=1 / 0.7)
    results = []
    for whole in (True, False):
        x, *leaves = [t.detach().clone().requires_grad_() for t in given]
        if whole:
            y = row_products.expert_rows(x, counts, *leaves, draw=units if dropped else None)
        else:
            hidden = F.gelu(grouped_linear(x, leaves[0].transpose(1, 2), leaves[1], counts))
            y = grouped_linear(units.apply(hidden) if dropped else hidden, leaves[2], leaves[3], counts)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *leaves], draw(100, 24, seed=9, dtype=dtype))])
    assert not dropped or results[0][0].any()
    for found, wanted in zip(*results):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_every_number_of_threads(dtype):
    x, weight, bias = (draw(*s, seed=n, dtype=dtype) for n, s in enumerate([(2200, 300), (130, 300), (130,)]))
    grad = draw(2200, 130, seed=3, dtype=dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            y = torch.ops.swin_moe.row_linear(x, weight, bias)
            results.append([y, *torch.ops.swin_moe.row_linear_backward(grad, x, weight, [True] * 3)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_a_sum_of_many_rows_keeps_its_digits():
    x, grad = torch.ones(40_000, 2), torch.full((40_000, 1), 0.1)
    found = torch.ops.swin_moe.row_linear_backward(grad, x, torch.zeros(1, 2), [False, True, False])[1]
    torch.testing.assert_close(found, torch.full((1, 2), 4000.0), rtol=5e-5, atol=0)  # added one by one 4e-4


def test_a_row_does_not_depend_on_its_neighbours():
    x, weight = draw(300, 300, seed=0), draw(70, 300, seed=1)
    whole = torch.ops.swin_moe.row_linear(x, weight, None)
    assert torch.equal(whole[7:12], torch.ops.swin_moe.row_linear(x[7:12], weight, None))


def test_strides_of_what_comes_in():
    x, weight, seen = draw(24, 30, seed=0).t(), draw(40, 48, seed=1)[:, ::2], draw(40, 30, seed=2).t()
    exact = [t.double().requires_grad_() for t in (x, weight)]
    mine = [t.detach().requires_grad_() for t in (x, weight)]
    row_products.row_linear(*mine, None).backward(seen)
    F.linear(*exact).backward(seen.double())
    assert all(error(a.grad, b.grad) < BOUNDS[torch.float32] for a, b in zip(mine, exact))


@pytest.mark.parametrize("capability", ["avx2", "avx512_bf16"])
def test_how_many_rows_are_few(monkeypatch, capability):
    monkeypatch.setattr(extension, "cpu_capability", lambda: capability)
    most, wide = row_products.most_rows.__wrapped__, capability == "avx512_bf16"
    # MKL multiplies float32 with AVX2 as fast, and bfloat16 goes through float32 by nobody else's kernels.
    assert most(torch.float32, single=True) == (row_products.MOST_ROWS if wide else 0)
    assert most(torch.float32, single=False) == (row_products.MOST_ROWS if wide else row_products.MOST_ROWS_AVX2)
    assert most(torch.bfloat16, single=True) == (row_products.MOST_ROWS if wide else math.inf)


@pytest.mark.parametrize("most", [0, 40, math.inf])
def test_which_products_they_take(monkeypatch, most):
    monkeypatch.setattr(row_products, "most_rows", lambda dtype, single: most)
    rows = 40
    x, weight = torch.zeros(rows, 32), torch.zeros(8, 32)
    assert serves_few(x, weight) == (most > 0)
    assert serves_few(torch.zeros(rows + 1, 32), weight) == (most == math.inf)
    assert not serves_few(x[:0], weight)
    assert not serves_few(x.double(), weight.double())
    assert not serves_few(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu"):
        assert not serves_few(x, weight)
    compiled = torch.compile(Linear(32, 8), fullgraph=True, backend="aot_eager")
    assert compiled(x).shape == (len(x), 8)


def test_what_fits_nothing_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"row_linear: x must be .*got \[3, 4\] and \[2, 5\]"):
        torch.ops.swin_moe.row_linear(torch.zeros(3, 4), torch.zeros(2, 5), None)
    with pytest.raises(ValueError, match="experts have 4 rows, there are 3"):
        row_products.grouped_rows(torch.zeros(3, 4), torch.zeros(2, 4, 5), None, torch.tensor([3, 1]))
    with pytest.raises(TypeError, match="float32 and bfloat16, got Double"):
        torch.ops.swin_moe.row_linear(torch.zeros(3, 4).double(), torch.zeros(2, 4).double(), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_keep_the_contract_of_an_operator(dtype):
    x, weight, counts = draw(6, 4, seed=0, dtype=dtype), draw(2, 4, 5, seed=1, dtype=dtype), torch.tensor([2, 3])
    torch.library.opcheck(torch.ops.swin_moe.grouped_rows, (x, weight, None, counts))
    torch.library.opcheck(torch.ops.swin_moe.row_linear, (x, weight[0].t(), None))
    arguments = (draw(6, 5, seed=2, dtype=dtype), x, weight[0].t(), [True, True, False])
    torch.library.opcheck(torch.ops.swin_moe.row_linear_backward, arguments)
