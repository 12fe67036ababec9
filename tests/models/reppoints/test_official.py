"""RepPoints V2 with masks against outputs of the official code: losses, gradients, detections and masks."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swin_moe.models.detection.spec import DetectionSpec
from swin_moe.models.detection.targets import Targets
from swin_moe.models.reppoints.bifpn import BiFPN
from swin_moe.models.reppoints.head import PointHead, Said
from swin_moe.models.reppoints.network import RepPoints
from swin_moe.models.reppoints.spec import PointMaskSpec, PointSpec
from swin_moe.randomness import RandomContext
from tests.models.dense.golden import fill, image, load

GOLDEN = load("mask_reppoints_micro")
WIDTHS, SIDES = (16, 32, 48), (128, 192)
SPEC = PointSpec(
    5,
    channels=32,
    corner_channels=32,
    convs=2,
    nearest=1,
    ignores_crowd=False,
    per_level=60,
    detections=DetectionSpec(suppression=0.6, per_image=20),
    masks=PointMaskSpec(convs=2, channels=24),
)


class Heads(RepPoints):
    """RepPoints V2 without its backbone: its maps are given."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.spec = SPEC
        self.neck = BiFPN(WIDTHS, SPEC.channels, levels=5, repeats=2, groups=32)
        self.bbox_head = PointHead(SPEC)

    def said(self) -> Said:
        sizes = [tuple(side // s for side in SIDES) for s in (8, 16, 32)]
        maps = [image((2, width, *size), f"map{i}") for i, (width, size) in enumerate(zip(WIDTHS, sizes))]
        return self.bbox_head(self.neck([x.double() for x in maps]))


@cache
def heads() -> Heads:
    """Returns the golden's network in float64."""
    network = Heads().double()
    changed: dict[str, Tensor] = GOLDEN["changed"]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = changed.get(name, fill(name, tuple(parameter.shape)))
            scale = GOLDEN["controller_scale"] if name == "bbox_head.controller.weight" else 1
            parameter.copy_(value.double() * scale)
    return network


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.numpy())[:count].reshape(shape).astype(bool))


def targets() -> Targets:
    boxes = [b.double() for b in GOLDEN["boxes"]]
    masks = [unpacked(m, (len(b), *SIDES)) for m, b in zip(GOLDEN["masks"], boxes)]
    return Targets(boxes, list(GOLDEN["labels"]), [b[:0] for b in boxes], masks)


@cache
def learned() -> tuple[dict[str, float], dict[str, Tensor]]:
    """Returns losses by their official names, and the gradients of their sum."""
    network = heads().train()
    losses = network.losses(network.said(), targets(), GOLDEN["sizes"], RandomContext.fresh(2, torch.device("cpu")))
    total: dict[str, Any] = {}
    for name, value in losses.sums.items():
        official = name if name in GOLDEN["losses"] else name.rpartition("_")[0]
        total[official] = total.get(official, 0) + value / max(losses.counts[name], 1)
    network.zero_grad()
    torch.stack(list(total.values())).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert losses.counts["loss_mask_2"] == GOLDEN["instances"] > 0
    return {name: float(value.detach()) for name, value in total.items()}, gradients


def test_names_are_the_official_ones():
    own = {name: list(p.shape) for name, p in heads().named_parameters()}
    beside = {"bbox_head.mask_head.head.sizes_of_interest"}
    beside |= {name for name in GOLDEN["keys"] if name.endswith("num_batches_tracked")}
    assert own == {name: list(shape) for name, shape in GOLDEN["keys"].items() if name not in beside}


def test_losses_are_the_official_ones():
    losses, _ = learned()
    expected = dict(GOLDEN["losses"])
    assert expected.pop("loss_mask_0") == 0  # its official weight is 0, and it is not computed
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, rel=1e-7), name


def test_gradients_are_the_official_ones():
    _, gradients = learned()
    assert gradients.keys() == GOLDEN["gradient_norms"].keys()
    for name, value in GOLDEN["gradient_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(value, rel=1e-4, abs=1e-9), name


def test_detections_and_masks_are_the_official_ones():
    network = heads().eval()
    with torch.no_grad():
        found = network.found(network.said(), GOLDEN["sizes"], GOLDEN["original"])
    for own, expected in zip(found, GOLDEN["detections"], strict=True):
        assert torch.equal(own.labels, expected["labels"])
        torch.testing.assert_close(own.boxes.float(), expected["boxes"])
        torch.testing.assert_close(own.scores.float(), expected["scores"])
        masks = unpacked(expected["masks"], tuple(expected["shape"]))
        assert own.drawn is not None and own.drawn.shape == masks.shape
        assert (own.drawn != masks).sum() <= 1 and 0 < masks.float().mean() < 1
