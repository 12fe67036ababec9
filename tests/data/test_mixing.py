"""Mixing equals a slow mix of the whole global batch, however that is cut, and timm's arithmetic."""

import numpy as np
import pytest
import torch

from swin_moe.config import DataConfig, TaskConfig
from swin_moe.data.loader import TrainLoader
from swin_moe.data.mixing import Mix, draw_mix, mix, mixing_enabled, partners, soft_targets
from swin_moe.data.torchvision_compat import import_torchvision

CASES = {
    "official": TaskConfig(),
    "mixup": TaskConfig(cutmix=0.0),
    "cutmix": TaskConfig(mixup=0.0, label_smoothing=0.0),
    "sometimes": TaskConfig(mix_prob=0.5),
}
CONFIG = {"auto_augment": "", "erase_prob": 0.0, "color_jitter": 0.0}


def slow_mix(images, targets, config, *, num_classes, seed, step):
    """One image at a time, with plain loops over pairs, on the whole global batch."""
    drawn = draw_mix(config, seed=seed, step=step, size=images.shape[-2:])
    labels = soft_targets(targets, num_classes=num_classes, smoothing=config.label_smoothing)
    mixed, soft = images.clone(), labels.clone()
    for g in range(len(images)):
        other = g + 1 if g % 2 == 0 else g - 1
        other = g if other >= len(images) else other
        soft[g] = labels[g] * drawn.weight + labels[other] * (1 - drawn.weight)
        if drawn.box is None:
            mixed[g] = images[g] * drawn.weight + images[other] * (1 - drawn.weight)
        else:
            top, bottom, left, right = drawn.box
            mixed[g, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    return mixed, soft


def collect(world, micro_batch, accumulation, *, config, step, drop_last=True):
    """Returns {global sample: (mixed image, soft target)} of a step, over all ranks."""
    result = {}
    data = DataConfig(**CONFIG, global_batch=world * micro_batch * accumulation, drop_last=drop_last)
    for rank in range(world):
        loader = TrainLoader(
            data,
            12,
            seed=4,
            rank=rank,
            world_size=world,
            micro_batch=micro_batch,
            accumulation=accumulation,
            partners=True,
        )
        for batch in next(loader.batches(step)):
            images, targets = partners(batch)
            mixed, soft = mix(
                batch["image"],
                batch["target"],
                num_classes=10,
                config=config,
                seed=4,
                step=step,
                partner_images=images,
                partner_targets=targets,
            )
            result |= {int(g): pair for g, *pair in zip(batch["sample"], mixed, soft)}
    return result


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", [(1, 24, 1), (2, 12, 1), (4, 3, 2), (4, 1, 6), (2, 3, 4)], ids=str)
def test_equals_the_global_batch(case, cut):
    steps = (0, 3, 4)  # cover mixup, cutmix and, with mix_prob 0.5, no mixing
    for step in steps:
        whole = next(
            TrainLoader(
                DataConfig(**CONFIG, global_batch=24), 12, seed=4, rank=0, world_size=1, micro_batch=24, accumulation=1
            ).batches(step)
        ).batches[0]
        expected = slow_mix(whole["image"], whole["target"], CASES[case], num_classes=10, seed=4, step=step)
        result = collect(*cut, config=CASES[case], step=step)
        assert sorted(result) == list(range(24))
        for g, (image, soft) in result.items():
            torch.testing.assert_close(image, expected[0][g], rtol=0, atol=0)
            torch.testing.assert_close(soft, expected[1][g], rtol=0, atol=0)


def test_cases_cover_every_kind():
    kinds = {name: {draw_kind(config, step) for step in (0, 3, 4)} for name, config in CASES.items()}
    assert kinds["official"] == {"mixup", "cutmix"} and "none" in kinds["sometimes"], kinds


def draw_kind(config, step):
    drawn = draw_mix(config, seed=4, step=step, size=(12, 12))
    return "none" if drawn.weight == 1 else "mixup" if drawn.box is None else "cutmix"


@pytest.mark.parametrize("cut", [(1, 100, 1), (4, 25, 1), (2, 5, 10)], ids=str)
def test_odd_last_batch(cut):
    config = CASES["official"]
    result = collect(*cut, config=config, step=14, drop_last=False)  # 1437 - 14 * 100 images
    assert sorted(result) == list(range(37))
    # Image 36 has no neighbour and is mixed with itself.
    assert result[36][1].max() == pytest.approx(1 - 0.1 + 0.01)
    reference = collect(1, 100, 1, config=config, step=14, drop_last=False)
    for g in range(37):
        torch.testing.assert_close(result[g][0], reference[g][0], rtol=0, atol=0)


@pytest.mark.parametrize("use_box", [False, True], ids=["mixup", "cutmix"])
def test_arithmetic_equals_timm(use_box, monkeypatch):
    import_torchvision()
    from timm.data import Mixup

    from swin_moe.data import mixing

    images, targets = torch.rand(6, 3, 10, 14), torch.tensor([0, 3, 1, 1, 2, 0])
    timm_mix = Mixup(mixup_alpha=0.0 if use_box else 0.8, cutmix_alpha=1.0 if use_box else 0.0, num_classes=4)
    np.random.seed(3)
    state = np.random.get_state()
    expected = timm_mix(images.clone(), targets)
    # Replay timm's draws, and give its partners: the batch reversed.
    np.random.set_state(state)
    np.random.rand()
    weight = np.random.beta(1.0, 1.0) if use_box else np.random.beta(0.8, 0.8)
    box = None
    if use_box:
        side = (1 - weight) ** 0.5
        centre = [(np.random.randint(0, n), int(n * side), n) for n in (10, 14)]
        box = (*mixing._interval(*centre[0]), *mixing._interval(*centre[1]))
        weight = 1 - (box[1] - box[0]) * (box[3] - box[2]) / 140
    monkeypatch.setattr(mixing, "draw_mix", lambda *_, **__: Mix(weight, box))
    result = mix(
        images,
        targets,
        num_classes=4,
        config=TaskConfig(),
        seed=0,
        step=0,
        partner_images=images.flip(0),
        partner_targets=targets.flip(0),
    )
    torch.testing.assert_close(result, expected)


def test_draws_have_the_right_distribution():
    config = TaskConfig(mix_prob=0.75, mix_switch_prob=0.25)
    drawn = [draw_mix(config, seed=0, step=step, size=(64, 64)) for step in range(4000)]
    boxes = [d for d in drawn if d.box is not None]
    plain = [d.weight for d in drawn if d.box is None and d.weight < 1]
    assert len(plain) / 4000 == pytest.approx(0.75 * 0.75, abs=0.03)
    assert len(boxes) / 4000 == pytest.approx(0.75 * 0.25, abs=0.03)
    assert np.mean(plain) == pytest.approx(0.5, abs=0.02)
    assert np.var(plain) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.06)  # of Beta(0.8, 0.8)
    for d in boxes:
        top, bottom, left, right = d.box
        assert 0 <= top <= bottom <= 64 and 0 <= left <= right <= 64
        assert d.weight == pytest.approx(1 - (bottom - top) * (right - left) / 64**2)


def test_smoothing_without_mixing():
    config = TaskConfig(mixup=0.0, cutmix=0.0, label_smoothing=0.2)
    assert not mixing_enabled(config)
    images = torch.rand(2, 3, 4, 4)
    same, soft = mix(images, torch.tensor([1, 0]), num_classes=4, config=config, seed=0, step=0)
    assert same is images
    torch.testing.assert_close(soft, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]]))


def test_empty_batch():
    empty, none = torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)
    for step in range(4):
        images, soft = mix(
            empty,
            none,
            num_classes=5,
            config=TaskConfig(),
            seed=0,
            step=step,
            partner_images=empty,
            partner_targets=none,
        )
        assert images.shape == (0, 3, 8, 8) and soft.shape == (0, 5)


@pytest.mark.parametrize("length, expected", [(5, (8, 12)), (4, (8, 12)), (1, (10, 10)), (0, (10, 10))])
def test_official_boxes_are_those_of_timm_0_4_12(length, expected):
    from swin_moe.data.mixing import _interval

    assert _interval(10, length, 32, official=True) == expected  # its rand_bbox: centre -+ length // 2
    assert _interval(1, 9, 32, official=True) == (0, 5) and _interval(31, 9, 32, official=True) == (27, 32)
    assert _interval(10, 5, 32) == (8, 13)  # newer timm's
