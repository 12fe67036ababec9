"""The CUDA kernels that move rows (experts, windows), run on the host, against the Python operators."""

import ctypes
from functools import partial

import pytest
import torch

from swin_moe.ops.moe.moe_permute import _gate_gradient, _permute, _unpermute
from swin_moe.ops.window_shift import _partition
from tests.csrc.emulation import Geometry, Guarded, MoeLaunch, build
from tests.ops.moe.test_moe_permute import CASES, DTYPES, order_of, random_tensor

ELEMENTS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # swin_moe::RowElement


@pytest.fixture(scope="module")
def library():
    return build()


def call(launcher, out, rows, index, *, flags=None, gate=None, grad_out=None, top_k=1, other=None, offset=0):
    """Returns `out` (shape, dtype) as a launcher fills it."""
    sums = torch.float64 if out[1] == torch.float64 or rows.dtype == torch.float64 else torch.float32
    made = Guarded(*out, offset=offset)
    given = {"rows": Guarded.copy(rows, offset=offset)}
    if grad_out is not None:
        given["grad_out"] = Guarded.copy(grad_out, offset=offset)
    if gate is not None:
        given["gate"] = Guarded.copy(gate.to(sums))
    index, flags = index.contiguous(), None if flags is None else flags.contiguous()
    launch = MoeLaunch(
        index=index.data_ptr(),
        flags=None if flags is None else flags.data_ptr(),
        out=made.address,
        outputs=index.numel() if grad_out is not None else out[0][0],
        channels=rows.shape[1],
        top_k=top_k,
        element=ELEMENTS[rows.dtype],
        other_element=ELEMENTS[other or out[1]],
        **{name: guarded.address for name, guarded in given.items()},
    )
    assert launcher(ctypes.byref(launch), None) == 0
    assert all(guarded.intact() for guarded in (made, *given.values()))
    return made.tensor


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("channels", [8, 96, 7])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_of_experts_equal_the_python_operators(library, case, dtypes, channels, offset):
    order = order_of(**case, padded=True)
    tokens, top_k = order.position.shape
    if not order.num_rows:
        return  # the binding answers without a launch
    rows_dtype, gate_dtype = dtypes
    x = random_tensor(tokens, channels, dtype=rows_dtype)
    rows = random_tensor(order.num_rows, channels, dtype=rows_dtype)
    gate = random_tensor(tokens, top_k, dtype=gate_dtype, seed=3)
    wide = torch.promote_types(rows_dtype, gate_dtype)
    grad = random_tensor(tokens, channels, dtype=wide, seed=4)
    sums = torch.float64 if wide == torch.float64 else torch.float32
    run = partial(call, top_k=top_k, offset=offset)
    taken = run(library.swin_moe_permute, (rows.shape, rows_dtype), grad, order.pair, flags=order.vacant, gate=gate)
    plain = run(library.swin_moe_permute, (rows.shape, rows_dtype), x, order.pair)
    of_choices = partial(run, rows=rows, index=order.position, flags=order.keep)
    combined = of_choices(library.swin_moe_unpermute, ((tokens, channels), wide), gate=gate)
    products = of_choices(library.swin_moe_gate_gradient, ((tokens, top_k), sums), grad_out=grad, other=wide)
    assert torch.equal(plain, _permute(x, order.pair, top_k, None, None))
    pairs = (
        (taken, _permute(grad, order.pair, top_k, gate, order.vacant, rows_dtype)),
        (combined, _unpermute(rows, order.position, order.keep, gate)),
        (products, _gate_gradient(rows, grad, order.position, order.keep)),
    )
    for found, expected in pairs:
        coarse = 2 * torch.finfo(expected.dtype).eps  # PyTorch rounds after every choice
        assert (found.double() - expected.double()).norm() <= coarse * expected.double().norm()


@pytest.mark.parametrize("bytes_per_token", [1, 2, 6, 4, 24, 32, 80])
def test_windows_equal_roll_and_reshape(library, bytes_per_token):
    window, shift, shape = (3, 5), (2, 4), (2, 6, 20, bytes_per_token)
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    windows, back = torch.zeros(16, 15, bytes_per_token, dtype=torch.uint8), torch.zeros_like(x)
    geometry = ctypes.byref(Geometry.of(6, 20, window, shift))
    for source, target, merge in ((x, windows, 0), (windows, back, 1)):
        launcher = library.swin_moe_move_windows
        launcher.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        launcher.argtypes += [ctypes.c_int, ctypes.c_void_p]
        assert launcher(source.data_ptr(), target.data_ptr(), geometry, 2, bytes_per_token, merge, None) == 0
    assert torch.equal(windows, _partition(x, *window, *shift))
    assert torch.equal(back, x)


def test_a_vacant_row_adds_nothing_whatever_it_points_to(library):
    order = order_of(**CASES["all kept"], padded=True)
    tokens, top_k = order.position.shape
    assert order.vacant is not None and order.vacant.any()
    gate = random_tensor(tokens, top_k, dtype=torch.float32, seed=3)
    grad = random_tensor(tokens, 8, dtype=torch.float32)
    grad[order.pair[order.vacant] // top_k] = float("inf")
    size = (order.num_rows, 8), torch.float32
    taken = call(library.swin_moe_permute, size, grad, order.pair, flags=order.vacant, gate=gate, top_k=top_k)
    assert taken[order.vacant].eq(0).all()
