"""Numbers behind raw elements, against torch's own types."""

import numpy as np
import pytest
import torch

from checkpoint_tools.files.floats import WRITABLE, decode, encode
from swin_moe.checkpoint.errors import CheckpointError

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@pytest.mark.parametrize("dtype", TYPES)
def test_every_element_is_decoded_as_torch_does(dtype):
    size = TYPES[dtype].itemsize
    codes = np.arange(256, dtype="u1") if size == 1 else np.random.default_rng(0).bytes(4096 * size)
    raw = np.frombuffer(bytes(codes), f"<i{size}" if size > 1 else "u1").copy()
    if dtype == "BOOL":
        raw &= 1
    expected = torch.from_numpy(raw).view(TYPES[dtype]).double().numpy()
    assert np.array_equal(decode(raw, dtype), expected, equal_nan=True)


def hard_values() -> np.ndarray:
    """Returns numbers near the ties of bfloat16, subnormals, infinities, and what rounding twice gets wrong."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 1 << 16, 20000).astype("<u4") << 16
    grid = codes.view("<f4")
    grid = grid[np.isfinite(grid)].astype("f8")
    tie = grid * (1 + 2.0**-8)
    near = [tie, tie * (1 + 2.0**-40), tie * (1 - 2.0**-40), grid, grid * (1 + random.random(len(grid)) / 64)]
    return np.concatenate([*near, [0.0, -0.0, np.inf, -np.inf, 1e39, -1e300, 2.0**-133, 2.0**-134, 3 * 2.0**-135]])


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """Returns values rounded by exact arithmetic in float64: to a multiple of the last place, ties to even."""
    _, exponent = np.frexp(values)
    place = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    with np.errstate(invalid="ignore"):
        rounded = np.where(np.isfinite(values), np.rint(values / place) * place, values)
    return np.where(np.abs(rounded) > 3.3895313892515355e38, np.copysign(np.inf, values), rounded)


def test_bfloat16_is_rounded_once():
    values = hard_values()
    raw = np.empty(len(values), "<i2")
    encode(values, "BF16", raw)
    assert np.array_equal(decode(raw, "BF16"), nearest_bfloat16(values))
    twice = torch.from_numpy(values).float().bfloat16().double().numpy()
    assert (twice != nearest_bfloat16(values)).any()  # the values are hard enough to tell


@pytest.mark.parametrize("dtype", WRITABLE)
def test_what_is_encoded_decodes_to_itself(dtype):
    raw = np.frombuffer(np.random.default_rng(1).bytes(8192), f"<i{TYPES[dtype].itemsize}").copy()
    values, again = decode(raw, dtype), np.empty_like(raw)
    encode(values, dtype, again)
    assert np.array_equal(decode(again, dtype), values, equal_nan=True)
    numbers = ~np.isnan(values)
    assert np.array_equal(raw[numbers], again[numbers])


def test_other_dtypes_hold_no_mean():
    with pytest.raises(CheckpointError, match="dtype I64 cannot hold a mean"):
        encode(np.zeros(2), "I64", np.zeros(2, "<i8"))
