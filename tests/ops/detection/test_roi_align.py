"""Features of boxes: by hand, reference outputs, 500 random cases sample by sample, gradients, contracts."""

from functools import partial

import pytest
import torch

from swin_moe.ops import extension
from swin_moe.ops.detection.roi_align import _backward, _forward, box_dtype, roi_align
from tests.models.dense.golden import error, image, load
from tests.ops.detection import slow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GOLDEN = load("det_ops")["roi"]


def random_case(seed, dtype):
    """Returns features, boxes and the numbers of a random case."""
    g = torch.Generator().manual_seed(seed)
    shape = [int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 4), (1, 4), (1, 12), (1, 12))]
    features = torch.randn(shape, generator=g).to(dtype)
    boxes, _, _ = slow.random_boxes(seed, features.dtype if dtype == torch.float64 else torch.float32, extent=24.0)
    boxes = boxes[:5] * (0.02 if seed % 7 == 0 else 1.0)
    boxes = boxes.clamp(-300, 300)  # the slow form takes every sample of a huge box
    rois = torch.cat([torch.randint(0, shape[0], (len(boxes), 1), generator=g).to(boxes.dtype), boxes], dim=1)
    size, scale = int(torch.randint(1, 4, (), generator=g)), (0.5, 0.25, 0.37)[seed % 3]
    return features, rois, (size, scale, (0, 0, 2, 3)[seed % 4], bool(seed // 4 % 2))


def test_by_hand():
    features = torch.arange(16.0).view(1, 1, 4, 4)  # cell (y, x) holds 4 y + x at its centre
    whole = roi_align(features, torch.tensor([[0.0, 0, 0, 4, 4]]), 2, 1.0)
    assert whole.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    cell = roi_align(features, torch.tensor([[0.0, 2, 1, 3, 2]]), 1, 1.0, sampling=1)
    assert cell.item() == 6.0
    assert roi_align(features, torch.tensor([[0.0, 2, 1, 3, 2]]), 1, 1.0, sampling=1, aligned=False).item() == 8.5
    assert roi_align(features, torch.tensor([[0.0, 50, 50, 60, 60]]), 2, 1.0).abs().sum() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GOLDEN["out"])
def test_reference_outputs(name, device):
    size, sampling, aligned = name.split("_")
    features = image(GOLDEN["feature_shape"], "det_ops/feat").to(device).requires_grad_()
    rois, expected = GOLDEN["rois"].to(device), GOLDEN["out"][name]
    out = roi_align(features, rois, int(size), 1 / GOLDEN["stride"], int(sampling), aligned == "True")
    out.backward(image(tuple(out.shape), f"det_ops/g{size}{sampling}{aligned}").to(device))
    assert error(expected["out"], out.cpu()) < 1e-5 and error(expected["grad"], features.grad.cpu()) < 1e-5


EVERY_FIFTH = range(0, 500, 5)  # what takes long is the slow form
ALL_OTHERS = [seed for seed in range(500) if seed % 5]


@pytest.mark.parametrize("seeds", [EVERY_FIFTH, pytest.param(ALL_OTHERS, marks=pytest.mark.full)], ids=["few", "more"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_five_hundred_random_cases(dtype, seeds):
    for seed in seeds:
        features, rois, numbers = random_case(seed, dtype)
        expected = torch.from_numpy(slow.roi_align(features, rois, *numbers)).to(dtype)
        found, plain = roi_align(features, rois, *numbers), _forward(features, rois, *numbers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=f"case {seed}")
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5, msg=f"case {seed}")
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        given = (len(features), *features.shape[2:], *numbers[1:])
        back = torch.ops.swin_moe.roi_align_backward(grad, rois, *given)
        torch.testing.assert_close(back, _backward(grad, rois, *given), rtol=1e-4, atol=1e-5)
        product = (found.double() * grad.double()).sum(), (features.double() * back.double()).sum()
        torch.testing.assert_close(*product, rtol=1e-4, atol=1e-4)  # the one is the other's transposed


@pytest.mark.parametrize("factor", [1e3, 1e5, 1e9, 1e30])
def test_huge_boxes_end_and_equal_the_plain_form(factor):
    features = torch.randn(1, 2, 20, 30, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0.0, -1, -1, 1, 1], [0, 0, 0, 1, 1], [0, -1, 0, 2, 0.01], [0, 1, 1, 2, 2]])
    rois[:, 1:] *= factor
    torch.testing.assert_close(roi_align(features, rois, 3, 0.25), _forward(features, rois, 3, 0.25, 0, True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_box_that_is_not_finite_gives_no_number_and_no_gradient(value):
    features = torch.randn(1, 2, 5, 5, requires_grad=True)
    rois = torch.tensor([[0.0, 1, 1, 4, 4], [0, 1, value, 4, 4]])
    out = roi_align(features, rois, 2, 1.0)
    assert out[1].isnan().all() and not out[0].isnan().any()
    assert _forward(features.detach(), rois, 2, 1.0, 0, True)[1].isnan().all()
    out.sum().backward()
    assert torch.equal(features.grad, torch.autograd.grad(roi_align(features, rois[:1], 2, 1.0).sum(), features)[0])


def between_samples(dtype=torch.float32):
    """Returns features, a box of one bin, its numbers and the cells that its two samples a side read: two and two."""
    features = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    read = torch.zeros(9, 9, dtype=torch.bool)
    read[torch.tensor([1, 2, 5, 6])[:, None], torch.tensor([1, 2, 5, 6])] = True
    features[:, :, ~read] = torch.tensor([float("inf"), float("nan")], dtype=dtype)[torch.arange(65) % 2]
    return features, torch.tensor([[0.0, 0, 0, 8, 8]]).to(box_dtype(features)), (1, 1.0, 2, True), read


@pytest.mark.parametrize("compiled", [True, False], ids=["", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_no_sample_reads_takes_no_part(dtype, compiled):
    features, rois, numbers, read = between_samples(dtype)
    verbs = torch.ops.swin_moe.roi_align, torch.ops.swin_moe.roi_align_backward
    forward, backward = verbs if compiled else (_forward, _backward)
    found = forward(features, rois, *numbers).flatten()
    torch.testing.assert_close(found, features[0][:, read].float().mean(1).to(dtype))
    grad = torch.full((1, 2, 1, 1), float("inf"), dtype=dtype)
    found = backward(grad, rois, 1, 9, 9, *numbers[1:])[0]
    assert found[:, read].isinf().all() and not found[:, ~read].any()


def test_without_boxes_there_is_a_gradient_of_zeros():
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = roi_align(features, torch.zeros(0, 5), 7, 0.25)
    out.sum().backward()
    assert out.shape == (0, 3, 7, 7) and torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    features = torch.randn(2, 3, 12, 9).to(dtype).requires_grad_()
    rois = torch.tensor([[0.0, 3, 2, 30, 40], [1, 0, 0, 9, 9]])
    exact = features.detach().float().requires_grad_()
    out, wide = roi_align(features, rois.to(dtype), 3, 0.25), roi_align(exact, rois, 3, 0.25)
    assert out.dtype == dtype and torch.equal(out, wide.to(dtype))
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    wide.backward(grad.float())
    assert features.grad.dtype == dtype and torch.equal(features.grad, exact.grad.to(dtype))


def test_the_number_of_threads_changes_nothing():
    features = torch.randn(2, 32, 50, 60)
    low = torch.rand(200, 2) * 150
    rois = torch.cat([torch.arange(200)[:, None] % 2, low, low + torch.rand(200, 2) * 90], dim=1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = features.clone().requires_grad_()
            out = roi_align(leaf, rois, 7, 0.25)
            out.backward(out.detach().cos())
            found.append((out.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_another_memory_format_gives_the_same():
    features = torch.randn(2, 4, 9, 11)
    rois = torch.tensor([[1.0, 3, 2, 30, 40], [0, 0, 0, 9, 9]])
    last = features.to(memory_format=torch.channels_last)
    assert torch.equal(roi_align(last, rois, 3, 0.25), roi_align(features, rois, 3, 0.25))


def test_gradients():
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0.0, 1, 2, 14, 17], [1, -3, -2, 30, 9], [1, 4, 4, 4, 9]], dtype=torch.float64)
    for sampling in (0, 2):
        align = partial(roi_align, rois_R5=rois, size=2, scale=0.3, sampling=sampling)
        assert torch.autograd.gradcheck(align, (features,))
        assert torch.autograd.gradgradcheck(align, (features,))
    found = torch.func.grad(lambda x: roi_align(x, rois, 2, 0.3).cos().sum())(features.detach())
    (expected,) = torch.autograd.grad(roi_align(features, rois, 2, 0.3).cos().sum(), features)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_contracts_of_an_operator(device):
    features = torch.randn(2, 3, 8, 9, device=device, requires_grad=True)
    rois = torch.tensor([[0.0, 1, 2, 14, 17], [1, 3, 2, 30, 9]], device=device)
    torch.library.opcheck(torch.ops.swin_moe.roi_align.default, (features, rois, 3, 0.25, 0, True))
    grad = torch.randn(2, 3, 3, 3, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.swin_moe.roi_align_backward.default, (grad, rois, 2, 8, 9, 0.25, 2, False))


@pytest.mark.parametrize(
    ("features", "rois", "numbers", "error_type", "says"),
    [
        ((3, 4, 4), (1, 5), (2, 1.0), ValueError, "features must be"),
        ((1, 3, 0, 4), (1, 5), (2, 1.0), ValueError, "a map must have"),
        ((1, 3, 4, 4), (1, 4), (2, 1.0), ValueError, "boxes must be"),
        ((1, 3, 4, 4), (1, 5), (0, 1.0), ValueError, "bins must be"),
        ((1, 3, 4, 4), (1, 5), (2, 0.0), ValueError, "scale above 0"),
        ((1, 3, 4, 4), (1, 5), (2, 1.0, -1), ValueError, "samples 0 to"),
        ((0, 3, 4, 4), (1, 5), (2, 1.0), IndexError, "of an image|of image"),
    ],
)
def test_says_what_is_not_allowed(features, rois, numbers, error_type, says):
    with pytest.raises(error_type, match=says):
        roi_align(torch.zeros(features), torch.zeros(rois), *numbers)


@pytest.mark.skipif(not extension.available("cpu"), reason="the compiled kernels were not built")
def test_the_kernels_are_the_compiled_ones():
    for name in ("roi_align", "roi_align_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"swin_moe::{name}", "CPU")
