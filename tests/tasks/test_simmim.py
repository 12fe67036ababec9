"""SimMIM against the official numbers: masks, loss, targets, parameter groups, layer decay, learning rates, counts."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swin_moe.config.io import load_config
from swin_moe.models.heads import mask_of_order, masked_l1, normalize_targets, num_masked
from swin_moe.optim import build_schedule, parameter_groups
from swin_moe.randomness import RandomContext
from swin_moe.run.metrics import MetricsWriter
from swin_moe.tasks.base import StepContext, build_task
from swin_moe.tasks.simmim import tiled

NUMBERS = json.loads((Path(__file__).parent.parent / "golden" / "numbers.json").read_text())
TINY = (
    "model.img_size=16",
    "model.patch_size=2",
    "model.embed_dim=8",
    "model.depths=[1,1]",
    "model.num_heads=[1,2]",
    "task.mask_patch_size=4",
    "model.pretrained_window_sizes=[0,0]",
)
STEPS = 625  # an epoch of ImageNet-1K in batches of 2048


def task_of(*options: str, name: str = "digits_simmim"):
    return build_task(load_config(name, [*TINY, *options]))


def network(name: str, *options: str):
    """Returns the task's network of a shipped config, on meta, and the config."""
    task = build_task(load_config(name, options))
    with torch.device("meta"):
        return task.build_network(), task.config


def context(task, num_samples: int, step: int = 0, world_size: int = 1) -> StepContext:
    return StepContext(task.config, step, world_size, num_samples, nullcontext)


# Masks.


def test_mask_equals_the_official_generator():
    golden = NUMBERS["mask_generator_seed0_192_32_4_0.6"]
    order = torch.from_numpy(np.random.RandomState(0).permutation(36))[None]
    assert num_masked(36, 0.6) == golden["mask_count"]
    mask = mask_of_order(order, (6, 6), golden["mask_count"], 8)[0]
    assert list(mask.shape) == golden["shape"] and mask.sum() == golden["sum"]
    assert mask[::8, ::8].flatten().int().tolist() == golden["grid6x6"]


def test_masks_are_a_function_of_seed_step_and_sample():
    task, other = task_of(), task_of("run.seed=1")
    sample = torch.arange(200)
    masks = task.masks(sample, step=3)
    assert masks.shape == (200, 8, 8) and masks.dtype == torch.bool
    assert (masks.sum((1, 2)) == math.ceil(0.6 * 16) * 4).all()
    assert torch.equal(masks.view(200, 4, 2, 4, 2).all(4).all(2), masks[:, ::2, ::2]), "whole units of 2 x 2 patches"
    assert torch.equal(task.masks(sample[77:], step=3), masks[77:])
    for different in (task.masks(sample, step=4), other.masks(sample, step=3), task.masks(sample + 200, step=3)):
        assert 0.4 < (different == masks).double().mean() < 0.65  # 0.625 ** 2 + 0.375 ** 2 = 0.53 by chance
    assert torch.equal(task.masks(sample, step=None), other.masks(sample, step=None))
    # Every unit is hidden as often as any other: 5 deviations of a binomial.
    share = task.masks(torch.arange(4000), step=0)[:, ::2, ::2].double().mean(0)
    assert (share - 10 / 16).abs().max() < 5 * math.sqrt(10 / 16 * 6 / 16 / 4000)


# Loss and targets.


def test_normalized_targets_equal_the_official_ones():
    golden = NUMBERS["norm_targets_47"]
    image = torch.from_numpy(np.random.RandomState(12345).standard_normal((2, 3, 64, 64)))
    target = normalize_targets(image, 47)
    assert target.sum().item() == pytest.approx(golden["sum"], rel=1e-9)
    assert target.abs().sum().item() == pytest.approx(golden["abs_sum"], rel=1e-9)


@pytest.mark.parametrize("window", [0, 7])
def test_loss_is_the_official_one_of_the_whole_batch_however_it_is_cut(window):
    task = task_of(f"task.target_window={window}")
    model = task.build_network()
    model.init_weights(0)
    model.double().eval()
    image = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = torch.arange(6)
    mask = task.masks(sample, step=5)
    target = normalize_targets(image, window) if window else image
    expected = masked_l1(target, model(image, mask)[0], mask, (2, 2)).item()
    cuts = [slice(0, 6)], [slice(0, 4), slice(4, 6), slice(6, 6)]
    for parts in cuts:
        losses = [
            task.loss(model, {"image": image[p], "sample": sample[p]}, context(task, 6, step=5, world_size=2))
            for p in parts
        ]
        assert sum(float(loss.task) for loss in losses) == pytest.approx(expected, rel=1e-12)
        assert sum(float(loss.total) for loss in losses) == pytest.approx(2 * expected, rel=1e-12)
        assert all(loss.aux == 0 for loss in losses)


def test_evaluation_weighs_samples_and_knows_the_mean_of_what_is_seen():
    task = task_of("task.pictures=2")
    model = task.build_network()
    model.init_weights(0)
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].bias.zero_()  # predicts 0 everywhere
    image = torch.full((3, 3, 16, 16), 2.0)
    image[2] = 0.5
    batches = [{"image": image[:2], "sample": torch.tensor([0, 1])}, {"image": image[2:], "sample": torch.tensor([2])}]
    result = task.evaluate(model.eval(), batches, context(task, 0))
    assert result == {"loss": pytest.approx(1.5), "mean_loss": pytest.approx(0.0, abs=1e-6), "samples": 3}
    picture = task.pictures()["reconstructions"]
    assert picture.shape == (4 + 2 * 100, 4 + 3 * 100, 3) and picture.dtype == np.uint8
    seen, predicted, original = (picture[4:100, 4 + 100 * i : 100 + 100 * i] for i in range(3))
    hidden = task.masks(torch.tensor([0]), step=None)[0].repeat_interleave(12, 0).repeat_interleave(12, 1).numpy()
    assert np.ptp(original.reshape(-1, 3), axis=0).max() == 0, "one colour"
    assert np.array_equal(seen[~hidden], original[~hidden]) and np.array_equal(predicted[~hidden], original[~hidden])
    mean_colour = (124, 116, 104)  # 255 x (0.485, 0.456, 0.406): what 0 stands for
    assert (seen[hidden] == mean_colour).all() and (predicted[hidden] == mean_colour).all()


def test_normalized_predictions_are_drawn_in_real_colours():
    task = task_of("task.pictures=1", "task.target_window=5")
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = task.masks(torch.tensor([0]), step=None)
    drawn = task._draw(None, image, normalize_targets(image, 5), mask, torch.tensor([0]))
    torch.testing.assert_close(drawn[0, 1], drawn[0, 2])  # a perfect prediction looks like the original
    assert not torch.equal(drawn[0, 0], drawn[0, 2])


def test_tiles_lie_in_rows_and_large_images_keep_their_size():
    drawn = torch.zeros(2, 3, 3, 100, 120)
    drawn[1, 2] = 1.0
    sheet = tiled(drawn)
    assert sheet.shape == (4 + 2 * 104, 4 + 3 * 124, 3)
    assert (sheet[108:208, 252:372] == 255).all() and (sheet[4:104, 4:124] == 0).all()


def test_pictures_go_to_disk_and_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    writer = MetricsWriter(tmp_path, enabled=True, tensorboard=True, resume_step=0)
    writer.show(7, {"reconstructions": picture})
    writer.close()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / "reconstructions-0000007.png")), picture)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (image,) = events.Images("reconstructions")
    assert (image.step, image.width, image.height) == (7, 5, 4)
    silent = MetricsWriter(tmp_path / "other", enabled=False, tensorboard=True, resume_step=0)
    silent.show(7, {"reconstructions": picture})
    assert not (tmp_path / "other").exists()


# Optimization.


def groups_of(name: str, *options: str):
    model, config = network(name, *options)
    return parameter_groups(model, config.optim, config.model.depths), config


def decayed(name: str, *options: str) -> set[str]:
    groups, _ = groups_of(name, *options)
    return {n for group in groups if group["weight_decay"] for n in group["names"]}


@pytest.mark.parametrize(
    ("name", "wrongly_decayed", "words"),
    [
        ("simmim_pretrain__swin_base__img192_window6__800ep", 24, ("relative_position_bias_table",)),
        ("simmim_pretrain__swinv2_base__img192_window12__800ep", 72, ("cpb_mlp", "logit_scale")),
    ],
)
def test_weight_decay_of_pre_training(name, wrongly_decayed, words):
    ours, official = decayed(name), decayed(name, "compat.official=true")
    assert ours < official and len(official - ours) == wrongly_decayed
    assert all(any(word in n for word in words) for n in official - ours)
    assert "encoder.mask_token" not in official


def test_layer_decay_of_fine_tuning_swin_base():
    groups, config = groups_of("simmim_finetune__swin_base__img224_window7__800ep")
    assert len(groups) == 52
    scales = sorted({group["lr_scale"] for group in groups})
    assert len(scales) == 26 and scales[0] == pytest.approx(0.003778, abs=5e-7) and scales[-1] == 1.0
    assert scales == pytest.approx([0.8 ** (25 - i) for i in range(26)], rel=1e-12)
    schedule = build_schedule(config.optim, steps_per_epoch=STEPS, global_batch=2048)
    peak = 1.25e-3 * 4
    assert schedule(20 * STEPS, 1.0) == pytest.approx(peak, rel=1e-12)
    assert schedule(20 * STEPS, scales[0]) == pytest.approx(peak * 0.8**25, rel=1e-12)  # once, not twice
    for scale in scales:  # both ends are the same for all groups
        assert schedule(0, scale) == pytest.approx(2.5e-7 * 4, rel=1e-12)
        assert schedule(100 * STEPS, scale) == pytest.approx(2.5e-7 * 4, rel=1e-12)


def test_learning_rates_of_pre_training():
    config = load_config("simmim_pretrain__swin_base__img192_window6__800ep")
    schedule = build_schedule(config.optim, steps_per_epoch=STEPS, global_batch=2048)
    assert schedule(0) == pytest.approx(2e-6)
    assert schedule(5 * STEPS) == pytest.approx((2e-6 + 4e-4) / 2)
    assert [schedule(t * STEPS) for t in (10, 699.9, 700, 799)] == pytest.approx([4e-4, 4e-4, 4e-5, 4e-5])
    short = load_config("simmim_pretrain__swin_base__img192_window6__100ep")
    cosine = build_schedule(short.optim, steps_per_epoch=STEPS, global_batch=2048)
    assert [cosine(t * STEPS) for t in (0, 10, 55, 100)] == pytest.approx([4e-6, 8e-4, 4.2e-4, 4e-5])


# Sizes: encoder without head (official counts), mask token and decoder; the extra norms of H, g and G.
SIZES = {
    "simmim_pretrain__swin_base__img192_window6__800ep": 89_874_104,
    "simmim_pretrain__swinv2_base__img192_window12__800ep": 90_042_744,
    "simmim_pretrain__swinv2_small__img192_window12__800ep": 48_959_418 + 96 + 769 * 3072,
    "simmim_pretrain__swinv2_large__img192_window12__800ep": 195_202_932 + 192 + 1537 * 3072,
    "simmim_pretrain__swinv2_huge__img192_window12__800ep": 655_210_922 + 8_448 + 352 + 2817 * 3072,
    "simmim_pretrain__swinv2_giant__img192_window12__800ep": 1_060_976_996 + 10_752 + 448 + 3585 * 3072,
    "swinv2_giant_3b_patch4_window12_192_simmim": 2_997_815_008 + 28_672 + 512 + 4097 * 3072,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_pre_training(name):
    model, config = network(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert config.task.target_window == (47 if config.model.name == "swinv2" else 0)
    assert (config.task.mask_patch_size, config.task.mask_ratio) == (32, 0.6)
    assert model.decoder[0].out_channels == 32 * 32 * 3
    assert model.active_flops() == model.encoder.active_flops() + 36 * model.encoder.num_features * 3072


# What does not fit is refused.


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("task.mask_patch_size=3", "task.simmim.mask_patch_size must be a multiple of model.patch_size=2, got 3"),
        ("task.mask_patch_size=12", r"model.img_size must be multiples of 12 \(task.simmim.mask_patch_size\)"),
        ("model.img_size=[16,18]", "model.img_size must be multiples of 4"),
        ("model.patch_size=[2,4]", "model.patch_size must be square"),
        ("task.mask_ratio=1.0", r"task.simmim.mask_ratio must be in \(0, 1\), got 1.0"),
        ("task.target_window=46", "task.simmim.target_window must be odd"),
        ("optim.freeze=experts", "optim.freeze must be none or backbone for a model without MoE blocks"),
        ("optim.freeze=backbone", "without a class head to train"),
    ],
)
def test_what_does_not_fit_is_refused(option, said):
    with pytest.raises(ValueError, match=said):
        load_config("digits_simmim", [*TINY, option]).check(1)


def test_a_class_head_is_left_out():
    task = task_of("model.num_classes=10")
    assert not any("head" in name for name, _ in task.build_network().named_parameters())
    assert replace(task.config.model, num_classes=0) != task.config.model


def test_recomputed_forward_sees_the_same_masks_and_drops():
    results = []
    for recompute in ("none", "block"):
        task = task_of(f"parallel.recompute={recompute}", "model.drop_path_rate=0.5")
        model = task.build_network()
        model.init_weights(0)
        batch = {"image": torch.ones(4, 3, 16, 16), "sample": torch.arange(4)}
        task.loss(model, batch, context(task, 4)).total.backward()
        results.append([p.grad for p in model.parameters()])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    assert RandomContext(0, 0, torch.arange(4)).key("mask") != RandomContext(0, 0, torch.arange(4)).key("subset")
