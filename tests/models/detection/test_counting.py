"""Names, parameters and operations of the networks of the published tables; nothing is computed."""

import json
from dataclasses import replace

import pytest
import torch

from swin_moe.config import ModelConfig
from swin_moe.models.dense import PyramidBackbone
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.spec import CASCADE, BoxHeadSpec, DetectorSpec, SemanticSpec
from tests.models.dense.golden import FOLDER

GOLDEN = json.loads((FOLDER / "detectors.json").read_text())
WIDTHS = {"tiny": (96, 6, 3), "small": (96, 18, 3), "base": (128, 18, 4), "large": (192, 18, 6)}
FOUR = BoxHeadSpec(convs=4, fcs=1, norm=True, loss="giou", loss_weight=10.0)
MASK = DetectorSpec(80)
CASCADED = DetectorSpec(80, stages=CASCADE, cascade=True, box_head=FOUR)
BASE = DetectorSpec(80, stages=CASCADE, cascade=True, box_head=BoxHeadSpec(agnostic=True, loss="smooth_l1"))
HTC = replace(BASE, interleaved=True, mask_flow=True)
PLUS = replace(HTC, box_head=replace(FOUR, agnostic=True), semantic=SemanticSpec(), global_attention=True)


def network(width: str, spec: DetectorSpec, window: int = 7) -> Detector:
    """Returns a network without memory."""
    dim, depth, heads = WIDTHS[width]
    numbers = tuple(heads * 2**i for i in range(4))
    config = ModelConfig(name="swin", window_size=window, embed_dim=dim, depths=(2, 2, depth, 2), num_heads=numbers)
    with torch.device("meta"):
        return Detector(PyramidBackbone(config), spec)


def row(name: str) -> tuple[str, DetectorSpec, int]:
    """Returns the network of a row of the table: width, what it is, window."""
    if name.startswith("htc"):
        _, width, window, semantic = name.split("_")
        spec = replace(HTC, semantic=SemanticSpec() if "True" in semantic else None)
        return {"B": "base", "L": "large"}[width], spec, int(window[1:])
    width = next(key for key in WIDTHS if f"swin_{key}" in name)
    return width, CASCADED if name.startswith("cascade") else MASK, 7


def params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", GOLDEN["counts"])
def test_parameters_and_operations_of_the_table(name):
    wanted = GOLDEN["counts"][name]
    width, spec, window = row(name)
    detector = network(width, spec, window)
    parts = {key: params(child) for key, child in detector.named_children()}
    assert parts | {"total": params(detector)} == wanted["params"]
    for size in ((800, 1280), (1280, 800)):
        assert detector.counted(size) == (wanted["counter"], wanted["attention"])


@pytest.mark.parametrize("width, number, giga", [("base", 159_535_213, 1043.2), ("large", 283_769_417, 1470.4)])
def test_htc_plus_as_rebuilt_has_the_published_size(width, number, giga):
    detector = network(width, PLUS)
    assert params(detector) == number
    assert sum(detector.counted((800, 1280))) / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize("name, spec", [("mask_rcnn", MASK), ("cascade_mask_rcnn", CASCADED)])
def test_names_are_those_of_released_files(name, spec):
    beside = {n: list(p.shape) for n, p in network("tiny", spec).named_parameters() if n in GOLDEN["keys"][name]}
    assert beside == GOLDEN["keys"][name]
    detector = network("tiny", spec)
    assert len([n for n in detector.head_parameters() if not n.startswith("neck.")]) == len(GOLDEN["keys"][name])


def test_names_of_htc():
    spec = replace(HTC, semantic=SemanticSpec())
    own = {n: list(p.shape) for n, p in network("tiny", spec).named_parameters()}
    assert {n: shape for n, shape in own.items() if n.startswith(("rpn", "roi"))} == GOLDEN["keys"]["htc"]


def test_boxes_only_where_no_masks_are_wanted():
    boxes = network("tiny", DetectorSpec(80, mask_head=None))
    convolutions, doubling, logits = 4 * (256 * 256 * 9 + 256), 256 * 256 * 4 + 256, 256 * 80 + 80
    assert params(network("tiny", MASK)) - params(boxes) == convolutions + doubling + logits
