"""Mask R-CNN, Cascade Mask R-CNN and HTC against the outputs of the official code, stage by stage."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from swin_moe.config import ModelConfig
from swin_moe.models.dense import PyramidBackbone
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.heads import roi_head
from swin_moe.models.detection.heads.mask_head import paste_masks
from swin_moe.models.detection.spec import DetectorSpec
from swin_moe.models.detection.targets import LossSums
from swin_moe.randomness import RandomContext
from tests.models.dense.golden import error, fill, image, load
from tests.models.detection.official import build, scene, targets_of, unpacked

NETWORKS = ("mask_rcnn_micro", "cascade_giou_micro", "htc_micro")
OUTPUT, LOSS = 1e-5, 1e-5
GRADIENT = 1e-4
# In float32 the order of a sum decides on which side of zero a unit before ReLU lies that is nearer to it than rounding
# is: of HTC's third box head one of 104,664 (-8e-9 in float64, where float32 is 9e-7 off) moves the norms by 7e-4.
# In float64, where there is none, they are held to GRADIENT. Batch norm over few boxes multiplies rounding in training:
# there the exact norms are 9.3e-4 from the golden's, which are of float32, and ours of float32 6.4e-4.
ROUNDED = {"mask_rcnn_micro": 1e-4, "cascade_giou_micro": 1e-3, "htc_micro": 1e-3}


@cache
def opened(name: str) -> tuple[dict[str, Any], Detector, Tensor, Tensor, list[Tensor]]:
    """Returns golden, network, images, their sizes, and the maps of all levels."""
    golden = load(name)
    network, images = build(golden), scene(golden)
    with torch.no_grad():
        maps, _ = network.maps(images, None)
    return golden, network, images, torch.tensor(golden["img_shapes"]), maps


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_the_official_ones(name):
    golden, network, *_ = opened(name)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == golden["params"]


@pytest.mark.parametrize("name", ["mask_rcnn_micro", "cascade_giou_micro"])
def test_maps_and_proposals_are_the_official_ones(name):
    golden, network, _, size, maps = opened(name)
    assert [error(a, b) for a, b in zip(golden["fpn"], maps, strict=True)] == pytest.approx([0] * 5, abs=OUTPUT)
    with torch.no_grad():
        logits, codes = network.rpn_head(maps)
        scored = network.rpn_head.scored(maps)
    for reference, got in ((golden["rpn_cls"], logits), (golden["rpn_reg"], codes)):
        assert [error(a, b) for a, b in zip(reference, got, strict=True)] == pytest.approx([0] * 5, abs=OUTPUT)
    spec = network.spec.proposals
    for what, select in (("train", spec.training), ("test", spec.testing)):
        found = network.rpn_head.proposals(scored, size, select)
        assert [len(boxes) for boxes, _ in found] == golden[f"proposals_{what}_count"]
        for (boxes, scores), reference in zip(found, golden[f"proposals_{what}"]):
            best = torch.cat([boxes, scores[:, None]], dim=1)[: len(reference)]
            torch.testing.assert_close(best, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_see_what_the_official_ones_see(name):
    golden, network, _, _, maps = opened(name)
    roi = network.roi_head
    with torch.no_grad():
        features, _ = roi._features(maps, None)
        x = roi.box_features(features, golden["rois"])
        masks = roi.mask_logits(features, golden["rois"])
        if roi.spec.semantic is not None:
            logits, semantic = roi.semantic_head(maps)
            assert error(golden["semantic_pred"], logits) < OUTPUT and error(golden["semantic_feat"], semantic) < OUTPUT
        for number, head in enumerate(roi.box_heads):
            stage = f"_s{number}" if roi.spec.cascade else ""
            scores, codes = head(x)
            assert error(golden["cls_score" + stage], scores) < OUTPUT
            assert error(golden["bbox_pred" + stage], codes) < OUTPUT
            if "mask_pred" + stage in golden:
                assert error(golden["mask_pred" + stage], masks[number]) < OUTPUT
    if "roi_feats_7" in golden:
        assert error(golden["roi_feats_7"], x) < OUTPUT


@pytest.mark.parametrize("name", NETWORKS)
def test_detections_are_the_official_ones(name):
    golden, network, images, size, _ = opened(name)
    for number, reference in enumerate(golden["detections"]):
        one = slice(number, number + 1)
        original = torch.tensor(golden["ori_shapes"][one]) if "ori_shapes" in golden else size[one]
        (found,) = network(images[one], size[one], original=original)
        torch.testing.assert_close(found.boxes, reference["boxes"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.scores, reference["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(found.labels, reference["labels"])
        height, width = original[0].tolist()
        masks = paste_masks(found.masks, found.boxes, (height, width))
        assert (masks.sum(dim=(1, 2)) - reference["mask_area"]).abs().max() <= 2
        if "masks_packed_top" in reference:
            best = unpacked(reference["masks_packed_top"], 12, height, width)
            assert (masks[:12] != best).sum(dim=(1, 2)).max() <= 2


def learn_anchors(network: Detector, golden: dict[str, Any], images: Tensor, size: Tensor) -> LossSums:
    """Returns the losses of the proposal network."""
    random = RandomContext(0, 0, torch.arange(len(images)))
    maps, _ = network.maps(images, random)
    return network.rpn_head.losses(network.rpn_head.scored(maps), targets_of(golden), size, 32, random)


def learn_boxes(network: Detector, golden: dict[str, Any], images: Tensor, size: Tensor) -> LossSums:
    """Returns the losses of the golden's proposals, in the images' precision."""
    targets, random = targets_of(golden), RandomContext(0, 0, torch.arange(len(images)))
    targets = targets._replace(boxes=[boxes.to(images) for boxes in targets.boxes])
    maps, _ = network.maps(images, random)
    return network.roi_head.losses(maps, [p.to(images) for p in golden["fixed_proposals"]], targets, size, random)


def learn(network: Detector, golden: dict[str, Any], images: Tensor, size: Tensor) -> LossSums:
    """Returns all losses of the golden's proposals."""
    return learn_anchors(network, golden, images, size) | learn_boxes(network, golden, images, size)


def backward(losses: LossSums) -> dict[str, Tensor]:
    """Returns the means of losses, after gradients of their sum."""
    means = {key: value / max(losses.counts[key], 1) for key, value in losses.sums.items()}
    torch.stack([value.sum() for value in means.values()]).sum().backward()
    return means


def check_norms(golden: dict[str, Any], mode: str, gradients: dict[str, Tensor], allowed: float) -> None:
    """Compares the norms of gradients; those below 1e-8 of the largest are rounding."""
    norms = golden[f"grad_norms_{mode}"]
    for key, norm in norms.items():
        got = float(gradients[key].norm())  # all parameters take part, in any batch
        assert got == pytest.approx(norm, rel=allowed, abs=1e-8 * max(norms.values())), key


def gradients_of(network: Detector) -> dict[str, Tensor]:
    """Returns the gradients by the parameters' names."""
    return {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name, mode", [*((name, "eval") for name in NETWORKS), ("cascade_giou_micro", "train")])
def test_losses_and_gradients_are_the_official_ones(name, mode):
    golden, network, images, size, _ = opened(name)
    network.train(mode == "train").zero_grad()
    means = backward(learn(network, golden, images, size))
    reference = {key: value for key, value in golden[f"losses_{mode}"].items() if key.partition("loss_")[1]}
    assert means.keys() == reference.keys()
    for key, value in reference.items():
        torch.testing.assert_close(means[key].detach(), torch.tensor(value), rtol=LOSS, atol=LOSS)
    network.eval()
    check_norms(golden, mode, gradients_of(network), ROUNDED[name])


@pytest.mark.parametrize("name", ["cascade_giou_micro", "htc_micro"])
def test_gradients_of_several_stages_are_the_official_ones_without_rounding(name):
    golden, network, images, size, _ = opened(name)
    precise = copy.deepcopy(network).double()
    network.zero_grad()
    # Anchors stay in float32: those that are as good as an object's best one are told by equal overlaps.
    backward(learn_anchors(network, golden, images, size))
    backward(learn_boxes(precise, golden, images.double(), size))
    total = gradients_of(precise)
    for key, gradient in gradients_of(network).items():
        total[key] = total[key] + gradient if key in total else gradient
    check_norms(golden, "eval", total, GRADIENT)


def test_statistics_of_batch_norm_in_heads_are_the_official_ones():
    golden, network, images, size, _ = opened("cascade_giou_micro")
    network.train()
    learn(network, golden, images, size)
    network.eval()
    for number, conv in enumerate(network.roi_head.box_heads[0].shared_convs):
        for kind, seen in zip(("running_mean", "running_var"), conv.bn.moved()):
            name = f"roi_head.bbox_head.0.shared_convs.{number}.bn.{kind}"
            before = network.get_parameter(name)
            after = before.detach().lerp(seen.float(), 0.1)
            torch.testing.assert_close(after, golden["running_after"][name], rtol=1e-4, atol=1e-6)


def test_the_network_of_full_size_gives_the_official_outputs():
    golden = load("mask_rcnn_swin_tiny_full")
    config = ModelConfig(name="swin", img_size=(224, 224), drop_path_rate=0.0)
    network = Detector(PyramidBackbone(config), DetectorSpec(80)).eval()
    state = {name: fill(name, tuple(p.shape)) for name, p in network.named_parameters()}
    network.load_state_dict(state)
    assert sum(p.numel() for p in network.parameters()) == golden["params"]
    images, (height, width) = image((1, 3, *golden["pad"]), golden["name"]), golden["img_shape"]
    images[:, :, height:] = 0
    images[:, :, :, width:] = 0
    with torch.no_grad():
        maps, _ = network.maps(images, None)
        logits, codes = network.rpn_head(maps)
        features, _ = network.roi_head._features(maps, None)
        scores, boxes = network.roi_head.box_heads[0](network.roi_head.box_features(features, golden["rois"]))
        (masks,) = network.roi_head.mask_logits(features, golden["rois"])
    for reference, got in ((golden["fpn"], maps), (golden["rpn_cls"], logits), (golden["rpn_reg"], codes)):
        assert [error(a, b) for a, b in zip(reference, got, strict=True)] == pytest.approx([0] * 5, abs=OUTPUT)
    for key, got in (("cls_score", scores), ("bbox_pred", boxes), ("mask_pred", masks)):
        assert error(golden[key], got) < OUTPUT


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_a_few_at_a_time_are_those_of_all_at_once(name, monkeypatch):
    _, network, _, _, maps = opened(name)
    head = network.roi_head
    corners = torch.rand(23, 2, generator=torch.Generator().manual_seed(1)) * 40
    rois = torch.cat([torch.arange(23)[:, None] % len(maps[0]), corners, corners + 17], dim=1)
    calls = []
    hook = head.mask_heads[0].convs[0].register_forward_hook(lambda *given: calls.append(len(given[1][0])))
    with torch.no_grad():
        features = head.features(maps)
        monkeypatch.setattr(roi_head, "_BYTES_AT_A_TIME", 1 << 30)
        expected, whole = head.mask_logits(features, rois), list(calls)
        monkeypatch.setattr(roi_head, "_BYTES_AT_A_TIME", 1)
        calls.clear()
        for found, wanted in zip(head.mask_logits(features, rois), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert [wanted.shape for wanted in head.mask_logits(features, rois[:0])] == [w[:0].shape for w in expected]
    hook.remove()
    assert whole == [23] and calls[:6] == [4, 4, 4, 4, 4, 3]
