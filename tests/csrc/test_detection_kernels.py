"""The CUDA kernels of detectors, run on the host, against the CPU's operators and loops."""

import ctypes

import pytest
import torch

from swin_moe.ops.detection.roi_align import _backward, _forward, box_dtype
from swin_moe.ops.detection.soft_nms import _soft_nms
from tests.csrc.emulation import Guarded, build
from tests.ops.detection import slow
from tests.ops.detection.test_roi_align import random_case

ROI_POINTERS = ("source", "rois", "rows", "columns", "row_spans", "column_spans", "image", "out")
ROI_COUNTS = ("boxes", "batch", "channels", "height", "width")
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


@pytest.fixture(params=[False, True], ids=["", "backwards"])
def library(request, monkeypatch):
    if request.param:
        monkeypatch.setenv("SWIN_MOE_EMULATION_REVERSE", "1")
    return build()


def suppress(library, boxes, scores, groups, threshold):
    """Returns the rows that stay, as csrc/cuda/nms_binding.cpp finds them."""
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
