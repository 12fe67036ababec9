"""The split of the digits is fixed, stratified and disjoint."""

import numpy as np
import pytest

from swin_moe.config import DataConfig
from swin_moe.data.sets.digits import Digits, stratified_split


@pytest.fixture(scope="module")
def splits():
    return Digits(DataConfig(), "train"), Digits(DataConfig(cache=False), "val")


def test_sizes_and_classes(splits):
    train, val = splits
    assert (len(train), len(val), train.num_classes, val.classes) == (1437, 360, 10, tuple("0123456789"))


def test_split_is_disjoint_and_keeps_class_shares(splits):
    paths = [{part.path(i) for i in range(len(part))} for part in splits]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 1797
    counts = [np.bincount([part.sample(i)[1] for i in range(len(part))]) for part in splits]
    share = (counts[0] + counts[1]) * 360 / 1797
    assert (np.abs(counts[1] - share) < 1).all()


def test_split_never_changes(splits):
    rows = [int(splits[1].path(i).partition("[")[2][:-1]) for i in range(6)]
    assert rows == [1, 11, 26, 27, 33, 46]


def test_split_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    train, test = stratified_split(labels, num_test=5)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(10))
    np.testing.assert_array_equal(np.bincount(labels[test]), [2, 3])


def test_pixels_are_the_original_ones(splits):
    from sklearn.datasets import load_digits

    original = load_digits()
    for split in splits:
        assert split.classes == tuple(map(str, original.target_names))
        rows = [int(split.path(i).partition("[")[2][:-1]) for i in range(len(split))]
        np.testing.assert_array_equal(split.labels(), original.target[rows])
        for i, row in enumerate(rows):
            image, label = split.sample(i)
            assert (image.mode, image.size, label) == ("RGB", (8, 8), original.target[row])
            np.testing.assert_array_equal(np.asarray(image)[..., 1], np.rint(original.images[row] * 255 / 16))
