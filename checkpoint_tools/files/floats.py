"""Numbers behind raw elements: numpy has neither bfloat16 nor the 8-bit floats."""

import numpy as np

from swin_moe.checkpoint.errors import CheckpointError

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
WRITABLE = ("F64", "F32", "F16", "BF16")


def decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Returns raw elements as float64; exact for all but integers above 2**53."""
    with np.errstate(invalid="ignore"):  # signalling nans
        if dtype in _NUMPY:
            return raw.view(_NUMPY[dtype]).astype(np.float64)
        if dtype == "BF16":
            return (raw.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return _FLOAT8[dtype][raw.view("u1")]


def encode(values: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Writes float64 values into raw elements, rounded to nearest, ties to even.

    Raises:
        CheckpointError: Values are not written in this dtype.
    """
    if dtype not in WRITABLE:
        raise CheckpointError(f"dtype {dtype} cannot hold a mean; allowed: {', '.join(WRITABLE)}")
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            out[...] = _to_bfloat16(values).view(out.dtype)
        else:
            out[...] = values.astype(_NUMPY[dtype]).view(out.dtype)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Returns bfloat16 as uint16. Through float32 rounded to odd, so that rounding twice equals rounding once.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
    """
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    inexact = (back != values) & np.isfinite(near)
    toward_zero = np.where(np.abs(back) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    bits = np.where(inexact, toward_zero.view("<u4") | 1, near.view("<u4"))
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(near), (bits >> 16) | 0x40, rounded).astype("<u2")


def _float8_table(exponent_bits: int, mantissa_bits: int, *, infinity: bool) -> np.ndarray:
    """Returns the value of each of the 256 codes of an 8-bit float (OCP OFP8, revision 1.0, 2023)."""
    code = np.arange(256)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    bias, top = (1 << (exponent_bits - 1)) - 1, (1 << exponent_bits) - 1
    value = np.where(
        exponent == 0,
        mantissa * 2.0 ** (1 - bias - mantissa_bits),
        (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias),
    )
    if infinity:
        value = np.where(exponent == top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where((exponent == top) & (mantissa == (1 << mantissa_bits) - 1), np.nan, value)
    return np.where(code >= 128, -value, value)


_FLOAT8 = {"F8_E4M3": _float8_table(4, 3, infinity=False), "F8_E5M2": _float8_table(5, 2, infinity=True)}
