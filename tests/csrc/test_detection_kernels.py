"""The CUDA kernels of detectors, run on the host, against the CPU's operators and loops."""

import ctypes

import pytest
import torch

from swin_moe.ops.detection.deform_conv import _columns, _columns_backward
from swin_moe.ops.detection.roi_align import _backward, _forward, box_dtype
from swin_moe.ops.detection.soft_nms import _soft_nms
from tests.csrc.emulation import Guarded, build
from tests.ops.detection import slow
from tests.ops.detection.test_deform_conv import CASES, beside_an_infinity, make
from tests.ops.detection.test_roi_align import between_samples, random_case

ROI_POINTERS = ("source", "rois", "rows", "columns", "row_spans", "column_spans", "image", "out")
ROI_COUNTS = ("boxes", "batch", "channels", "height", "width")
DEFORM_POINTERS = (
    *("x", "offsets", "mask", "grad", "out", "grad_offsets", "grad_mask"),
    *("taken", "shares", "sorted", "order", "spans"),
)
# Beside the operator's own cases one of more channels than a thread takes, and more takes than a block has threads.
DEFORM_CASES = {**CASES, "wide": (2, 20, 2, (9, 11), (3, 3), 2, 1, dict(padding=1))}
ELEMENTS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class NmsLaunch(ctypes.Structure):
    """swin_moe::NmsLaunch."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("boxes", "order", "group", "gone")),
        ("count", ctypes.c_int64),
        ("threshold", ctypes.c_double),
        ("is_double", ctypes.c_int),
    ]


class SoftLaunch(ctypes.Structure):
    """swin_moe::SoftLaunch."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("boxes", "order", "group", "scores", "left")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("threshold", "sigma", "min_score")),
        *((name, ctypes.c_int) for name in ("gaussian", "is_double")),
    ]


class RoiLaunch(ctypes.Structure):
    """swin_moe::RoiLaunch."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ROI_POINTERS),
        *((name, ctypes.c_int64) for name in ROI_COUNTS),
        *((name, ctypes.c_int) for name in ("size", "sampling", "aligned")),
        ("scale", ctypes.c_double),
        ("element", ctypes.c_int),
    ]


class DeformGeometry(ctypes.Structure):
    """swin_moe::DeformGeometry."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("batch", "channels", "height", "width", "out_h", "out_w", "groups")),
        *((n, ctypes.c_int) for n in ("kernel_h", "kernel_w", "stride_h", "stride_w")),
        *((n, ctypes.c_int) for n in ("padding_h", "padding_w", "dilation_h", "dilation_w")),
    ]


class DeformLaunch(ctypes.Structure):
    """swin_moe::DeformLaunch."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in DEFORM_POINTERS),
        ("geometry", DeformGeometry),
        ("is_double", ctypes.c_int),
    ]


@pytest.fixture(params=[False, True], ids=["", "backwards"])
def library(request, monkeypatch):
    if request.param:
        monkeypatch.setenv("SWIN_MOE_EMULATION_REVERSE", "1")
    return build()


def suppress(library, boxes, scores, groups, threshold):
    """Returns the rows that stay, as csrc/cuda/detection/nms_binding.cpp finds them."""
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score if groups is None else by_score[groups[by_score].argsort(stable=True)]
    group = None if groups is None else groups[order]
    gone = torch.zeros(len(boxes), dtype=torch.bool)
    given = [None if t is None else t.data_ptr() for t in (boxes, order, group, gone)]
    launch = NmsLaunch(*given, len(boxes), threshold, boxes.dtype == torch.float64)
    assert library.swin_moe_nms(ctypes.byref(launch), None) == 0
    return by_score[~gone[by_score]].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_suppression_equals_loops(library, dtype):
    for seed in range(60):
        boxes, scores, groups = slow.random_boxes(seed, dtype)
        expected = slow.nms(boxes, scores, 0.5, groups)
        assert suppress(library, boxes, scores, groups, 0.5) == expected, seed


@pytest.mark.parametrize("grouped", [False, True])
def test_suppression_over_several_chunks(library, grouped):
    g = torch.Generator().manual_seed(3)
    low = torch.rand(400, 2, generator=g) * 60
    boxes, scores = torch.cat([low, low + 12], dim=1), torch.rand(400, generator=g)
    groups = torch.randint(0, 2, (400,), generator=g) if grouped else None
    found = suppress(library, boxes, scores, groups, 0.3)
    assert found == slow.nms(boxes, scores, 0.3, groups) and 32 < len(found) < 390


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_suppression_equals_the_plain_form(library, dtype, gaussian):
    for seed in range(40):
        boxes, scores, groups = slow.random_boxes(seed, dtype)
        order = torch.arange(len(boxes)) if groups is None else groups.argsort(stable=True)
        group = None if groups is None else groups[order]
        found, left = scores.clone(), torch.ones(len(boxes), dtype=torch.bool)
        given = [None if t is None else t.data_ptr() for t in (boxes, order, group, found, left)]
        launch = SoftLaunch(*given, len(boxes), 0.3, 0.5, 0.05, gaussian, dtype == torch.float64)
        assert library.swin_moe_soft_nms(ctypes.byref(launch), None) == 0
        torch.testing.assert_close(found, _soft_nms(boxes, scores, groups, 0.3, 0.5, gaussian, 0.05))


def run_roi(library, source, rois, shape, map_size, numbers, *, backward):
    """Returns the result of the kernels, in memory that is not-a-number around and before."""
    size, scale, sampling, aligned = numbers
    wide, (batch, height, width) = box_dtype(source), map_size
    out = Guarded(shape, source.dtype)
    given, boxes = Guarded.copy(source), Guarded.copy(rois.to(wide))
    rows, columns = Guarded((len(rois), size, height), wide), Guarded((len(rois), size, width), wide)
    for weights in (rows, columns):
        weights.tensor.zero_()
    spans = [torch.full((len(rois), size, 2), -7, dtype=torch.int32) for _ in range(2)]
    image = torch.full((len(rois),), -7, dtype=torch.int32)
    addresses = [t.address for t in (given, boxes, rows, columns)] + [t.data_ptr() for t in (*spans, image)]
    counts = (len(rois), batch, shape[1], height, width, size, sampling, aligned, scale, ELEMENTS[source.dtype])
    launch = RoiLaunch(*addresses, out.address, *counts)
    assert library.swin_moe_roi_bins(ctypes.byref(launch), None) == 0
    kernel = library.swin_moe_roi_align_backward if backward else library.swin_moe_roi_align
    assert kernel(ctypes.byref(launch), None) == 0
    assert all(guarded.intact() for guarded in (given, boxes, rows, columns, out))
    return out.tensor


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_features_of_boxes_equal_the_plain_form(library, dtype):
    close = {} if dtype in (torch.bfloat16, torch.float16) else dict(rtol=1e-4, atol=1e-5)
    for seed in range(24):
        features, rois, numbers = random_case(seed, dtype)
        map_size = (len(features), *features.shape[2:])
        shape = (len(rois), features.shape[1], numbers[0], numbers[0])
        found = run_roi(library, features, rois, shape, map_size, numbers, backward=False)
        torch.testing.assert_close(found, _forward(features, rois, *numbers), **close)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        found = run_roi(library, grad, rois, tuple(features.shape), map_size, numbers, backward=True)
        torch.testing.assert_close(found, _backward(grad, rois, *map_size, *numbers[1:]), **close)


def test_boxes_of_no_image_and_boxes_that_are_not_finite(library):
    features = torch.randn(2, 3, 18, 20)
    rois = torch.tensor([[0.0, 1, 1, 9, 9], [2, 1, 1, 9, 9], [-1, 1, 1, 9, 9], [1, float("nan"), 1, 9, 9]])
    numbers, shape = (2, 1.0, 0, True), (4, 3, 2, 2)
    found = run_roi(library, features, rois, shape, (2, 18, 20), numbers, backward=False)
    assert found[1:].isnan().all()
    torch.testing.assert_close(found[:1], _forward(features, rois[:1], *numbers))
    grad = torch.randn(shape)
    found = run_roi(library, grad, rois, (2, 3, 18, 20), (2, 18, 20), numbers, backward=True)
    torch.testing.assert_close(found, _backward(grad[:1], rois[:1], 2, 18, 20, *numbers[1:]))


def test_what_no_sample_reads_takes_no_part(library):
    features, rois, numbers, read = between_samples()
    found = run_roi(library, features, rois, (1, 2, 1, 1), (1, 9, 9), numbers, backward=False)
    torch.testing.assert_close(found.flatten(), features[0][:, read].mean(1))
    grad = torch.full((1, 2, 1, 1), float("inf"))
    found = run_roi(library, grad, rois, (1, 2, 9, 9), (1, 9, 9), numbers, backward=True)[0]
    assert found[:, read].isinf().all() and not found[:, ~read].any()


def test_gradients_of_more_boxes_than_a_block_has_threads(library):
    """A tile sums the boxes near it, of several rounds of threads, in their order: the same bits in other rounds."""
    g = torch.Generator().manual_seed(4)
    low = torch.rand(600, 2, generator=g) * torch.tensor([37.0, 20])
    high = low + 1 + torch.rand(600, 2, generator=g) * 9
    rois = torch.cat([torch.randint(0, 2, (600, 1), generator=g), low, high], dim=1)
    grad, numbers, shape, map_size = (
        torch.randn(600, 3, 2, 2, generator=g),
        (2, 1.0, 0, True),
        (2, 3, 20, 37),
        (2, 20, 37),
    )
    found = run_roi(library, grad, rois, shape, map_size, numbers, backward=True)
    torch.testing.assert_close(found, _backward(grad, rois, *map_size, *numbers[1:]), rtol=1e-4, atol=1e-5)
    order = rois[:, 0].argsort(stable=True)
    assert torch.equal(found, run_roi(library, grad[order], rois[order], shape, map_size, numbers, backward=True))


def pairs(numbers):
    """Returns stride, padding and dilation, down and along each, as deform_columns takes them."""
    found = [numbers.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    return [side for value in found for side in ((value, value) if isinstance(value, int) else value)]


def deform(library, x, offsets, mask, flat, grad=None):
    """Returns the columns, or of a gradient of them those of x, offsets and mask, as
    csrc/cuda/detection/deform_binding.cpp."""
    batch, channels, height, width = x.shape
    taps, outputs = flat[0] * flat[1], offsets.shape[2] * offsets.shape[3]
    groups = offsets.shape[1] // (2 * taps)
    given = [None if t is None else Guarded.copy(t) for t in (x, offsets, mask, grad)]
    out = Guarded((batch, channels, taps, outputs) if grad is None else x.shape, x.dtype)
    grad_offsets, grad_mask = Guarded(offsets.shape, x.dtype), Guarded(offsets[:, ::2].shape, x.dtype)
    takes = 4 * batch * groups * taps * outputs
    taken, shares = torch.full((takes,), -7), Guarded((takes,), x.dtype)
    spans = torch.zeros(batch * groups * (height * width + 1), 2, dtype=torch.int64)
    launch = DeformLaunch(
        *(None if t is None else t.address for t in given),
        *(t.address for t in (out, grad_offsets, grad_mask)),
        taken.data_ptr(),
        shares.address,
        spans=spans.data_ptr(),
        geometry=DeformGeometry(batch, channels, height, width, *offsets.shape[2:], groups, *flat),
        is_double=x.dtype == torch.float64,
    )
    if grad is None:
        assert library.swin_moe_deform_columns(ctypes.byref(launch), None) == 0
        made = [out]
    else:
        assert library.swin_moe_deform_slopes(ctypes.byref(launch), None) == 0
        in_order, order = taken.sort(stable=True)
        launch.sorted, launch.order = in_order.data_ptr(), order.data_ptr()
        assert library.swin_moe_deform_spread(ctypes.byref(launch), None) == 0
        made = [out, grad_offsets, *([] if mask is None else [grad_mask])]
    assert all(t.intact() for t in (*given, out, grad_offsets, grad_mask, shares) if t is not None)
    return [t.tensor for t in made]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DEFORM_CASES)
def test_deformable_columns_equal_the_plain_form(library, name, dtype, masked):
    x, offsets, weight, mask, _, numbers = make(DEFORM_CASES[name], dtype)
    flat, used = [*weight.shape[2:], *pairs(numbers)], mask if masked else None
    close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else {}
    (columns,) = deform(library, x, offsets, used, flat)
    torch.testing.assert_close(columns, _columns(x, offsets, used, *flat), **close)
    grad = torch.randn(columns.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = deform(library, x, offsets, used, flat, grad)
    for ours, plain in zip(found, _columns_backward(grad, x, offsets, used, *flat)):
        torch.testing.assert_close(ours, plain, **close)


def test_places_that_are_not_finite_take_nothing(library):
    x, offsets = torch.randn(1, 3, 5, 6), torch.full((1, 18, 5, 6), float("nan"))
    offsets[:, 9:] = 1e30
    flat = [3, 3, 1, 1, 1, 1, 1, 1]
    assert not deform(library, x, offsets, None, flat)[0].any()
    found = deform(library, x, offsets, None, flat, torch.ones(1, 3, 9, 30))
    assert not any(gradient.any() for gradient in found)


def test_cells_outside_are_zero_whatever_the_first_cell_holds(library):
    x, offsets, grad = beside_an_infinity()
    flat = [1, 1, 1, 1, 0, 0, 1, 1]
    (columns,) = deform(library, x, offsets, None, flat)
    torch.testing.assert_close(columns, _columns(x, offsets, None, *flat))
    assert columns.isfinite().sum() == 28
    grad_x = deform(library, x, offsets, None, flat, grad)[0]
    assert grad_x.isfinite().sum() == 28 and bool((grad_x[0, :, 0, 0] == 0.25).all())
