"""Deformable convolution: without offsets it is a convolution, tap by tap by hand, gradients, contracts."""

import math

import pytest
import torch
import torch.nn.functional as F

from swin_moe.ops import extension
from swin_moe.ops.detection.deform_conv import _columns, _columns_backward, deform_conv2d

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# batch, channels, made, map, kernel, groups of offsets, groups, numbers
CASES = {
    "plain": (2, 4, 6, (7, 8), (3, 3), 1, 1, dict(padding=1)),
    "groups": (2, 4, 6, (7, 8), (3, 3), 2, 2, dict(padding=1)),
    "strided": (1, 3, 2, (9, 6), (3, 2), 1, 1, dict(stride=(2, 1), padding=(0, 1), dilation=(1, 2))),
    "one tap": (1, 2, 2, (3, 5), (1, 1), 2, 1, {}),
    "no image": (0, 2, 2, (4, 4), (3, 3), 1, 1, {}),
}


def make(case, dtype, *, seed=0):
    """Returns x, offsets, weight, mask, bias and the numbers."""
    batch, channels, made, size, kernel, offset_groups, groups, numbers = case
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *size, generator=g).to(dtype)
    weight = torch.randn(made, channels // groups, *kernel, generator=g).to(dtype)
    out = F.conv2d(x, weight, None, **numbers, groups=groups).shape[2:]
    taps = offset_groups * kernel[0] * kernel[1]
    offsets = (2 * torch.randn(batch, 2 * taps, *out, generator=g)).to(dtype)
    mask = torch.rand(batch, taps, *out, generator=g).to(dtype)
    return x, offsets, weight, mask, torch.randn(made, generator=g).to(dtype), numbers


def read(cells, y, x):
    """Returns what a map of channels holds at a place, linear between cells, 0 outside."""
    total = torch.zeros(len(cells), dtype=cells.dtype)
    if not (-1 < y < cells.shape[1] and -1 < x < cells.shape[2]):
        return total
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < cells.shape[1] and 0 <= j < cells.shape[2]:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * cells[:, i, j]
    return total


def slow(x, offsets, weight, mask, bias, numbers):
    """Returns the convolution output by output and tap by tap."""
    pairs = {name: numbers.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    stride, padding, dilation = ((p, p) if isinstance(p, int) else p for p in pairs.values())
    made, each, height, width = weight.shape
    groups, shared = x.shape[1] // each, offsets.shape[1] // (2 * height * width)
    out = torch.zeros(len(x), made, *offsets.shape[2:], dtype=x.dtype)
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (len(x), *offsets.shape[2:]))).tolist():
        seen = torch.zeros(x.shape[1], height * width, dtype=x.dtype)
        for g, tap in torch.cartesian_prod(torch.arange(shared), torch.arange(height * width)).tolist():
            place = (g * height * width + tap) * 2
            y = i * stride[0] - padding[0] + tap // width * dilation[0] + float(offsets[b, place, i, j])
            z = j * stride[1] - padding[1] + tap % width * dilation[1] + float(offsets[b, place + 1, i, j])
            rows = slice(g * x.shape[1] // shared, (g + 1) * x.shape[1] // shared)
            factor = 1 if mask is None else mask[b, g * height * width + tap, i, j]
            seen[rows, tap] = read(x[b, rows], y, z) * factor
        for g in range(groups):
            rows = slice(g * made // groups, (g + 1) * made // groups)
            out[b, rows, i, j] = weight[rows].flatten(1) @ seen[g * each : (g + 1) * each].flatten()
    return out + bias[:, None, None]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_offsets_it_is_a_convolution(case):
    x, offsets, weight, mask, bias, numbers = make(case, torch.float64)
    expected = F.conv2d(x, weight, bias, **numbers, groups=case[6])
    found = deform_conv2d(x, torch.zeros_like(offsets), weight, None, bias, **numbers)
    torch.testing.assert_close(found, expected)
    found = deform_conv2d(x, torch.zeros_like(offsets), weight, torch.full_like(mask, 0.5), None, **numbers)
    torch.testing.assert_close(found, (expected - bias[:, None, None]) / 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", list(CASES.values())[:4], ids=list(CASES)[:4])
def test_equals_loops_over_taps(case, masked):
    for seed in range(5):
        x, offsets, weight, mask, bias, numbers = make(case, torch.float64, seed=seed)
        used = mask if masked else None
        found = deform_conv2d(x, offsets, weight, used, bias, **numbers)
        torch.testing.assert_close(found, slow(x, offsets, weight, used, bias, numbers))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_columns_equal_the_plain_form(case, masked):
    x, offsets, weight, mask, _, numbers = make(case, torch.float64)
    flat = [*weight.shape[2:]]
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = numbers.get(name, default)
        flat += [value, value] if isinstance(value, int) else [*value]
    used = mask if masked else None
    columns = torch.ops.swin_moe.deform_columns(x, offsets, used, *flat)
    torch.testing.assert_close(columns, _columns(x, offsets, used, *flat))
    grad = torch.randn(columns.shape, dtype=torch.float64)
    found = torch.ops.swin_moe.deform_columns_backward(grad, x, offsets, used, *flat)
    for ours, plain in zip(found, _columns_backward(grad, x, offsets, used, *flat)):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", ["groups", "strided"])
def test_gradients(name):
    *tensors, numbers = make(CASES[name], torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: deform_conv2d(*t, **numbers), leaves, fast_mode=True)


def test_what_is_not_finite_reads_zero():
    x, offsets, weight, *_ = make(CASES["one tap"], torch.float32)
    found = deform_conv2d(x, torch.full_like(offsets, float("nan")), weight)
    assert torch.equal(found, torch.zeros_like(found))
    assert torch.equal(deform_conv2d(x, torch.full_like(offsets, 1e30), weight), torch.zeros_like(found))


def beside_an_infinity(dtype=torch.float64):
    """Returns a map whose first cell is infinite, offsets by half a cell, so that the last row and column of a kernel
    of one tap read outside too, and a gradient that is infinite for the very last output."""
    x = torch.randn(1, 2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :, 0, 0] = math.inf
    grad = torch.ones(1, 2, 1, 15, dtype=dtype)
    grad[..., -1] = math.inf
    return x, torch.full((1, 2, 3, 5), 0.5, dtype=dtype), grad


@pytest.mark.parametrize("compiled", [True, False], ids=["", "plain"])
def test_cells_outside_are_zero_whatever_the_first_cell_holds(compiled):
    x, offsets, grad = beside_an_infinity()
    verbs = torch.ops.swin_moe.deform_columns, torch.ops.swin_moe.deform_columns_backward
    forward, backward = verbs if compiled else (_columns, _columns_backward)
    flat = [1, 1, 1, 1, 0, 0, 1, 1]
    found = forward(x, offsets, None, *flat).view(2, 3, 5)
    expected = torch.stack([read(x[0], i + 0.5, j + 0.5) for i in range(3) for j in range(5)], dim=1).view(2, 3, 5)
    assert expected[:, 0, 0].isinf().all() and expected.isfinite().sum() == 28
    torch.testing.assert_close(found, expected)
    grad_x = backward(grad, x, offsets, None, *flat)[0][0]
    assert grad_x[:, 2, 4].isinf().all() and grad_x.isfinite().sum() == 28
    assert torch.equal(grad_x[:, 0, 0], torch.full((2,), 0.25, dtype=x.dtype))


def test_half_precision_reads_in_float32():
    x, offsets, weight, mask, bias, numbers = make(CASES["plain"], torch.bfloat16)
    found = deform_conv2d(x, offsets, weight, mask, bias, **numbers)
    exact = deform_conv2d(*(t.float() for t in (x, offsets, weight, mask, bias)), **numbers)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.2)


def test_the_number_of_threads_changes_nothing():
    *tensors, numbers = make((4, 16, 8, (20, 20), (3, 3), 2, 1, dict(padding=1)), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in tensors[:2]]
            columns = torch.ops.swin_moe.deform_columns(*leaves, tensors[3], 3, 3, 1, 1, 1, 1, 1, 1)
            found.append([columns.detach(), *torch.autograd.grad(columns.cos().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("device", DEVICES)
def test_contracts_of_an_operator(device):
    x, offsets, _, mask, _, _ = make(CASES["groups"], torch.float32)
    given = [t.to(device).requires_grad_() for t in (x, offsets, mask)]
    numbers = (3, 3, 1, 1, 1, 1, 1, 1)
    torch.library.opcheck(torch.ops.swin_moe.deform_columns.default, (*given, *numbers))
    torch.library.opcheck(torch.ops.swin_moe.deform_columns.default, (*given[:2], None, *numbers))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(weight=torch.zeros(6, 3, 3, 3)), "weight must be"),
        (lambda t: t.update(weight=torch.zeros(5, 2, 3, 3)), "multiple of 2 groups"),
        (lambda t: t.update(offsets=torch.zeros(2, 17, 7, 8)), "offsets must be"),
        (lambda t: t.update(mask=torch.zeros(2, 8, 7, 8)), "mask must be"),
        (lambda t: t.update(stride=0), "above 0"),
        (lambda t: t.update(stride=(1 << 32) + 1), "at most 32767, got 4294967297"),
        (lambda t: t.update(padding=(0, 1 << 32)), "at most 32767, got 4294967296"),
        (lambda t: t.update(x=torch.zeros(2, 4, 0, 8)), "less than the kernel"),
    ],
)
def test_says_what_is_not_allowed(change, says):
    x, offsets, weight, mask, _, numbers = make(CASES["plain"], torch.float32)
    given = dict(x=x, offsets=offsets, weight=weight, mask=mask, **numbers)
    change(given)
    with pytest.raises(ValueError, match=says):
        deform_conv2d(**given)


@pytest.mark.skipif(not extension.available("cpu"), reason="the compiled kernels were not built")
def test_the_kernels_are_the_compiled_ones():
    for name in ("deform_columns", "deform_columns_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"swin_moe::{name}", "CPU")
