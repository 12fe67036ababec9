"""Packed layers in int8 compute what whole numbers written out give, with every instruction set, shape and threads."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe.ops.packed_layers import INT8_DTYPES, PackedLinear, PackedNorm, packed_layers, refusal, sums_dtype
from tests.ops.test_packed_layers import draw, norm_of, relative

pytestmark = pytest.mark.skipif(bool(refusal()), reason=f"no packed layers here: {refusal()}")

GROUP = 384  # hidden channels that are rounded together
CAPABILITIES = ("default", "avx2", "avx2_vnni", "avx512_bf16")
# Of the whole result: the kernel's rows are float32, and one that lies between two whole numbers may go to either.
BOUND = 1e-3
SHAPES = [
    (1, 7, 0, 5),  # nothing is a whole vector, nor four inputs
    (0, 16, 0, 16),
    (5, 48, 0, 96),
    (100, 33, 0, 70),
    (200, 96, 384, 96),
    (13, 24, 50, 24),
    (3, 1000, 30, 17),  # more inputs than a block is deep
    (97, 64, 1100, 64),  # three groups, the last one short
]


def whole(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows as (whole numbers in [0, 255], scale, least): x is least + scale * numbers."""
    x = x.float()
    least = x.amin(-1, keepdim=True)
    span = x.amax(-1, keepdim=True) - least
    numbers = torch.round((x - least) * torch.where(span > 0, 255 / span, 0.0))
    return numbers.long(), (span / 255).double(), least.double()


def whole_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns weights (O, I) as (whole numbers in [-127, 127], scale of each output)."""
    scale = weight.float().abs().amax(1) / 127
    return torch.round(weight.float() / scale[:, None]).long(), scale.double()


def slow_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the product of rows and weights as whole numbers, in int64 and float64."""
    (rows, scale, least), (columns, of_column) = whole(x), whole_weight(weight)
    y = ((rows @ columns.t()) * scale + least * columns.sum(1)) * of_column
    return y if bias is None else y + bias.double()


def slow(x: Tensor, weights: list[tuple[Tensor, Tensor | None]], before, after, residual: Tensor | None) -> Tensor:
    """Returns what packed layers in int8 do, an operator at a time."""
    x = slow_linear(x if before is None else before(x.double()), *weights[0])
    if len(weights) > 1:
        hidden, (weight, bias) = F.gelu(x), weights[1]
        columns, of_column = whole_weight(weight)
        x = torch.zeros(len(x), len(weight), dtype=torch.float64)
        for group, part in zip(hidden.split(GROUP, 1), columns.split(GROUP, 1)):
            rows, scale, least = whole(group)
            x += (rows @ part.t()) * scale + least * part.sum(1)
        x = x * of_column + (0 if bias is None else bias.double())
    x = x if after is None else after(x)
    return x if residual is None else x + residual


@pytest.mark.parametrize("dtype", INT8_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "hidden", "outputs"), SHAPES)
@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_values_are_those_of_whole_numbers(rows, inputs, hidden, outputs, norm, dtype):
    residual = draw(rows, outputs, seed=1)
    sizes = [inputs, *([hidden] if hidden else []), outputs]
    weights = [
        (draw(o, i, seed=2 + n) / i**0.5, draw(o, seed=5 + n) if norm != "before" or n else None)
        for n, (i, o) in enumerate(zip(sizes, sizes[1:]))
    ]
    layers = [PackedLinear.of(weight, bias, dtype, int8=True) for weight, bias in weights]
    before, after = norm_of(inputs, 20) if norm == "before" else None, norm_of(outputs, 30) if norm == "after" else None
    around = {
        "norm": None if before is None else PackedNorm.of(before, dtype),
        "after": None if after is None else PackedNorm.of(after, dtype),
    }
    given = draw(rows, inputs).to(dtype if norm == "none" else sums_dtype(dtype))
    narrow = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, BOUND)
    for added in (None, residual):
        expected = slow(given.double(), weights, before, after, added) if rows else draw(0, outputs)
        for result_wide in (True, False):
            got = packed_layers(
                given, *layers, **around, residual=None if added is None else added.float(), wide=result_wide
            )
            assert got.shape == expected.shape and got.dtype == (torch.float32 if result_wide else dtype)
            assert relative(got, expected) < (BOUND if result_wide else narrow)


PROGRAM = """
import torch
from swin_moe.ops.packed_layers import PackedLinear, packed_layers

def check(x, weight):  # scales are 1 and least is 0: the result is the sum of whole numbers itself
    x[:, 0], x[:, 1], weight[:, 0] = 0, 255, 127
    exact = x.long() @ weight.long().t()
    assert exact.abs().max() < 2**24  # that float32 holds
    got = packed_layers(x, PackedLinear.of(weight, None, torch.float32, int8=True))
    assert torch.equal(got.long(), exact)
    return got

draw = torch.Generator().manual_seed(0)
for rows, inputs, outputs in ((1, 2, 3), (5, 7, 70), (60, 301, 77), (300, 96, 33), (7, 400, 1)):
    x = torch.randint(0, 256, (rows, inputs), generator=draw).float()
    weight = torch.randint(-127, 128, (outputs, inputs), generator=draw).float()
    check(x, weight)
    for sign in (127.0, -127.0):  # what does not fit into 16 bits
        check(torch.full((rows, inputs), 255.0), torch.full((outputs, inputs), sign))

x, w1, w2 = (torch.randn(s, generator=draw) for s in ((210, 50), (500, 50), (60, 500)))
layers = [PackedLinear.of(w, None, torch.float32, int8=True) for w in (w1, w2)]
found = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    found.append(packed_layers(x, *layers))
assert all(torch.equal(y, found[0]) for y in found)
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sums_are_exact_with_every_instruction_set_and_threads_change_no_bit(capability):
    environment = {**os.environ, "SWIN_MOE_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    if "must be one of" in done.stderr and "on this processor" in done.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert done.returncode == 0, done.stderr


def test_experts_get_their_rows_and_threads_change_nothing():
    counts = torch.tensor([3, 0, 200, 1])
    w1, b1, w2, b2 = draw(4, 40, 24), draw(4, 40, seed=1), draw(4, 24, 40, seed=2), draw(4, 24, seed=3)
    x = draw(204, 24, seed=4).float()
    first, second = (PackedLinear.of(w, b, torch.float32, int8=True) for w, b in ((w1, b1), (w2, b2)))
    got = packed_layers(x, first, second, counts=counts)
    runs = x.double().split(counts.tolist())
    expected = torch.cat(
        [slow(r, [(w1[e], b1[e]), (w2[e], b2[e])], None, None, None) for e, r in enumerate(runs) if len(r)]
    )
    assert relative(got, expected) < BOUND
    torch.set_num_threads(3)
    try:
        assert torch.equal(packed_layers(x, first, second, counts=counts), got)
    finally:
        torch.set_num_threads(1)


def test_merged_rows_are_those_of_patch_merging():
    from swin_moe.models.layers import PatchMerging

    merging = PatchMerging(12, norm_after=False).double()
    torch.nn.init.normal_(merging.norm.bias)
    x, weight = draw(2, 5, 7, 12), merging.reduction.weight.detach()
    packed = PackedLinear.of(weight, None, torch.float32, int8=True)
    got = packed_layers(x.float(), packed, norm=PackedNorm.of(merging.norm, torch.float32), merged=True)
    merging.reduction = torch.nn.Identity()
    rows = merging(x).detach()
    expected = slow_linear(rows.flatten(0, -2), weight, None).view(*rows.shape[:-1], -1)
    assert got.shape == expected.shape and relative(got, expected) < BOUND


def test_rows_and_weights_of_one_number_are_exact():
    weight = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    layer = PackedLinear.of(weight, torch.tensor([0.5, -0.5]), torch.float32, int8=True)
    numbers, scale = whole_weight(weight[:1])
    for value in (0.0, -3.0, 7.5, 1e-38):
        got = packed_layers(torch.full((2, 3), value), layer)
        torch.testing.assert_close(
            got[:, 0].double(), (numbers.sum() * scale * value + 0.5).expand(2), rtol=1e-6, atol=0
        )
        assert got[:, 1].tolist() == [-0.5, -0.5]


def test_what_is_no_number_stays_so_and_only_there():
    x, w1, w2 = torch.randn(4, 40), torch.randn(30, 40), torch.randn(20, 30)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    first, second = (PackedLinear.of(w, None, torch.float32, int8=True) for w in (w1, w2))
    for layers in ((first,), (first, second)):
        assert torch.isnan(packed_layers(x, *layers)).all(1).tolist() == [False, True, True, False]
    w1[4, 5] = float("nan")
    got = packed_layers(x[:1], PackedLinear.of(w1, None, torch.float32, int8=True))
    assert torch.isnan(got).nonzero().tolist() == [[0, 4]]


def test_packed_weights_take_a_byte_each():
    data = {
        int8: PackedLinear.of(torch.zeros(1536, 384), None, torch.bfloat16, int8=int8).data for int8 in (False, True)
    }
    assert data[False].numel() == 2 * 1536 * 384
    of_columns = 3 * 4 * 1536  # scales and two sums
    bytes_of_weight = (data[True].numel() - of_columns) / (1536 * 384)
    assert bytes_of_weight in (1, 2)  # 2 where the processor has no products of bytes


def test_what_does_not_fit_is_refused():
    weight = draw(8, 6)
    int8, plain = (PackedLinear.of(weight, None, torch.float32, int8=int8) for int8 in (True, False))
    with pytest.raises(TypeError, match="rows of int8 products are float32, bfloat16 or float16"):
        packed_layers(torch.zeros(3, 6, dtype=torch.float64), PackedLinear(int8.data, None, 6, 8, torch.float64))
    with pytest.raises(ValueError, match="both weights are int8, or none"):
        packed_layers(torch.zeros(3, 6), int8, PackedLinear.of(draw(6, 8), None, torch.float32))
    with pytest.raises(ValueError, match="32 bits hold sums of 66311 products, the weight has 66312 inputs"):
        PackedLinear.of(torch.zeros(1, 66312), None, torch.float32, int8=True)
    with pytest.raises(ValueError, match="a weight must be what pack_matrices makes of"):
        packed_layers(torch.zeros(3, 60), PackedLinear(int8.data, None, 60, 8, torch.float32))
    assert plain.data.dtype == torch.uint8 and int8.data.dtype == torch.int8
