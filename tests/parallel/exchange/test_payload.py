"""Rounded rows: values by hand, error bounds, what is never rounded, what is not finite."""

import pytest
import torch

from swin_moe.parallel.exchange.payload import PAYLOADS, HalfRows, ScaledRows, rounding_error

E4M3 = ScaledRows(torch.float8_e4m3fn)


def carried(codec, rows):
    encoded = codec.encode(rows)
    assert encoded.shape[0] == rows.shape[0] and encoded.is_contiguous()
    return codec.decode(encoded, rows.dtype)


def test_values_by_hand():
    # Largest magnitude 896 = 2 * 448: the scale is 2, and what e4m3 holds (3 fraction bits) survives times 2.
    rows = torch.tensor([[896.0, -2.0, 0.0, 18.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(carried(E4M3, rows), rows)
    encoded = E4M3.encode(rows)
    assert encoded.dtype == torch.uint8 and encoded.shape == (3, 8)
    assert encoded[0, 4:].view(torch.float32).item() == 2.0
    assert carried(E4M3, torch.tensor([[896.0, 33.0]])).tolist() == [[896.0, 32.0]]  # 16.5 lies between 16 and 18
    assert carried(HalfRows(), torch.tensor([[1.0, 1 + 2**-9]])).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_every_element_within_the_bound_of_its_type(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(200, 96, generator=generator) * scale).to(dtype)
    bound = 2.0**-8 * rows.double().abs()
    if HalfRows().applies(rows):
        assert ((carried(HalfRows(), rows) - rows).double().abs() <= bound).all()
    # e4m3: half a unit of 3 fraction bits, or half the smallest step (2**-9) times the scale.
    step = rows.double().abs().amax(dim=1, keepdim=True) / 448 * 2.0**-9
    bound = torch.maximum(rows.double().abs() * 2.0**-4, 0.5 * step)
    own = torch.finfo(dtype).eps * rows.double().abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((carried(E4M3, rows) - rows).double().abs() <= 1.0001 * bound + own).all()


def test_the_error_of_normal_rows():
    rows = torch.randn(1000, 192, generator=torch.Generator().manual_seed(1))
    error = {name: rounding_error(codec, rows) for name, codec in PAYLOADS.items() if codec is not None}
    relative = {name: float((e / r).sqrt()) for name, (e, r) in error.items()}
    assert 0.0015 < relative["bf16"] < 0.0018
    assert 0.02 < relative["fp8"] < 0.03
    e, r = rounding_error(ScaledRows(torch.float8_e5m2), rows)
    assert 1.8 < float((e / r).sqrt()) / relative["fp8"] < 2.2  # why gradients are not e5m2


def test_only_what_gets_smaller_is_rounded():
    half, ids = torch.ones(2, 8, dtype=torch.float16), torch.ones(2, 8, dtype=torch.int64)
    assert not HalfRows().applies(half) and not HalfRows().applies(ids) and not E4M3.applies(ids)
    assert HalfRows().applies(half.float()) and E4M3.applies(half)
    assert not E4M3.applies(half[:, :4]) and not E4M3.applies(half.float()[:, 0])  # the scale would cost what is saved
    assert E4M3.encode(half.float()).shape[1] == 12


def test_no_rows_and_rows_that_are_not_contiguous():
    for codec in (HalfRows(), E4M3):
        assert carried(codec, torch.empty(0, 8)).shape == (0, 8)
        rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
        assert torch.equal(codec.decode(codec.encode(rows.t()), rows.dtype), carried(codec, rows.t().contiguous()))


def test_what_is_not_finite_stays_so_and_extremes_are_kept():
    for value in (float("inf"), -float("inf"), float("nan")):
        rows = torch.ones(2, 8)
        rows[1, 3] = value
        for codec in (HalfRows(), E4M3):
            found = carried(codec, rows)
            assert torch.equal(found[0], rows[0]) and not torch.isfinite(found[1, 3])
    largest = torch.finfo(torch.float32).max
    assert carried(E4M3, torch.tensor([[largest, -largest]])).isfinite().all()
    tiny = torch.full((1, 8), 1e-44)
    assert carried(E4M3, tiny).abs().max() <= 1e-37  # flushed, not divided by zero
