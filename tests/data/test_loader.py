"""Order and pixels depend on (seed, step) alone: not on world, workers, resumption or what else is broken."""

import logging
import multiprocessing
import time
from typing import Any

import numpy as np
import pytest
import torch

from swin_moe.config import DataConfig
from swin_moe.data.loader import EvalLoader, TrainLoader, epoch_order
from tests.data.conftest import encode

PLAIN: dict[str, Any] = {"auto_augment": "", "erase_prob": 0.0, "color_jitter": 0.0}


def train_loader(
    config: DataConfig, *, rank=0, world=1, micro_batch=None, accumulation=1, size=12, **options
) -> TrainLoader:
    micro_batch = micro_batch or config.global_batch // (world * accumulation)
    return TrainLoader(
        config, size, seed=7, rank=rank, world_size=world, micro_batch=micro_batch, accumulation=accumulation, **options
    )


def union(config: DataConfig, steps: range, *, world=1, accumulation=1, **options) -> dict:
    """Returns {(step, epoch, sample): (image, target)} over all ranks; checks that no sample comes twice."""
    result = {}
    for rank in range(world):
        with train_loader(config, rank=rank, world=world, accumulation=accumulation, **options) as loader:
            for item in loader.batches(steps.start, steps.stop):
                assert len(item) == accumulation and item.step in steps
                for batch in item:
                    for sample, image, target in zip(batch["sample"], batch["image"], batch["target"]):
                        key = (batch["step"], batch["epoch"], int(sample))
                        assert key not in result
                        result[key] = (image, int(target))
    return result


def assert_same(a: dict, b: dict) -> None:
    assert sorted(a) == sorted(b)
    for key, (image, target) in a.items():
        assert b[key][1] == target
        torch.testing.assert_close(b[key][0], image, rtol=0, atol=0)


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    orders = [epoch_order(100, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert len({order.tobytes() for order in orders}) == 4
    assert epoch_order(8, seed=0, epoch=0).tolist() == [1, 5, 2, 4, 7, 0, 3, 6]


def test_digits_positions_follow_the_permutation():
    loader = train_loader(DataConfig(**PLAIN, global_batch=100), world=2, rank=1, accumulation=2)
    assert loader.steps_per_epoch == 14 and loader.num_classes == 10
    item = next(loader.batches(15))
    assert (item.step, item.epoch, item.num_samples) == (15, 1, 100)
    assert [b["sample"].tolist() for b in item] == [[*range(25, 50)], [*range(75, 100)]]
    order = epoch_order(1437, seed=7, epoch=1)[100:200]
    assert item.batches[1]["target"].tolist() == [loader.dataset.sample(i)[1] for i in order[75:100]]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_world_and_accumulation_change_nothing(world, accumulation):
    config = DataConfig(global_batch=24)  # full augmentation
    steps = range(58, 60)  # across the end of an epoch of 59 steps
    reference = union(config, steps)
    assert len(reference) == 48
    assert_same(reference, union(config, steps, world=world, accumulation=accumulation))


def test_worker_count_changes_nothing():
    steps = range(9, 12)
    reference = union(DataConfig(global_batch=6), steps, accumulation=2)
    assert_same(reference, union(DataConfig(global_batch=6, workers=2), steps, accumulation=2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("images_per_class", [0, 2])
def test_draft_is_the_same_for_every_worker_count(tmp_path, images_per_class):
    for name, number in (("cat", 0), ("cat", 1), ("cat", 2), ("dog", 3), ("dog", 4)):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        data = encode(number, size=(100, 80), suffix=".jpg")
        (tmp_path / "train" / name / f"{number}.jpg").write_bytes(data)
    options = {"global_batch": 4, "images_per_class": images_per_class, "crop_scale": (0.3, 1.0)}
    reference, exact = (union(folder_config(tmp_path, **options, draft=draft), range(3)) for draft in (True, False))
    assert_same(reference, union(folder_config(tmp_path, **options, draft=True, workers=2), range(3), accumulation=2))
    assert sorted(reference) == sorted(exact)
    assert any(not torch.equal(image, exact[key][0]) for key, (image, _) in reference.items())


def test_resumed_run_continues_at_the_next_sample():
    config = DataConfig(**PLAIN, global_batch=300)
    whole = union(config, range(9))
    assert_same(whole, union(config, range(3)) | union(config, range(3, 9)))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_smaller_last_batch(world):
    config = DataConfig(**PLAIN, global_batch=800, drop_last=False)
    loader = train_loader(config, world=world, rank=world - 1, accumulation=4)
    assert loader.steps_per_epoch == 2
    assert [loader.samples_in(step) for step in range(4)] == [800, 637, 800, 637]
    assert [loader.samples_before(step) for step in range(5)] == [0, 800, 1437, 2237, 2874]
    last = next(loader.batches(3))
    assert last.num_samples == 637
    if world == 4:  # rank 3, micro-step 3 would take samples 750 to 799
        assert last.batches[3]["image"].shape == (0, 3, 12, 12) and last.batches[3]["target"].shape == (0,)
    everything = union(config, range(2, 4), world=world, accumulation=4)
    assert {sample for step, _, sample in everything if step == 3} == set(range(637)) and len(everything) == 1437


def test_dropped_images_differ_between_epochs():
    config = DataConfig(**PLAIN, global_batch=1000)
    loader = train_loader(config)
    assert loader.steps_per_epoch == 1 and loader.samples_before(3) == 3000
    orders = [set(loader._request(step, 0).index.tolist()) for step in range(2)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("partner", [False, True])
def test_partner_rows(partner):
    loader = train_loader(DataConfig(**PLAIN, global_batch=30), world=2, rank=1, accumulation=5, partners=partner)
    batch = next(loader.batches(0)).batches[0]  # samples 3, 4, 5
    assert batch["sample"].tolist() == [3, 4, 5]
    if not partner:
        assert "partner" not in batch
        return
    assert batch["partner"].tolist() == [3, 2, 1] and batch["extra_image"].shape == (1, 3, 12, 12)
    assert (
        len(
            next(train_loader(DataConfig(**PLAIN, global_batch=30), partners=True).batches(0)).batches[0]["extra_image"]
        )
        == 0
    )


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for workers in (0, 1):
        union(DataConfig(global_batch=4, workers=workers), range(1))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 1438}, r"data\.global_batch=1438 is larger than the 1437 training images"),
        ({"global_batch": 8, "micro_batch": 3}, r"data\.global_batch=8 is not 3 images x 1 forwards x 1 ranks"),
        ({"global_batch": 8, "num_classes": 9}, r"model\.num_classes=9 is too small: data\.name=digits has 10 classes"),
    ],
    ids=["too_large", "not_a_product", "classes"],
)
def test_user_errors(options, message):
    batch = options.pop("global_batch")
    with pytest.raises(ValueError, match=message):
        train_loader(DataConfig(**PLAIN, global_batch=batch), **options)


@pytest.fixture
def broken_root(image_root):
    (image_root / "train/dog/1.jpg").write_bytes((image_root / "train/dog/1.jpg").read_bytes()[:200])
    (image_root / "val/eel/0.png").write_bytes(b"")
    return image_root


def folder_config(root, **options: Any) -> DataConfig:
    return DataConfig(name="folder", path=str(root), **PLAIN, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_fails_with_one_sentence(broken_root, workers):
    config = folder_config(broken_root, global_batch=13, workers=workers)
    with pytest.raises(ValueError, match=r"^broken image .*dog/1\.jpg: OSError: .*data\.on_broken=skip") as caught:
        list(train_loader(config).batches(0, 1))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_skipped_and_reported_once(broken_root, workers, caplog):
    config = folder_config(broken_root, global_batch=13, on_broken="skip", workers=workers)
    loader = train_loader(config)
    with caplog.at_level(logging.WARNING):
        batches = [item.batches[0] for item in loader.batches(0, 3)]
    assert [len(b["image"]) for b in batches] == [12, 12, 12]
    assert [m for m in caplog.messages if "dog/1.jpg" in m] == caplog.messages and len(caplog.messages) == 1
    assert list(loader.broken) == [str(broken_root / "train/dog/1.jpg")]


def test_skipping_does_not_depend_on_the_world(broken_root):
    config = folder_config(broken_root, global_batch=12, on_broken="skip")
    reference = union(config, range(3))
    assert 33 <= len(reference) < 36
    for world in (2, 4):
        assert_same(reference, union(config, range(3), world=world))


def test_partner_of_a_broken_image_is_itself(broken_root):
    for world in (1, 4):
        seen = {}
        config = folder_config(broken_root, global_batch=12, on_broken="skip")
        for rank in range(world):
            batch = next(train_loader(config, world=world, rank=rank, partners=True).batches(1)).batches[0]
            samples = batch["sample"].tolist()
            for row, partner in enumerate(batch["partner"].tolist()):
                seen[samples[row]] = partner == row
        missing = set(range(12)) - set(seen)
        assert {g for g, alone in seen.items() if alone} == {g ^ 1 for g in missing}


def test_a_data_set_that_vanished_is_an_error(image_root):
    loader = train_loader(folder_config(image_root, global_batch=13, on_broken="skip"))
    for path in image_root.rglob("*.*"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"data\.path=.*the last \d+ images were all broken, most recently .*No such file"
    ):
        list(loader.batches(0, 40))


def test_closing_early_ends_the_processes():
    start = time.monotonic()
    loader = train_loader(DataConfig(**PLAIN, global_batch=4, workers=2))
    batches = loader.batches(0)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()
    next(loader.batches(3))
    loader.close()
    assert not multiprocessing.active_children() and time.monotonic() - start < 20


@pytest.mark.parametrize("world", [1, 2, 4, 7])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_validation_image_exactly_once(image_root, world, batch):
    config = folder_config(image_root)  # 5 images: ranks may outnumber them
    seen, lengths = [], set()
    for rank in range(world):
        loader = EvalLoader(config, (12, 20), rank, world, batch)
        batches = list(loader)
        assert len(batches) == len(loader) and all(b["image"].shape[1:] == (3, 12, 20) for b in batches)
        assert all(len(b["image"]) == len(b["target"]) == len(b["sample"]) <= batch for b in batches)
        lengths.add(len(batches))
        seen += [(int(s), int(t)) for b in batches for s, t in zip(b["sample"], b["target"])]
    assert len(lengths) == 1
    assert sorted(seen) == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 2)]


def test_evaluation_with_processes_twice(image_root):
    reference = list(EvalLoader(folder_config(image_root), 12, 0, 1, 2))
    with EvalLoader(folder_config(image_root, workers=2), 12, 0, 1, 2) as loader:
        for _ in range(2):
            for a, b in zip(reference, loader, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not multiprocessing.active_children()


def test_broken_validation_image(broken_root):
    assert sum(len(b["image"]) for b in EvalLoader(folder_config(broken_root, on_broken="skip"), 12, 0, 1, 2)) == 4
    with pytest.raises(ValueError, match=r"eel/0\.png: not an image in a known format"):
        list(EvalLoader(folder_config(broken_root), 12, 0, 1, 2))


def test_synthetic_takes_the_size_and_classes_of_the_model():
    config = DataConfig(name="synthetic", synthetic_samples=8, global_batch=8, **PLAIN)
    with TrainLoader(
        config, (12, 20), seed=0, rank=0, world_size=1, micro_batch=8, accumulation=1, num_classes=3
    ) as loader:
        batch = next(loader.batches(0)).batches[0]
    assert loader.num_classes == 3 and batch["image"].shape == (8, 3, 12, 20) and batch["target"].max() < 3


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_memory(workers):
    loader = train_loader(DataConfig(**PLAIN, global_batch=4, workers=workers), pin_memory=True)
    with loader:
        assert next(loader.batches(0)).batches[0]["image"].is_pinned()
