"""The task `detect`: how losses are divided, what is looked at, what becomes of crowds, and what is refused."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from swin_moe.config.io import load_config
from swin_moe.data.batch import Batch
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.spec import CASCADE, BoxHeadSpec, DetectorSpec, Selection
from swin_moe.tasks.base import StepContext
from swin_moe.tasks.detect import Detect, fitted, groups_of
from swin_moe.tasks.detectors import spec_of
from tests.tasks.cases import DETECT, HYBRID, NETWORK

PATCH = "_patch4_window7_mstrain_480-800"


def configured(*options: str) -> Any:
    return load_config("canvas_mask_rcnn", [*NETWORK, *DETECT, *options])


def made(*options: str) -> tuple[Detect, Detector]:
    task = Detect(configured(*options))
    network = task.build_network()
    network.init_weights(0)
    assert isinstance(network, Detector)
    return task, network.double()


def batch_of(images: int, first: int = 0, *, size: tuple[int, int] = (20, 24), crowd: bool = False) -> Batch:
    """Returns images first, first + 1, ... with as many objects as their number says, two at most."""
    height, width = size
    fields: dict[str, list[Tensor]] = {key: [] for key in ("boxes", "labels", "crowd", "masks")}
    pixels = []
    for number in range(first, first + images):
        generator = torch.Generator().manual_seed(number)
        pixels.append(torch.randn(3, height, width, generator=generator, dtype=torch.float64))
        count = number % 3
        low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 8
        boxes = torch.cat([low, low + 9], dim=1)
        masks = torch.zeros(count, height, width, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = True
        values = (boxes, torch.arange(count), torch.full((count,), crowd), masks)
        for key, value in zip(fields, values):
            fields[key].append(value)
    sizes = torch.tensor([size] * images, dtype=torch.int64).view(-1, 2)
    sample = torch.arange(first, first + images)
    image = torch.stack(pixels) if pixels else torch.zeros(0, 3, *size, dtype=torch.float64)
    plain = {"image": image, "target": torch.zeros(images, dtype=torch.int64), "sample": sample, "epoch": 0, "step": 0}
    return {**plain, "size": sizes, "original_size": sizes, "image_id": sample, **fields}  # type: ignore[typeddict-item]


def context_of(task: Detect, images: int) -> StepContext:
    return StepContext(task.config, 3, 1, images, nullcontext)


def test_losses_are_means_over_what_the_step_counts():
    """Defect 9: of a step in two halves, each divided by the counts of both, the sum is the whole."""
    task, network = made()
    whole = task.loss(network, batch_of(6), context_of(task, 6)).total
    halves = [batch_of(2), batch_of(4, 2)]
    context = context_of(task, 6)
    counts: dict[str, float] = {}
    own = task._everywhere

    def note(found: dict[str, float], *_: Any) -> dict[str, float]:
        for name, count in found.items():
            counts[name] = counts.get(name, 0.0) + count
        return found

    task._everywhere = note  # type: ignore[method-assign]
    apart = [task.loss(network, half, context).total for half in halves]
    task._everywhere = lambda *_: counts  # type: ignore[method-assign]
    shared = [task.loss(network, half, context).total for half in halves]
    task._everywhere = own  # type: ignore[method-assign]
    torch.testing.assert_close(sum(shared), whole, rtol=1e-12, atol=0)
    assert abs(float(sum(apart) - whole)) > 0.1


def test_official_losses_are_divided_by_what_a_rank_counts():
    task, network = made("compat.official=true")
    halves = [batch_of(3), batch_of(3, 3)]
    context = context_of(task, 6)
    together = sum(task.loss(network, half, context).total for half in halves)
    alone = [task.loss(network, half, context_of(task, 3)).total for half in halves]
    torch.testing.assert_close(together, sum(alone) / 2)
    assert spec_of(task.config).proposals.assigner.crowd is None


def test_crowd_regions_are_no_objects():
    task, _ = made()
    targets = task.targets_of(batch_of(3, crowd=True))
    assert [len(x) for x in targets.boxes] == [0, 0, 0] and [len(x) for x in targets.crowd] == [0, 1, 2]
    assert targets.masks is not None and [len(x) for x in targets.masks] == [0, 0, 0]


def test_images_are_looked_at_as_if_each_were_alone():
    task, network = made("task.detect.score=0.001", *HYBRID)
    network.eval()
    small, large = batch_of(2, size=(13, 18)), batch_of(2, 2, size=(20, 24))
    image = torch.cat([fitted(small["image"], 20, 24), large["image"]])
    size = torch.cat([small["size"], large["size"]])
    original = size * 2
    batch: Any = {**large, "image": image, "size": size, "original_size": original}
    found = task.look(network, batch, context_of(task, 4))
    for row in range(4):
        one: Any = {key: batch[key][row : row + 1] for key in ("image", "size", "original_size")}
        one["image"] = one["image"][:, :, : size[row, 0], : size[row, 1]]
        (alone,) = task.look(network, one, context_of(task, 1))
        torch.testing.assert_close(found[row].boxes, alone.boxes)
        assert len(alone.boxes) and alone.masks.shape[1:] == tuple(original[row])  # type: ignore[arg-type, union-attr]
        assert torch.equal(found[row].masks, alone.masks)  # type: ignore[arg-type]
        assert alone.boxes[:, 3].max() <= original[row, 0]  # type: ignore[index]
    assert list(groups_of(size, 4)) == [([0, 1], (16, 20)), ([2, 3], (20, 24))]


def test_views_are_taken_image_by_image():
    views = ("task.detect.scales=[0.75,1.0]", "task.detect.flip=true", "task.detect.score=0.001")
    (task, network), (_, plain) = made(*views), made("task.detect.score=0.001")
    batch = batch_of(3)
    found = task.look(network.eval(), batch, context_of(task, 3))
    once = task.look(plain.eval(), batch, context_of(task, 3))
    for row in range(3):
        (alone,) = network(batch["image"][row : row + 1], batch["size"][row : row + 1])
        torch.testing.assert_close(found[row].boxes, alone.boxes)
        assert len(alone.boxes) and found[row].scores.tolist() != once[row].scores.tolist()  # type: ignore[union-attr]


def test_recipes_describe_the_official_networks():
    tiny = load_config(f"mask_rcnn_swin_tiny{PATCH}_adamw_1x_coco")
    official = replace(tiny, compat=replace(tiny.compat, official=True))
    spec = spec_of(official)
    assert spec == _without_crowds(DetectorSpec(80))
    cascade = load_config(f"cascade_mask_rcnn_swin_tiny{PATCH}_giou_4conv1f_adamw_3x_coco")
    spec = spec_of(replace(cascade, compat=official.compat))
    heads = BoxHeadSpec(convs=4, fcs=1, norm=True, loss="giou", loss_weight=10.0)
    wanted = _without_crowds(DetectorSpec(80, stages=CASCADE, cascade=True, box_head=heads))
    proposals = replace(wanted.proposals, border=0.0, loss="smooth_l1", training=Selection(2000, 2000))
    assert spec == replace(wanted, proposals=proposals)


def _without_crowds(spec: DetectorSpec) -> DetectorSpec:
    proposals = replace(spec.proposals, assigner=replace(spec.proposals.assigner, crowd=None), beta=0.111111111111111)
    stages = tuple(replace(stage, assigner=replace(stage.assigner, crowd=None)) for stage in spec.stages)
    return replace(spec, proposals=proposals, stages=stages)


@pytest.mark.parametrize(
    "options, words",
    [
        (("task.detect.stage_overlaps=[0.5,0.6]",), "task.detect.stage_stds"),
        (("task.detect.stage_stds=[[0.1,0.1]]",), "task.detect.stage_stds"),
        (("task.detect.masks=false", "task.detect.mask_flow=true"), "task.detect.mask_flow"),
        (("task.detect.frozen_stages=9",), "task.detect.frozen_stages"),
        (("task.detect.scales=[]",), "task.detect.scales"),
        (("model.num_classes=0",), "model.num_classes"),
        (("data.micro_batch=2",), "data.micro_batch"),
        (("data.micro_batch=2", "compat.official=true", "task.detect.box_norm=true"), "data.micro_batch"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_option(options, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        configured("data.global_batch=4", *options).check(1)


def test_official_losses_may_be_accumulated():
    configured("data.global_batch=4", "data.micro_batch=2", "compat.official=true").check(1)
