"""Which CUDA kernels of window attention run where a block can have how much shared memory: every shape that the
operator takes has kernels on every device, by shape, dtype and limit alone, and no launch asks for more."""

import ctypes
import itertools

import pytest
import torch

from swin_moe.ops.attention.fused import HEAD_DIMS, MAX_WINDOW_TOKENS
from tests.csrc.emulation import ELEMENTS, Geometry, WindowLaunch, build, window_attention
from tests.csrc.window.test_window_kernels import DTYPES, SHARED, VARIANTS, check, launch_of
from tests.ops.attention.window_attention_cases import Case, value_and_gradients

# The largest of each class of kernels, and the smallest; 32 alone has kernels whose window is a constant.
DIMS = (HEAD_DIMS[0], 16, 31, 32, 48, HEAD_DIMS[1])
# Windows: squares that are constants, the widest, and every square and oblong that no larger one contains.
WINDOWS = [(n, n) for n in (1, 7, 8, 12, 16, 24)] + [(n, MAX_WINDOW_TOKENS // n) for n in range(1, 33)]


@pytest.fixture(scope="module")
def library():
    made = build()
    made.swin_moe_window_shared.restype = made.swin_moe_window_most_shared.restype = ctypes.c_size_t
    return made


def chosen(library, window, head_dim, dtype, backward, most):
    """Returns bytes of shared memory of the kernels chosen where a block can have `most`; 0 = none."""
    geometry = Geometry.of(*window, window, (0, 0))
    launch = WindowLaunch(geometry=geometry, batch=1, num_heads=1, head_dim=head_dim, element=ELEMENTS[dtype])
    return library.swin_moe_window_shared(ctypes.byref(launch), int(backward), ctypes.c_size_t(most))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", SHARED)
def test_every_window_has_kernels_on_every_device(library, device, dtype, backward):
    most = SHARED[device] << 10
    for window, head_dim in itertools.product(WINDOWS, DIMS):
        assert 0 < chosen(library, window, head_dim, dtype, backward, most) <= most, (window, head_dim)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rectangle_has_kernels_where_there_is_least(library, dtype):
    most = SHARED["consumer"] << 10
    sides = range(1, MAX_WINDOW_TOKENS + 1)
    windows = [(h, w) for h in sides for w in sides[: MAX_WINDOW_TOKENS // h]]
    for window, head_dim, backward in itertools.product(windows, DIMS, (False, True)):
        assert 0 < chosen(library, window, head_dim, dtype, backward, most) <= most, (window, head_dim, backward)


def test_what_is_chosen_by_hand(library):
    """float32, 64 channels: rows are 68 numbers long; tables of a window hold 4 bytes an offset and 12 a token."""

    def forward(stages, keys, table):
        return 4 * 68 * (64 + 2 * stages * keys) + table

    small, large = 904 + 12 * 64, 15888 + 12 * 1024  # 15 x 15 and 63 x 63 offsets, in whole 16 bytes
    arguments = (torch.float32, False)
    assert chosen(library, (8, 8), 64, *arguments, 99 << 10) == pytest.approx(forward(1, 64, small), abs=16)
    assert chosen(library, (32, 32), 64, *arguments, 227 << 10) == forward(2, 64, large)
    assert chosen(library, (32, 32), 64, *arguments, 99 << 10) == forward(2, 32, large)
    assert chosen(library, (32, 32), 64, *arguments, forward(2, 32, large)) == forward(2, 32, large)
    assert chosen(library, (32, 32), 64, *arguments, forward(2, 32, large) - 1) == 0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_none_fits_where_there_is_too_little(library, dtype, backward, monkeypatch):
    assert chosen(library, (16, 16), 32, dtype, backward, 8 << 10) == 0
    # Nor is one launched that a device would refuse: cudaErrorInvalidValue.
    monkeypatch.setenv("SWIN_MOE_EMULATION_SHARED", str(8 << 10))
    assert library.swin_moe_window_most_shared() == 8 << 10
    launch = launch_of(VARIANTS["window 16"], dtype)
    launcher = library.swin_moe_window_backward if backward else library.swin_moe_window_forward
    assert launcher(ctypes.byref(launch), None) == 1


# Kernels for devices with less shared memory, on small windows: a limit in KiB that those for an H100 exceed.
SMALLER = {
    "large, 64": 80,  # forward with 32 keys at a time instead of 64
    "any, 64": 99,  # backward of a small window by the kernels of large ones
    "any, 48": 99,
}


@pytest.mark.parametrize("name", SMALLER)
def test_kernels_for_less_shared_memory_are_as_exact_as_eager(library, name, monkeypatch):
    case = VARIANTS[name]
    shapes = [chosen(library, case.window, case.head_dim, torch.float32, b, SMALLER[name] << 10) for b in (0, 1)]
    others = [chosen(library, case.window, case.head_dim, torch.float32, b, 227 << 10) for b in (0, 1)]
    assert shapes != others and all(shapes)
    monkeypatch.setenv("SWIN_MOE_EMULATION_SHARED", str(SMALLER[name] << 10))
    check(case, torch.float32, window_attention(library))


def test_less_shared_memory_gives_the_numbers_of_more(library, monkeypatch):
    case = Case(1, 12, 16, 1, 64, (12, 8), (3, 2), cosine=True, pad=True)
    tensors, found = case.tensors(1, torch.float32), []
    for most in (227, 80):
        monkeypatch.setenv("SWIN_MOE_EMULATION_SHARED", str(most << 10))
        grad_out = torch.randn(1, 12, 16, 64, generator=torch.Generator().manual_seed(2))
        found.append(value_and_gradients(lambda *t: window_attention(library)(*t, *case.numbers), tensors, grad_out))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)
