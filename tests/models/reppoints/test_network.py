"""RepPoints V2: names, parameters and operations of the published network, and what a forward gives."""

import json
from dataclasses import replace

import pytest
import torch

from swin_moe.config import ModelConfig
from swin_moe.models.dense import PyramidBackbone
from swin_moe.models.detection.boxes import clip
from swin_moe.models.detection.targets import Targets
from swin_moe.models.reppoints.head import Said
from swin_moe.models.reppoints.network import RepPoints
from swin_moe.models.reppoints.spec import PointMaskSpec, PointSpec
from swin_moe.models.reppoints.verify import verified
from tests.models.dense.golden import FOLDER

KEYS = json.loads((FOLDER / "detectors.json").read_text())["keys"]["reppoints_v2"]
SMALL = PointSpec(3, channels=8, groups=2, corner_channels=4, neck_repeats=2, convs=1, size_divisor=16)


def published(masks: PointMaskSpec | None = None) -> RepPoints:
    config = ModelConfig(name="swin", window_size=7, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    with torch.device("meta"):
        return RepPoints(PyramidBackbone(config, out_indices=(1, 2, 3)), PointSpec(80, masks=masks))


def small(spec: PointSpec = SMALL) -> RepPoints:
    config = ModelConfig(
        name="swin",
        window_size=4,
        embed_dim=8,
        depths=(1, 1, 1),
        num_heads=(1, 2, 4),
        img_size=(32, 32),
        drop_path_rate=0,
    )
    network = RepPoints(PyramidBackbone(config, out_indices=(1, 2)), spec)
    network.init_weights(0)
    return network.double()


def test_names_parameters_and_operations_are_the_published_ones():
    network = published()
    own = {name: list(p.shape) for name, p in network.named_parameters() if not name.startswith("backbone.")}
    assert own == KEYS
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 44_916_202
    for size in ((800, 1280), (1280, 800)):
        assert sum(network.counted(size)) / 1e9 == pytest.approx(282.46, abs=0.005)  # the table's 283 rounds another


def test_masks_add_the_published_parameters_and_operations():
    """The official counter runs what says the masks, and not what draws them."""
    network = published(PointMaskSpec())
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 46_829_231
    assert sum(network.counted((800, 1280))) / 1e9 == pytest.approx(291.76, abs=0.005)


def test_logits_begin_rare_and_shares_equal():
    network = small()
    for layer in (network.bbox_head.reppoints_cls_out, network.bbox_head.reppoints_hem_tl_score_out):
        torch.testing.assert_close(layer.bias.sigmoid(), torch.full_like(layer.bias, 0.01))
    assert not network.bbox_head.reppoints_pts_init_out.bias.any()
    assert all((one.weights == 1).all() for one in network.neck.bi_fpn[0].out_combine)
    weight = network.bbox_head.reppoints_cls_conv.weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.1)


def scene(images: int) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Returns images, sizes and objects: two in the first, which is the smaller one, none in the second."""
    size = torch.tensor([[27, 30], [48, 60]])[:images]
    none = torch.zeros(0, 4).double()
    boxes = [torch.tensor([[2.0, 3.0, 20.0, 25.0], [10.0, 2.0, 28.0, 16.0]]).double(), none][:images]
    labels = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.int64)][:images]
    image = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1)).double()[:images]
    image[0, :, 27:], image[0, :, :, 30:] = 0, 0
    masks = [torch.zeros(2, 48, 64).bool(), torch.zeros(0, 48, 64).bool()][:images]
    masks[0][0, 3:25, 2:18], masks[0][1, 4:16, 12:28] = True, True
    return image, size, Targets(boxes, labels, [none] * images, masks)


def moved(network: RepPoints) -> RepPoints:
    """Returns a network whose weights are no longer near their start, so that its points lie apart."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.bbox_head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("masks", [None, PointMaskSpec(convs=1, channels=4)])
def test_every_parameter_learns(masks):
    network = moved(small(replace(SMALL, masks=masks))).train()
    image, size, targets = scene(2)
    losses = network(image, size, targets).losses
    total = torch.stack([value / max(losses.counts[name], 1) for name, value in losses.sums.items()]).sum()
    total.backward()
    assert total > 0 and all(value > 0 for value in losses.sums.values())
    assert not [
        name for name, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]


def test_what_an_image_learns_does_not_depend_on_the_batch():
    """What a batch adds to an image is nobody's background."""
    network = moved(small())
    found = []
    for images in (1, 2):
        image, size, targets = scene(images)
        said = network.bbox_head(network.neck(network.backbone(image).maps))
        found.append(network.wanted(said, said.boxes(said.first), targets, size))
    alone, together = found
    assert 0 < together.usable[0].sum() < together.usable[1].sum()
    for field in ("usable", "bump", "step", "inside", "first", "first_box"):
        assert torch.equal(getattr(alone, field), getattr(together, field)[:1]), field


def test_background_in_a_crowd_region_trains_nothing_unless_asked():
    image, size, targets = scene(1)
    crowd = targets._replace(crowd=[torch.tensor([[0.0, 0.0, 32.0, 16.0]]).double()])
    usable = []
    for ignores, given in ((True, targets), (True, crowd), (False, crowd)):
        network = moved(small(replace(SMALL, ignores_crowd=ignores)))
        said = network.bbox_head(network.neck(network.backbone(image).maps))
        usable.append(network.wanted(said, said.boxes(said.first), given, size))
    plain, ignored, official = usable
    assert torch.equal(plain.usable, official.usable) and ignored.usable.sum() < plain.usable.sum()
    taken = (ignored.refined > 0) | (ignored.first > 0) | (ignored.bump == 1).any(dim=2)
    assert (ignored.usable | ~taken)[plain.usable].all()


@pytest.mark.parametrize("masks", [None, PointMaskSpec(convs=1, channels=4)])
def test_a_rank_without_images_gives_zeros_to_every_parameter(masks):
    network = small(replace(SMALL, masks=masks)).train()
    image, size = torch.zeros(0, 3, 32, 32).double(), torch.zeros(0, 2, dtype=torch.int64)
    losses = network(image, size, Targets([], [], [], [])).losses
    torch.stack(list(losses.sums.values())).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters() if p.requires_grad)
    assert not any(losses.counts.values())
    assert network.eval()(image, size) == []


def test_corners_move_to_the_most_probable_of_four_cells():
    """Against a loop over the cells around a corner."""
    generator = torch.Generator().manual_seed(0)
    sizes, strides = [(5, 6), (3, 3), (2, 2), (1, 1)], (8, 16, 32, 64)
    count = sum(h * w for h, w in sizes)

    def noise(width: int) -> torch.Tensor:
        return torch.randn(1, count, width, generator=generator).double()

    level = torch.cat([torch.full((h * w,), i) for i, (h, w) in enumerate(sizes)])
    cells = torch.cat(
        [torch.tensor([[x * s, y * s] for y in range(h) for x in range(w)]) for (h, w), s in zip(sizes, strides)]
    ).double()
    stride = torch.tensor(strides, dtype=torch.float64)[level]
    said = Said(noise(2), noise(18), noise(18), noise(2), noise(4), noise(2), cells, level, stride, sizes)
    rows = torch.arange(count)
    boxes = clip(torch.rand(count, 4, generator=generator).double() * 60 - 5, torch.tensor([40, 48]))
    moved = verified(said, 0, rows, boxes)
    for row in range(count):
        finer = (None, 0, 0, 1)[int(level[row])]
        if finer is None:
            assert torch.equal(moved[row], boxes[row])
            continue
        (height, width), step = sizes[finer], strides[finer]
        start = sum(h * w for h, w in sizes[:finer])
        for side in (0, 1):
            x, y = (boxes[row, 2 * side : 2 * side + 2] / step).floor().int().tolist()
            x, y = min(x, width - 2), min(y, height - 2)
            around = [start + (y + i) * width + x + j for i in (0, 1) for j in (0, 1)]
            best = max(around, key=lambda cell: float(said.corners[0, cell, side]))
            wanted = cells[best] + said.steps[0, best, 2 * side : 2 * side + 2] * step
            torch.testing.assert_close(moved[row, 2 * side : 2 * side + 2], wanted)
