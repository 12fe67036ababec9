"""Transforms equal torchvision's and timm's, depend on nothing but their key and disturb no generator."""

import io
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.data.pixels import Encoded
from swin_moe.data.torchvision_compat import import_torchvision
from swin_moe.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CropFlipTransform,
    EvalTransform,
    RandomResizedCrop,
    TimmTransform,
    augment_key,
    build_transform,
    generators_kept,
    normalized,
    seeded,
    to_tensor,
)

PLAIN = {"auto_augment": "", "erase_prob": 0.0, "color_jitter": 0.0}


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def draw_everything() -> tuple:
    return random.random(), np.random.rand(), float(torch.rand(()))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(8, 8), (50, 37), (33, 90), (200, 20)])
def test_crop_and_flip_equal_timm_bit_for_bit(shape, interpolation):
    config = DataConfig(**PLAIN, interpolation=interpolation, crop_scale=(0.3, 1.0))
    fast, slow = CropFlipTransform(config, (24, 32)), TimmTransform(config, (24, 32))
    image = noise(*shape)
    for index in range(12):
        key = augment_key(5, 1, index)
        torch.testing.assert_close(fast(image, key), slow(image, key), rtol=0, atol=0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("shape", [(24, 32), (50, 37), (33, 90), (200, 20)])
@pytest.mark.parametrize("is_file", [False, True])
def test_crop_equals_timms_own(shape, interpolation, is_file):
    import_torchvision()
    from timm.data.transforms import RandomResizedCropAndInterpolation

    options = {"interpolation": interpolation, "crop_scale": (0.2, 1.0)}
    fast = RandomResizedCrop(DataConfig(**options), (24, 32))
    slow = RandomResizedCropAndInterpolation((24, 32), scale=(0.2, 1.0), interpolation=interpolation)
    file = io.BytesIO()
    noise(*shape).save(file, "JPEG")
    for seed in range(25):
        image = Encoded(file.getvalue(), "x")
        random.seed(seed)
        made = fast(image if is_file else image.whole())
        after = random.random()
        random.seed(seed)
        assert made.tobytes() == slow(image.whole()).tobytes() and random.random() == after


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_flip_probability_extremes(hflip):
    config = DataConfig(**PLAIN, hflip=hflip, crop_scale=(1.0, 1.0))
    image = noise(16, 16)
    fast, slow = (t(config, (16, 16))(image, 3) for t in (CropFlipTransform, TimmTransform))
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)


def test_which_transform_is_built():
    assert isinstance(build_transform(DataConfig(**PLAIN), (8, 8), train=True), CropFlipTransform)
    for option in (
        {"auto_augment": "rand-m9"},
        {"erase_prob": 0.1},
        {"color_jitter": 0.4},
        {"interpolation": "random"},
    ):
        assert isinstance(build_transform(DataConfig(**{**PLAIN, **option}), (8, 8), train=True), TimmTransform)
    assert isinstance(build_transform(DataConfig(), (8, 8), train=False), EvalTransform)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"auto_augment": "original"},
        {"auto_augment": "augmix-m3-w3"},
        {"auto_augment": "", "erase_mode": "rand"},
        PLAIN,
    ],
    ids=["official", "autoaugment", "augmix", "jitter", "plain"],
)
def test_augmentation_is_a_pure_function_of_the_key(options):
    transform = build_transform(DataConfig(**options), (24, 16), train=True)
    image = noise(40, 30)
    before = image.tobytes()
    first = [transform(image, augment_key(0, 2, index)) for index in range(4)]
    draw_everything()
    second = [transform(image, augment_key(0, 2, index)) for index in reversed(range(4))][::-1]
    assert first[0].shape == (3, 24, 16) and first[0].dtype == torch.float32 and first[0].is_contiguous()
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], transform(image, augment_key(0, 3, 0)))
    assert image.tobytes() == before


def test_seeded_restores_all_three_generators():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw_everything()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(KeyError), seeded(99):
        draw_everything()
        raise KeyError
    assert draw_everything() == expected


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "original", "v0", "augmix-m3-w3"])
def test_every_operation_runs_at_every_strength(policy):
    transform = TimmTransform(DataConfig(auto_augment=policy), (16, 16))
    image = noise(16, 16)
    parts = transform._transform.transforms
    ops = [op for part in parts for op in [*getattr(part, "ops", []), *sum(getattr(part, "policy", []), [])]]
    assert any("Posterize" in op.name for op in ops) or policy.startswith("augmix")
    for op in ops:
        op.prob, op.magnitude_std = 1.0, 0
        for op.magnitude in range(11):
            assert op(image).size == (16, 16)
            if op.name == "PosterizeIncreasing" and op.magnitude == 10:
                assert not np.asarray(op(image)).any()  # no bit kept: black


def test_loader_processes_can_have_the_transform():
    transform = TimmTransform(DataConfig(), (16, 16))
    copy = pickle.loads(pickle.dumps(transform))
    torch.testing.assert_close(copy(noise(20, 20), 5), transform(noise(20, 20), 5), rtol=0, atol=0)


def test_bad_policy_names_the_key():
    with pytest.raises(ValueError, match=r"data\.auto_augment .* got 'nonsense-m9'"):
        build_transform(DataConfig(auto_augment="nonsense-m9"), (8, 8), train=True)


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [16, 24, 224])
@pytest.mark.parametrize("shape", [(8, 8), (50, 37), (33, 90), (301, 300)])
def test_square_evaluation_equals_torchvision(shape, size, crop):
    import_torchvision()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    bicubic = InterpolationMode.BICUBIC
    resize = [Resize(int(256 / 224 * size), bicubic), CenterCrop(size)] if crop else [Resize((size, size), bicubic)]
    official = Compose([*resize, ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    ours = EvalTransform(DataConfig(eval_crop=crop), (size, size))
    image = noise(*shape)
    torch.testing.assert_close(ours(image), official(image), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(8, 8), (50, 37), (33, 90)])
@pytest.mark.parametrize("size", [(16, 40), (40, 16)])
def test_non_square_evaluation(shape, size):
    for crop in (True, False):
        assert EvalTransform(DataConfig(eval_crop=crop), size)(noise(*shape)).shape == (3, *size)
    # One grey: a crop outside of the image would bring in black.
    grey = EvalTransform(DataConfig(), size)(Image.new("RGB", shape, (90, 90, 90)))
    assert torch.equal(grey.amin((1, 2)), grey.amax((1, 2)))


def test_random_interpolation_evaluates_bilinear():
    image = noise(40, 30)
    size = (16, 16)
    found = EvalTransform(DataConfig(interpolation="random"), size)(image)
    assert torch.equal(found, EvalTransform(DataConfig(interpolation="bilinear"), size)(image))
    assert not torch.equal(found, EvalTransform(DataConfig(interpolation="bicubic"), size)(image))


def test_without_resize_small_images_are_padded_and_cropped_as_in_the_official_code():
    import_torchvision()
    from torchvision.transforms import RandomCrop

    image, size = noise(32, 32), (32, 32)
    plain = {"auto_augment": "", "color_jitter": 0.0, "erase_prob": 0.0, "hflip": 0.0, "resize": False}
    transform = build_transform(DataConfig(**plain), size, train=True)
    seen = set()
    for key in range(20):
        with seeded(key):
            expected = to_tensor(RandomCrop(32, padding=4)(image))
        torch.testing.assert_close(transform(image, key), expected)
        seen.add(expected.sum().item())
    assert len(seen) > 10
    evaluation = build_transform(DataConfig(**plain), size, train=False)
    assert torch.equal(evaluation(image, 0), to_tensor(image))
    with pytest.raises(ValueError, match="data.resize=false needs images of model.img_size, 32 x 32"):
        evaluation(noise(30, 32), 0)


@pytest.mark.parametrize(
    "options",
    [
        {"erase_prob": 1.0, "erase_mode": mode, "erase_count": count}
        for mode, count in (("pixel", 1), ("rand", 1), ("const", 1), ("pixel", 3))
    ]
    + [{"erase_prob": 0.0}, {"erase_prob": 0.0, "auto_augment": "", "color_jitter": 0.0}, {"resize": False}],
)
@pytest.mark.parametrize("train", [True, False])
def test_pixels_normalized_later_are_the_same_bits(options, train):
    config = DataConfig(**options)
    size = (40, 48)
    transform = build_transform(config, size, train=train)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    patches = 0
    for key in range(20):
        image = Image.fromarray(pixels)
        before = torch.default_generator.get_state()
        with generators_kept():
            made = transform.pixels(image, key)
        assert torch.equal(before, torch.default_generator.get_state())
        out = normalized(torch.tensor(made.levels), made.patches, torch.empty(3, *size))
        assert torch.equal(out, transform(image, key))
        patches += len(made.patches)
    assert (patches > 0) == (train and config.erase_prob > 0)
