"""The CUDA kernels of bias, GELU and dropout, run on the host, against the Python form in float64."""

import ctypes

import pytest
import torch

from swin_moe.ops import bias_gelu
from tests.csrc.emulation import Guarded, build
from tests.csrc.rows.test_row_kernels import ELEMENTS
from tests.csrc.test_random_kernels import WORDS, Site, threshold

TENSORS = ("x", "grad", "out", "bias", "partials", "grad_bias", "ends", "words", "numbers")
I64 = ctypes.c_int64
# Rows of each expert and rows that belong to none; None: all have as many, and there are no others.
ROWS = {"one": (None, 1, 37), "equal parts": (None, 4, 60), "ragged": ([5, 0, 1, 90, 0, 0, 33, 0], 8, 140)}
ROWS |= {"nobody's": ([0, 0], 2, 20), "no expert": ([], 0, 20), "all of the last": ([0, 0, 70], 3, 70)}


class BiasGeluLaunch(ctypes.Structure):
    """swin_moe::BiasGeluLaunch."""

    _fields_ = [(name, ctypes.c_void_p) for name in TENSORS] + [
        ("rows", I64),
        ("channels", I64),
        ("experts", I64),
        ("draw", Site),
        ("threshold", I64),
        ("factor", ctypes.c_float),
        ("element", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def library():
    loaded = build()
    loaded.swin_moe_bias_gelu_tiles.restype = I64
    loaded.swin_moe_bias_gelu_tiles.argtypes = [I64, I64]
    return loaded


def problem(case, channels, dtype):
    """Returns (x, grad, bias, ends or None, rows of some expert)."""
    counts, experts, rows = ROWS[case]
    generator = torch.Generator().manual_seed(channels)
    x, grad = (torch.randn(rows, channels, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(experts, channels, generator=generator)
    ends = None if counts is None else torch.tensor(counts, dtype=torch.int64).cumsum(0).to(torch.int32)
    return x, grad, bias, ends, rows if counts is None else sum(counts)


def launch(library, verbs, memory, ends, dtype, bias, draw=None):
    """Runs launchers on guarded tensors by name."""
    shape = memory["grad"].tensor.shape
    described = BiasGeluLaunch(
        ends=None if ends is None else ends.data_ptr(),
        rows=shape[0],
        channels=shape[1],
        experts=len(bias),
        element=ELEMENTS[dtype],
        **{name: guarded.address for name, guarded in memory.items()},
    )
    if draw is not None:
        numbers, drop, scale = draw
        described.words, described.numbers = WORDS.data_ptr(), numbers.data_ptr()
        described.draw, described.threshold = Site(2, 3, -1), threshold(drop)
        described.factor = float(torch.tensor(scale, dtype=dtype))
    for verb in verbs:
        assert getattr(library, verb)(ctypes.byref(described), None) == 0
    assert all(guarded.intact() for guarded in memory.values())


def close(made, wanted, dtype):
    rounding = 2e-5 if made.dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(made.double(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("channels", [1, 40, 304])
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_gelu_and_dropout(library, dtype, case, channels, drop, offset):
    x, grad, bias, ends, _ = problem(case, channels, dtype)
    # A power of two: rounded to 16 bits, another scale would not be that of the truth.
    numbers, scale = torch.arange(len(x)) * 7 + (1 << 33), 2.0
    given = {name: Guarded.copy(t, offset=offset) for name, t in (("x", x), ("grad", grad), ("bias", bias))}
    pieces = library.swin_moe_bias_gelu_tiles(*x.shape) + len(bias)
    out, grad_x = (Guarded(tuple(x.shape), dtype, offset=offset) for _ in range(2))
    sums = {"partials": Guarded((pieces, channels), torch.float32), "grad_bias": Guarded(bias.shape, torch.float32)}
    draw = (numbers, drop, scale) if drop else None
    launch(library, ["swin_moe_bias_gelu"], given | {"out": out}, ends, dtype, bias, draw)
    launch(library, ["swin_moe_bias_gelu_backward"], given | {"out": grad_x} | sums, ends, dtype, bias, draw)
    numbers_of_draw = (WORDS, numbers, 2, 3, -1, drop, scale) if drop else bias_gelu.NO_DRAW
    wide = x.double(), bias.double(), ends, *numbers_of_draw
    close(out.tensor, bias_gelu._forward(*wide), dtype)
    expected = bias_gelu._backward(grad.double(), *wide)
    close(grad_x.tensor, expected[0], dtype)
    torch.testing.assert_close(sums["grad_bias"].tensor.double(), expected[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("channels", [1, 40, 304])
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bias_alone(library, dtype, case, channels, offset):
    x, grad, bias, ends, owned = problem(case, channels, dtype)
    x[owned:] = float("nan")  # as a grouped product leaves them
    rows = {"x": Guarded.copy(x, offset=offset), "grad": Guarded.copy(grad, offset=offset)}
    rows["out"] = rows["x"]
    pieces = library.swin_moe_bias_gelu_tiles(*x.shape) + len(bias)
    sums = {"partials": Guarded((pieces, channels), torch.float32), "grad_bias": Guarded(bias.shape, torch.float32)}
    verbs = ["swin_moe_expert_bias", "swin_moe_expert_bias_gradient"]
    launch(library, verbs, rows | sums | {"bias": Guarded.copy(bias, offset=offset)}, ends, dtype, bias)
    ends = torch.arange(1, len(bias) + 1) * (len(x) // len(bias)) if ends is None else ends
    expected = x.double()
    bias_gelu._add_expert_bias(expected, bias, ends)
    close(rows["x"].tensor[:owned], expected[:owned], dtype)
    assert rows["x"].tensor[owned:].isnan().all()
    wanted = bias_gelu._expert_bias_gradient(grad.double(), ends)
    torch.testing.assert_close(sums["grad_bias"].tensor.double(), wanted, rtol=2e-5, atol=2e-5)


def test_bits_do_not_depend_on_the_order_of_threads(library, monkeypatch):
    x, grad, bias, ends, _ = problem("ragged", 304, torch.bfloat16)
    found = []
    for order in ("0", "1"):
        monkeypatch.setenv("SWIN_MOE_EMULATION_REVERSE", order)
        memory = {name: Guarded.copy(t) for name, t in (("x", x), ("grad", grad), ("bias", bias))}
        memory |= {"out": Guarded(tuple(x.shape), x.dtype), "grad_bias": Guarded(bias.shape, torch.float32)}
        pieces = library.swin_moe_bias_gelu_tiles(*x.shape) + len(bias)
        memory["partials"] = Guarded((pieces, x.shape[1]), torch.float32)
        launch(library, ["swin_moe_bias_gelu_backward"], memory, ends, x.dtype, bias)
        found.append((memory["out"].tensor, memory["grad_bias"].tensor))
    assert all(torch.equal(*pair) for pair in zip(*found))
