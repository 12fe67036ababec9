"""An image that is looked at several times."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swin_moe.models.detection.detections import Detections, select
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.spec import DetectionSpec
from swin_moe.models.detection.views import View, merged_proposals, views_of
from tests.models.detection.test_defects import SPECS, build

SIZE, ORIGINAL = torch.tensor([[52, 64]]), torch.tensor([[104, 96]])
SEEN = {"one": ((1.0,), False), "mirrored": ((1.0,), True), "three": ((0.5, 1.0, 1.25), True)}


def network(name: str, scales: tuple[float, ...], mirror: bool) -> Detector:
    found = DetectionSpec(score=0.02, per_image=30, scales=scales, mirror=mirror)
    return build(replace(SPECS[name], detections=found)).eval()


def picture() -> Tensor:
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    image[:, :, 52:] = 0
    return image


def slow(detector: Detector, views: list[View], original: Tensor) -> Detections:
    """Returns what detections are by the definition: by the stages' own functions, coordinate by coordinate."""
    spec, roi, total = detector.spec, detector.roi_head, []
    maps = [detector.maps(view.image, None, view.size)[0] for view in views]
    proposals = merged_proposals(detector.rpn_head, views, maps, original)

    def moved(boxes: Tensor, view: View, *, back: bool) -> Tensor:
        out = boxes.clone()
        (height, width), (old_height, old_width) = view.size[0].tolist(), original.tolist()
        for row in out.view(-1, 4):
            left, top, right, bottom = row.tolist()
            if back and view.mirrored:
                left, right = width - right, width - left
            across, down = width / old_width, height / old_height
            across, down = (1 / across, 1 / down) if back else (across, down)
            left, top, right, bottom = left * across, top * down, right * across, bottom * down
            if not back and view.mirrored:
                left, right = width - right, width - left
            row.copy_(torch.tensor([left, top, right, bottom]))
        return out

    for view, own in zip(views, maps):
        ((boxes, scores),) = roi.scored(roi.features(own), [moved(proposals, view, back=False)], view.size)
        total.append((moved(boxes.contiguous(), view, back=True), scores))
    boxes, scores = (torch.stack(column).sum(dim=0) / len(views) for column in zip(*total))
    found = select(boxes, scores, original, original, spec.detections)
    if not roi.mask_heads:
        return found
    masks = []
    for view, own in zip(views, maps):
        (drawn,) = roi.masks(roi.features(own), [moved(found.boxes, view, back=False)], [found.labels])
        masks.append(drawn[:, :, range(27, -1, -1)] if view.mirrored else drawn)
    return found._replace(masks=torch.stack(masks).mean(dim=0))


@pytest.mark.parametrize("name", ["mask", "boxes", "cascade", "htc"])
@pytest.mark.parametrize("what", ["mirrored", "three"])
def test_findings_are_means_over_views(name, what):
    scales, mirror = SEEN[what]
    detector = network(name, scales, mirror)
    views = views_of(picture(), SIZE, scales=scales, mirror=mirror, divisor=32)
    assert len(views) == len(scales) * (1 + mirror)
    with torch.no_grad():
        expected = slow(detector, views, ORIGINAL[0])
        (found,) = detector(picture(), SIZE, original=ORIGINAL)
    assert len(expected.boxes) > 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mask", "cascade"])
def test_a_mirrored_image_has_mirrored_findings(name):
    detector, image = network(name, (1.0, 0.75), True), picture()
    mirrored = image.flip(3)  # as wide as its padding
    (found,), (other,) = (detector(one, SIZE, original=ORIGINAL) for one in (image, mirrored))
    boxes = other.boxes.clone()
    boxes[:, 0], boxes[:, 2] = 96 - other.boxes[:, 2], 96 - other.boxes[:, 0]
    torch.testing.assert_close(found.scores, other.scores, rtol=1e-3, atol=1e-4)
    same = (found.boxes[:5] - boxes[:5]).abs().amax(dim=1) < 0.05  # the rest may change places where scores are equal
    assert same.sum() >= 3 and len(found.boxes) > 5
    assert found.masks is not None and other.masks is not None
    torch.testing.assert_close(found.masks[:5][same], other.masks[:5][same].flip(2), rtol=1e-2, atol=1e-2)


def test_views_are_the_image_alone_without_its_padding():
    image = torch.arange(12.0).view(1, 1, 3, 4).expand(1, 3, 3, 4)
    padded = torch.nn.functional.pad(image, (0, 5, 0, 1), value=9.0)
    whole, turned, half, _ = views_of(padded, torch.tensor([[3, 4]]), scales=(1.0, 0.5), mirror=True, divisor=4)
    assert whole.image.shape == turned.image.shape == half.image.shape == (1, 3, 4, 4)
    assert torch.equal(whole.image[:, :, :3], image) and not whole.image[:, :, 3:].any()
    assert torch.equal(turned.image[:, :, :3], image.flip(3))
    assert half.size.tolist() == [[2, 2]] and not half.image[:, :, 2:].any() and not half.image[:, :, :, 2:].any()


def test_a_rank_without_an_image_takes_part_in_every_view():
    detector, calls = network("mask", *SEEN["three"]), []
    detector.backbone.register_forward_hook(lambda *_: calls.append(1))
    assert detector(picture()[:0], SIZE[:0], original=ORIGINAL[:0]) == []
    assert len(calls) == 6
    detector(picture(), SIZE, original=ORIGINAL)
    assert len(calls) == 12
