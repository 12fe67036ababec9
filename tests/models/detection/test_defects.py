"""Defects of the original detectors, each with a test that it is not here; and what a batch may hold."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swin_moe.config import ModelConfig
from swin_moe.models.dense import PyramidBackbone
from swin_moe.models.detection.assign import IGNORED, Assigner
from swin_moe.models.detection.detections import select
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.heads.mask_head import paste_masks
from swin_moe.models.detection.network import Learned
from swin_moe.models.detection.spec import (
    CASCADE,
    BoxHeadSpec,
    DetectionSpec,
    DetectorSpec,
    MaskHeadSpec,
    ProposalSpec,
    Selection,
    SemanticSpec,
)
from swin_moe.models.detection.targets import Targets
from swin_moe.randomness import RandomContext

SMALL = ModelConfig(name="swin", img_size=(64, 64), embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
PROPOSALS = ProposalSpec(scale=4.0, samples=32, training=Selection(60, 30), testing=Selection(60, 30))
BOXES = BoxHeadSpec(fc_channels=16)
MASK = DetectorSpec(
    5, channels=16, proposals=PROPOSALS, box_head=BOXES, mask_head=MaskHeadSpec(1, 8), samples=24, finest_scale=14.0
)
NORMED = BoxHeadSpec(convs=1, conv_channels=8, fcs=1, fc_channels=16, norm=True, loss="giou", loss_weight=10.0)
HYBRID = replace(
    MASK,
    stages=CASCADE,
    cascade=True,
    box_head=replace(NORMED, agnostic=True),
    interleaved=True,
    mask_flow=True,
    semantic=SemanticSpec(7, convs=1),
    mask_head=MaskHeadSpec(1, 16),
    global_attention=True,
)
SPECS = {
    "mask": MASK,
    "boxes": replace(MASK, mask_head=None),
    "cascade": replace(MASK, stages=CASCADE, cascade=True, box_head=NORMED),
    "base cascade": replace(MASK, stages=CASCADE, cascade=True, box_head=replace(BOXES, agnostic=True)),
    "htc": HYBRID,
}


def build(spec: DetectorSpec) -> Detector:
    network = Detector(PyramidBackbone(SMALL), spec)
    network.init_weights(3)
    return network


def objects(count: int, *, crowds: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns boxes, labels, crowd regions and masks of an image of 64 x 64."""
    corner = torch.arange(count + crowds).float()[:, None] * 9 + 2
    boxes = torch.cat([corner, corner + 1, corner + 17, corner + 14], dim=1)
    masks = torch.zeros(count, 64, 64, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes[:count].int().tolist()):
        mask[y1:y2, x1:x2] = True
    return boxes[:count], torch.arange(count) % 5, boxes[count:], masks


def targets(*counts: int) -> Targets:
    """Returns the objects of images with these many each."""
    boxes, labels, crowd, masks = ([row[i] for row in map(objects, counts)] for i in range(4))
    return Targets(boxes, labels, crowd, masks, torch.randint(7, (len(counts), 64, 64)))


def learn(network: Detector, *counts: int) -> Learned:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(counts), 3, 64, 64, generator=generator)
    size = torch.tensor([[64, 64]]).expand(len(counts), 2)
    random = RandomContext(0, 0, torch.arange(len(counts)))
    found = network(images, size, targets(*counts), random=random)
    assert isinstance(found, Learned)
    return found


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0,), ()], ids=str)
def test_every_parameter_takes_part_whatever_a_batch_holds(name, counts):
    """A rank without an image, an object or a positive box gives zeros to what other ranks add up."""
    network = build(SPECS[name])
    losses = learn(network, *counts).losses
    assert all(value.isfinite().all() for value in losses.sums.values())
    torch.stack([value.sum() for value in losses.sums.values()]).sum().backward()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert counts or not parameter.grad.any()
    masks = [key for key in losses.counts if key.endswith("loss_mask")]
    assert len(masks) == (0 if name == "boxes" else len(SPECS[name].stages))
    assert any(counts) or not any(losses.counts[key] for key in masks)


def test_boxes_that_overlap_by_exactly_the_threshold_both_stay():
    """Defect 3: there the CPU suppressed at IoU >= threshold, and CUDA above it."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 3]])
    scores = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.4, 0.6]])
    size = torch.tensor([8, 8])
    found = select(boxes, scores, size, size, DetectionSpec())
    assert found.boxes.tolist() == boxes[:2].tolist()  # 0.5, and 0.75 of the first


@pytest.mark.parametrize("name", ["mask", "cascade", "htc"])
def test_detections_do_not_depend_on_who_shares_the_batch(name):
    """Defect 4: there images with fewer proposals got empty boxes, which became detections of every class."""
    network = build(replace(SPECS[name], detections=DetectionSpec(score=0.01, per_image=1000))).eval()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    images[1] = 0
    sizes = torch.tensor([[64, 64], [20, 33], [50, 64]])
    together = network(images, sizes)
    for number, found in enumerate(together):
        (alone,) = network(images[number : number + 1], sizes[number : number + 1])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
        assert len(found.boxes) > 0


def test_a_box_at_the_upper_edge_is_a_box():
    """Defect 4: there rows whose y2 is 0 counted as padding."""
    boxes, size = torch.tensor([[0.0, 0, 4, 0]]), torch.tensor([8, 8])
    assert len(select(boxes, torch.tensor([[0.9, 0.1]]), size, size, DetectionSpec()).boxes) == 1


@pytest.mark.parametrize("name", SPECS)
def test_an_image_without_proposals_or_detections_has_no_detection(name):
    """Defect 5: there the box head's test path crashed."""
    network = build(SPECS[name]).eval()
    sizes = torch.tensor([[64, 64], [64, 64]])
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps, _ = network.maps(images, None)
    none = torch.zeros(0, 4)
    for proposals in ([none, none], [torch.tensor([[3.0, 4, 30, 40]]), none]):
        found = network.roi_head.detect(maps, proposals, sizes, sizes)
        assert [len(one.boxes) for one in found][1] == 0
        assert all((one.masks is None) == (name == "boxes") for one in found)
        assert name == "boxes" or found[1].masks.shape == (0, 28, 28)
    assert network(images[:0], sizes[:0]) == []


def test_a_mask_beyond_the_image_is_empty():
    """Defect 6: there pasting raised."""
    boxes = torch.tensor([[-9.0, -9, -2, -3], [20, 3, 30, 9], [3, 30, 9, 40], [4, 4, 4, 4], [torch.nan] * 4])
    pasted = paste_masks(torch.ones(5, 28, 28), boxes, (12, 16))
    assert not pasted[[0, 1, 2, 4]].any() and paste_masks(torch.ones(0, 28, 28), boxes[:0], (12, 16)).shape == (
        0,
        12,
        16,
    )


def test_background_in_a_crowd_region_does_not_train():
    """Defect 7: there it trained as background."""
    region = torch.tensor([[0.0, 0, 30, 30]])
    candidates = torch.tensor([[2.0, 2, 12, 12], [25, 0, 35, 30], [28, 0, 38, 30], [2, 2, 8, 10]])
    objects = torch.tensor([[2.0, 2, 8, 10]])
    assigner = Assigner(0.5, 0.5)
    assert assigner(candidates, objects, region).tolist() == [IGNORED, IGNORED, 0, 1]
    assert replace(assigner, crowd=None)(candidates, objects, region).tolist() == [0, 0, 0, 1]
    network = build(SPECS["mask"])
    own, labels, crowd, masks = objects_with_crowd()
    images, size = torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]])
    random = RandomContext(0, 0, torch.arange(1))
    without = network(images, size, Targets([own], [labels], [crowd[:0]], [masks]), random=random).losses
    ignored = network(images, size, Targets([own], [labels], [crowd], [masks]), random=random).losses
    assert ignored.sums["loss_rpn_cls"].sum() != without.sums["loss_rpn_cls"].sum()


def objects_with_crowd() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return objects(1, crowds=3)


def test_a_detector_loads_without_compiled_extensions_or_their_successors():
    """Defects 2 and 10: there nothing imported without compiled mmcv and apex."""
    code = (
        "import sys, swin_moe.models.detection.detector as d; "
        "assert not {'mmcv', 'mmdet', 'apex', 'torchvision'} & set(sys.modules)"
    )
    environment = {**os.environ, "SWIN_MOE_NO_EXT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


def test_an_image_without_positive_anchors_counts_one_as_officially():
    losses = learn(build(SPECS["mask"]), 0).losses
    assert losses.counts["loss_rpn_cls"] == 1 + PROPOSALS.samples and losses.counts["loss_cls"] == MASK.samples
    assert losses.sums["loss_rpn_cls"].sum() > 0 and not losses.sums["loss_rpn_bbox"].any()


@pytest.mark.parametrize("name", ["mask", "cascade", "htc"])
def test_losses_and_boxes_are_in_single_precision_under_autocast(name):
    network = build(SPECS[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = learn(network, 2, 3).losses
        found = network.eval()(torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]]))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in losses.sums.values())
    assert found[0].boxes.dtype == found[0].scores.dtype == torch.float32
    torch.stack([value.sum() for value in losses.sums.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
