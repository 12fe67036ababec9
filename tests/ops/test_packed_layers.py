"""Packed layers compute what torch's operators compute one after another, in every dtype, shape and thread count."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.ops.packed_layers import DTYPES, PackedLinear, PackedNorm, Patches, packed_layers, refusal, sums_dtype

pytestmark = pytest.mark.skipif(bool(refusal()), reason=f"no packed layers here: {refusal()}")

# Relative error of the whole result; of 16 bits what rounding the factors costs.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-300))


def norm_of(channels: int, seed: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(channels, eps=1e-5, dtype=torch.float64)
    nn.init.normal_(norm.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(seed))
    nn.init.normal_(norm.bias, 0.0, 0.3, generator=torch.Generator().manual_seed(seed + 1))
    return norm.requires_grad_(False)


def slow(x: Tensor, weights: list[tuple[Tensor, Tensor | None]], before, after, residual: Tensor | None) -> Tensor:
    """Returns the same in float64, an operator at a time."""
    x = x if before is None else before(x)
    for number, (weight, bias) in enumerate(weights):
        x = F.linear(F.gelu(x) if number else x, weight, bias)
    x = x if after is None else after(x)
    return x if residual is None else x + residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "hidden", "outputs"),
    [
        (1, 7, 0, 5),  # nothing is a whole vector, and bfloat16 has half a pair
        (0, 16, 0, 16),
        (5, 48, 0, 96),
        (100, 33, 0, 70),
        (200, 96, 384, 96),
        (13, 24, 50, 24),
        (3, 1000, 30, 17),  # more inputs than a block is deep
        (97, 64, 1100, 64),  # more hidden channels than are held at once
    ],
)
@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_values_are_those_of_torch(rows, inputs, hidden, outputs, norm, dtype):
    wide = sums_dtype(dtype)
    x, residual = draw(rows, inputs), draw(rows, outputs, seed=1)
    sizes = [inputs, *([hidden] if hidden else []), outputs]
    weights = [
        (draw(o, i, seed=2 + n) / i**0.5, draw(o, seed=5 + n) if norm != "before" or n else None)
        for n, (i, o) in enumerate(zip(sizes, sizes[1:]))
    ]
    layers = [PackedLinear.of(weight, bias, dtype) for weight, bias in weights]
    before, after = norm_of(inputs, 20) if norm == "before" else None, norm_of(outputs, 30) if norm == "after" else None
    around = {
        "norm": None if before is None else PackedNorm.of(before, dtype),
        "after": None if after is None else PackedNorm.of(after, dtype),
    }
    given = x.to(dtype if norm == "none" else wide)
    for added in (None, residual):
        expected = slow(given.double(), weights, before, after, added)
        for result_wide in (True, False):
            got = packed_layers(
                given, *layers, **around, residual=None if added is None else added.to(wide), wide=result_wide
            )
            assert got.shape == expected.shape and got.dtype == (wide if result_wide else dtype)
            assert relative(got, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_merged_rows_are_those_of_patch_merging(size, dtype):
    from swin_moe.models.layers import PatchMerging

    height, width = size
    merging = PatchMerging(12, norm_after=False).double()
    nn.init.normal_(merging.norm.bias)
    x = draw(2, height, width, 12)
    packed = PackedLinear.of(merging.reduction.weight, None, dtype)
    got = packed_layers(x.to(sums_dtype(dtype)), packed, norm=PackedNorm.of(merging.norm, dtype), merged=True)
    assert relative(got, merging(x).detach()) < BOUNDS[dtype]


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 4)], ids=["cut", "padded"])
def test_patches_are_those_of_the_convolution(rows, columns):
    image, weight, bias = draw(2, 3, 11, 13), draw(20, 3, 4, 4, seed=1), draw(20, seed=2)
    padded = F.pad(image, (0, 3, 0, 1))[:, :, : rows * 4, : columns * 4]
    expected = F.conv2d(padded, weight, bias, stride=4).permute(0, 2, 3, 1)
    got = packed_layers(
        image.float(), PackedLinear.of(weight.flatten(1), bias, torch.float32), patches=Patches(4, 4, rows, columns)
    )
    assert got.shape == expected.shape and relative(got, expected) < BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_get_their_rows_and_threads_change_nothing(dtype):
    counts = torch.tensor([3, 0, 200, 1])
    w1, b1, w2, b2 = draw(4, 40, 24), draw(4, 40, seed=1), draw(4, 24, 40, seed=2), draw(4, 24, seed=3)
    x = draw(204, 24, seed=4).to(dtype)
    first, second = PackedLinear.of(w1, b1, dtype), PackedLinear.of(w2, b2, dtype)
    got = packed_layers(x, first, second, counts=counts)
    runs = x.double().split(counts.tolist())
    expected = torch.cat([slow(r, [(w1[e], b1[e]), (w2[e], b2[e])], None, None, None) for e, r in enumerate(runs)])
    assert relative(got, expected) < BOUNDS[dtype]
    torch.set_num_threads(3)
    try:
        assert torch.equal(packed_layers(x, first, second, counts=counts), got)
    finally:
        torch.set_num_threads(1)


def test_gelu_is_exact_over_the_whole_line():
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 100.0, -100.0])])
    one = PackedLinear.of(torch.ones(1, 1), None, torch.float32)
    got = packed_layers(x[:, None], one, one).squeeze(1)
    assert ((got - F.gelu(x.double())).abs() <= 1e-6 + 2e-7 * x.abs()).all()
    beyond = packed_layers(torch.tensor([[float("nan")], [float("inf")]]), one, one)
    assert torch.isnan(beyond[0]) and beyond[1] == float("inf")


def test_what_does_not_fit_is_refused():
    layer = PackedLinear.of(draw(8, 6), draw(8), torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 6\), got \[3, 5\]"):
        packed_layers(torch.zeros(3, 5), layer)
    with pytest.raises(ValueError, match=r"the residual must be \[3, 8\] in Float, got \[3, 8\] in Double"):
        packed_layers(torch.zeros(3, 6), layer, residual=torch.zeros(3, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="x must be Float or Float, got Double"):
        packed_layers(torch.zeros(3, 6, dtype=torch.float64), layer)
    two = PackedLinear.of(draw(2, 8, 6), None, torch.float32)
    with pytest.raises(ValueError, match="counts must be given for 2 experts"):
        packed_layers(torch.zeros(3, 6), two)
    with pytest.raises(ValueError, match="counts must add up to the 3 rows, got 4"):
        packed_layers(torch.zeros(3, 6), two, counts=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="a weight must be what pack_matrices makes of"):
        packed_layers(torch.zeros(3, 60), PackedLinear(layer.data, None, 60, 8, torch.float32))
