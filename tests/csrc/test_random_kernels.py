"""The CUDA kernels of random draws, run on the host, against the Python form, bit for bit."""

import ctypes

import pytest
import torch

from swin_moe.ops import random_draws
from tests.csrc.emulation import Guarded, build
from tests.csrc.rows.test_row_kernels import ELEMENTS
from tests.ops.test_random_draws import ROWS, equal_bits

BLOCKS_OF_LAUNCH = 128  # swin_moe::kBlocksOfLaunch
I64, F64, INT, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_int, ctypes.c_void_p


class Site(ctypes.Structure):
    """swin_moe::DrawSite."""

    _fields_ = [("layer", I64), ("purpose", I64), ("site", I64)]


class DropPathLaunch(ctypes.Structure):
    """swin_moe::DropPathLaunch."""

    _fields_ = [
        ("words", POINTER),
        ("sample", POINTER),
        ("out", POINTER),
        ("batch", I64),
        ("blocks", I64),
        ("purpose", I64 * 2),
        ("purposes", INT),
        ("element", INT),
        ("first_block", I64),
        ("launch_blocks", INT),
        ("threshold", I64 * BLOCKS_OF_LAUNCH),
        ("factor", F64 * BLOCKS_OF_LAUNCH),
    ]


class DropoutLaunch(ctypes.Structure):
    """swin_moe::DropoutLaunch."""

    _fields_ = [
        ("x", POINTER),
        ("out", POINTER),
        ("words", POINTER),
        ("rows", POINTER),
        ("count", I64),
        ("units", I64),
        ("draw", Site),
        ("threshold", I64),
        ("factor", F64),
        ("element", INT),
    ]


class NormalLaunch(ctypes.Structure):
    """swin_moe::NormalLaunch."""

    _fields_ = [("words", POINTER), ("rows", POINTER), ("out", POINTER), ("count", I64), ("units", I64), ("draw", Site)]


WORDS = torch.tensor([2**62 + 5, 12345])


@pytest.fixture(scope="module")
def library():
    return build()


def threshold(drop):
    return round(drop * 2.0**32) - 2**31


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_path(library, dtype):
    rates, sample = [0.0, 0.2, 0.5], torch.arange(40) * 5
    made = Guarded((2, 3, 40), dtype)
    launch = DropPathLaunch(
        words=WORDS.data_ptr(),
        sample=sample.data_ptr(),
        out=made.address,
        batch=40,
        blocks=3,
        purposes=2,
        purpose=(1, 2),
        element=ELEMENTS[dtype],
        first_block=0,
        launch_blocks=3,
    )
    for block, rate in enumerate(rates):
        launch.threshold[block] = threshold(rate)
        launch.factor[block] = float(torch.ones((), dtype=dtype).div(1.0 - rate))
    assert library.swin_moe_drop_path(ctypes.byref(launch), None) == 0
    assert made.intact()
    assert equal_bits(made.tensor, random_draws._drop_path_factors(WORDS, sample, rates, [1, 2], dtype))


@pytest.mark.parametrize("units", [1, 33, 96])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout(library, dtype, units):
    x, drop, scale = torch.randn(len(ROWS), units).to(dtype), 0.3, 1 / 0.7
    given, made = Guarded.copy(x), Guarded(tuple(x.shape), dtype)
    launch = DropoutLaunch(
        x=given.address,
        out=made.address,
        words=WORDS.data_ptr(),
        rows=ROWS.data_ptr(),
        count=len(x),
        units=units,
        draw=Site(2, 3, 1),
        threshold=threshold(drop),
        factor=float(torch.tensor(scale, dtype=dtype)),
        element=ELEMENTS[dtype],
    )
    assert library.swin_moe_random_dropout(ctypes.byref(launch), None) == 0
    assert made.intact() and given.intact()
    assert equal_bits(made.tensor, random_draws._random_dropout(x, WORDS, 2, 3, 1, ROWS, drop, scale))


@pytest.mark.parametrize("units", [1, 8, 70])
def test_normal(library, units):
    made = Guarded((len(ROWS), units), torch.float32)
    launch = NormalLaunch(
        words=WORDS.data_ptr(),
        rows=ROWS.data_ptr(),
        out=made.address,
        count=len(ROWS),
        units=units,
        draw=Site(4, 0, -1),
    )
    assert library.swin_moe_random_normal(ctypes.byref(launch), None) == 0
    assert made.intact()
    # Of float64 functions the host's last digits may differ from PyTorch's, which float32 hardly ever shows.
    expected = random_draws._random_normal(WORDS, 4, 0, ROWS, units)
    torch.testing.assert_close(made.tensor, expected, rtol=2**-23, atol=0)
