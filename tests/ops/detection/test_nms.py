"""Suppression: by hand, reference outputs, 500 random cases against loops over boxes, contracts of an operator."""

import pytest
import torch

from swin_moe.ops import extension
from swin_moe.ops.detection.nms import _nms, nms
from swin_moe.ops.detection.soft_nms import _soft_nms, soft_nms
from tests.models.dense.golden import load
from tests.ops.detection import slow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GOLDEN = load("det_ops")
PAIR = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])  # overlap one half


def test_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 0, 10, 9]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.7])
    assert nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert nms(boxes, scores, 0.5, torch.tensor([0, 1, 1, 0])).tolist() == [1, 3, 2]


def test_an_overlap_equal_to_the_threshold_stays():
    """Some versions of the original suppressed it on the CPU and kept it on CUDA."""
    assert nms(PAIR, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0, 1]
    assert nms(PAIR, torch.tensor([0.9, 0.8]), 0.4999).tolist() == [0]


def test_equal_scores_keep_the_order_of_the_input():
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6], [0, 0, 1, 1], [9, 9, 10, 10]])
    assert nms(boxes, torch.full((4,), 0.5), 0.5).tolist() == [0, 1, 3]
    many = torch.arange(200.0)[:, None] * 10 + torch.tensor([0.0, 0, 1, 1])
    assert nms(many, torch.zeros(200), 0.5).tolist() == list(range(200))


def test_a_box_that_is_no_number_overlaps_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [float("nan"), 0, 10, 10], [0, 0, 10, float("inf")], [0, 0, 10, 10]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.4])
    expected = [1, 2, 0]
    assert nms(boxes, scores, 0.5).tolist() == _nms(boxes, scores, None, 0.5).tolist() == expected


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_reference_outputs(threshold):
    boxes, scores, ids = GOLDEN["boxes"], GOLDEN["scores"], GOLDEN["ids"]
    assert torch.equal(nms(boxes, scores, threshold), GOLDEN["nms"][str(threshold)])
    assert torch.equal(nms(boxes, scores, threshold, ids), GOLDEN["batched"][str(threshold)])
    assert torch.equal(_nms(boxes, scores, ids, threshold), GOLDEN["batched"][str(threshold)])


def test_reference_outputs_of_many_classes():
    given = GOLDEN["multiclass"]
    boxes, scores = given["boxes"].view(80, 5, 4), given["scores"][:, :-1]
    row, label = (scores > given["score_thr"]).nonzero(as_tuple=True)
    kept = nms(boxes[row, label], scores[row, label], given["iou"], label)[: given["max"]]
    found = torch.cat([boxes[row, label], scores[row, label, None]], dim=1)[kept]
    assert torch.equal(found, given["dets"]) and torch.equal(label[kept], given["labels"])


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_reference_outputs_of_the_soft_form(method):
    given = GOLDEN["soft"][method]
    kept, scores = soft_nms(GOLDEN["boxes"], GOLDEN["scores"], 0.3, method=method, min_score=0.05)
    assert torch.equal(kept, given["inds"])
    torch.testing.assert_close(scores, given["dets"][:, 4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_five_hundred_random_cases(dtype):
    for seed in range(500):
        boxes, scores, groups = slow.random_boxes(seed, dtype)
        threshold = (0.3, 0.5, 0.7, 0.0, 1 / 3)[seed % 5]
        expected = slow.nms(boxes, scores, threshold, groups)
        assert nms(boxes, scores, threshold, groups).tolist() == expected, seed
        assert _nms(boxes, scores, groups, threshold).tolist() == expected, seed


@pytest.mark.parametrize("gaussian", [False, True])
def test_random_cases_of_the_soft_form(gaussian):
    for seed in range(250):
        boxes, scores, groups = slow.random_boxes(seed, torch.float64)
        numbers = (0.3, (0.5, 0.1)[seed % 2], 1e-3)
        expected = slow.soft_nms(boxes, scores, numbers[0], groups, gaussian, numbers[1], numbers[2])
        method = "gaussian" if gaussian else "linear"
        kept, new = soft_nms(boxes, scores, numbers[0], groups, method=method, sigma=numbers[1], min_score=numbers[2])
        torch.testing.assert_close(new, torch.tensor([score for _, score in expected], dtype=new.dtype))
        plain = _soft_nms(boxes, scores, groups, *numbers[:2], gaussian, numbers[2])
        assert int((plain > -torch.inf).sum()) == len(kept)
        torch.testing.assert_close(plain[kept], new)
        if not gaussian:  # whose last digits depend on the exponential, and with them the order of equal scores
            assert kept.tolist() == [row for row, _ in expected], seed


def test_soft_form_by_hand():
    kept, scores = soft_nms(PAIR, torch.tensor([0.9, 0.8]), 0.3)
    assert kept.tolist() == [0, 1] and scores.tolist() == pytest.approx([0.9, 0.4])
    kept, scores = soft_nms(PAIR, torch.tensor([0.9, 0.8]), 0.3, method="gaussian", sigma=0.5)
    assert scores.tolist() == pytest.approx([0.9, 0.8 * 2.718281828**-0.5])
    assert soft_nms(PAIR, torch.tensor([0.9, 0.8]), 0.3, min_score=0.5)[0].tolist() == [0]
    nothing = torch.tensor([float("nan"), 0.0005])
    assert soft_nms(PAIR, nothing, 0.3)[0].tolist() == []
    apart = torch.tensor([0, 1])
    assert soft_nms(PAIR, torch.tensor([0.9, 0.8]), 0.3, apart)[1].tolist() == pytest.approx([0.9, 0.8])


def test_half_precision_is_compared_in_float32():
    boxes, scores = GOLDEN["boxes"].bfloat16(), GOLDEN["scores"].bfloat16()
    assert torch.equal(nms(boxes, scores, 0.5), nms(boxes.float(), scores.float(), 0.5))
    kept, new = soft_nms(boxes, scores, 0.3)
    assert new.dtype == torch.float32 and torch.equal(kept, soft_nms(boxes.float(), scores.float(), 0.3)[0])


def test_the_number_of_threads_changes_nothing():
    g = torch.Generator().manual_seed(0)
    low = torch.rand(3000, 2, generator=g) * 300
    boxes, scores = torch.cat([low, low + 60], dim=1), torch.rand(3000, generator=g)
    groups = torch.randint(0, 7, (3000,), generator=g)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((nms(boxes, scores, 0.5, groups), *soft_nms(boxes, scores, 0.3, groups)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("device", DEVICES)
def test_contracts_of_an_operator(device):
    boxes, scores, groups = (x.to(device) for x in (GOLDEN["boxes"][:40], GOLDEN["scores"][:40], GOLDEN["ids"][:40]))
    torch.library.opcheck(torch.ops.swin_moe.nms.default, (boxes, scores, groups, 0.5))
    torch.library.opcheck(torch.ops.swin_moe.soft_nms.default, (boxes, scores, None, 0.3, 0.5, True, 1e-3))


@pytest.mark.gpu
def test_cuda_equals_the_cpu():
    for seed in range(100):
        boxes, scores, groups = slow.random_boxes(seed, torch.float32)
        there = [None if x is None else x.cuda() for x in (boxes, scores, groups)]
        assert nms(there[0], there[1], 0.5, there[2]).tolist() == nms(boxes, scores, 0.5, groups).tolist(), seed
        found, expected = soft_nms(there[0], there[1], 0.3, there[2]), soft_nms(boxes, scores, 0.3, groups)
        assert found[0].tolist() == expected[0].tolist(), seed


@pytest.mark.parametrize(
    ("boxes", "scores", "groups", "says"),
    [
        ((3, 5), (3,), None, "boxes must be"),
        ((3, 4), (2,), None, "scores must be"),
        ((3, 4), (3,), torch.zeros(2, dtype=torch.int64), "groups must be"),
        ((3, 4), (3,), torch.zeros(3), "groups must be"),
    ],
)
def test_says_what_is_not_allowed(boxes, scores, groups, says):
    for call in (nms, soft_nms):
        with pytest.raises(ValueError, match=says):
            call(torch.zeros(boxes), torch.zeros(scores), 0.5, groups)
    with pytest.raises(ValueError, match="linear or gaussian"):
        soft_nms(torch.zeros(0, 4), torch.zeros(0), 0.5, method="naive")
    with pytest.raises(ValueError, match="sigma must be above 0"):
        soft_nms(torch.zeros(0, 4), torch.zeros(0), 0.5, method="gaussian", sigma=0.0)


@pytest.mark.skipif(not extension.available("cpu"), reason="the compiled kernels were not built")
def test_the_kernels_are_the_compiled_ones():
    for name in ("nms", "soft_nms"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"swin_moe::{name}", "CPU")
