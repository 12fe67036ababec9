"""A few images of every class: as many as asked, the same ones for all, labels told without decoding."""

from dataclasses import replace

import numpy as np
import pytest

from swin_moe.config import DataConfig
from swin_moe.data.datasets import build_dataset
from swin_moe.data.sets.subset import ClassSubset

SYNTHETIC = DataConfig(name="synthetic", synthetic_samples=60)


def build(config: DataConfig, split: str = "train"):
    return build_dataset(config, split, img_size=(4, 4), num_classes=5)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_labels_are_those_of_the_samples(name):
    dataset = build(replace(SYNTHETIC, name=name))
    assert dataset.labels().tolist() == [dataset.sample(i)[1] for i in range(len(dataset))]


def test_every_class_has_its_images_and_they_are_images_of_the_data_set():
    whole, few = build(SYNTHETIC), build(replace(SYNTHETIC, images_per_class=3))
    assert isinstance(few, ClassSubset) and few.num_classes == 5 and few.classes == whole.classes
    assert np.bincount(few.labels()).tolist() == [3] * 5
    assert few.labels().tolist() == [few.sample(i)[1] for i in range(len(few))]
    paths = [few.path(i) for i in range(len(few))]
    assert len(set(paths)) == 15 and paths == sorted(paths, key=lambda p: int(p[10:-1]))
    index = int(paths[4][10:-1])
    assert np.array_equal(np.asarray(few.sample(4)[0]), np.asarray(whole.sample(index)[0]))


def test_a_class_with_fewer_images_gives_all_of_them():
    assert len(build(replace(SYNTHETIC, images_per_class=1000))) == 60


def test_larger_subsets_hold_the_smaller_and_draws_differ():
    def chosen(**options):
        dataset = build(replace(SYNTHETIC, **options))
        return {dataset.path(i) for i in range(len(dataset))}

    assert chosen(images_per_class=2) < chosen(images_per_class=4)
    assert chosen(images_per_class=2) != chosen(images_per_class=2, subset=1)
    assert chosen(images_per_class=2) == chosen(images_per_class=2)


def test_validation_images_are_all_kept():
    assert len(build(replace(SYNTHETIC, images_per_class=1), "val")) == 60


def test_what_was_chosen_is_part_of_what_a_listing_is_known_by():
    """Else a run could go on with other images of as many."""
    dataset = build(SYNTHETIC)
    listed = []
    for draw in (0, 0, 1):
        parts: list[bytes] = []
        ClassSubset(dataset, 3, draw=draw).update_listing(parts.append)
        listed.append(b"".join(parts))
    assert listed[0] == listed[1] != listed[2]
