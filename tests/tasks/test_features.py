"""Nearest neighbours and ridge regression, by hand in one process; several ranks in test_transfer."""

import pytest
import torch

from swin_moe.evaluate_features import parse_options
from swin_moe.tasks.features import Features, knn_accuracy, ridge_accuracy


def features(rows, labels) -> Features:
    return Features(torch.tensor(rows, dtype=torch.float32), torch.tensor(labels))


# Two classes along two axes; lengths differ, and the third training image lies nearer to the other class.
TRAIN = features([[1, 0], [5, 0.5], [0.2, 1], [0, 9]], [0, 0, 1, 1])


def accuracy(query: Features, neighbours: int, temperature: float = 0.07) -> float:
    return knn_accuracy(TRAIN, query, neighbours=neighbours, num_classes=2, temperature=temperature)


def test_neighbours_vote_by_cosine():
    assert accuracy(features([[9, 0.1], [0.1, 2]], [0, 1]), 1) == 100.0
    assert accuracy(features([[9, 0.1], [0.1, 2]], [1, 1]), 1) == 50.0
    # Of three neighbours of (3, 1) two are of class 0; of all four the nearer ones count more.
    assert accuracy(features([[3, 1]], [0]), 3) == accuracy(features([[3, 1]], [0]), 4) == 100.0
    assert accuracy(features([[3, 1]], [0]), 9) == 100.0, "no more neighbours than training images"


def test_temperature_weighs_near_against_many():
    train = features([[1, 0], [0.6, 0.8], [0.6, -0.8]], [0, 1, 1])
    query = features([[1, 0.01]], [0])
    for temperature, expected in ((0.1, 100.0), (10.0, 0.0)):
        assert knn_accuracy(train, query, neighbours=3, num_classes=2, temperature=temperature) == expected


def test_ridge_regression_equals_the_normal_equations():
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(12, 3, generator=generator), torch.randn(40, 3, generator=generator)
    train, query = Features(x, torch.arange(12) % 4), Features(z, torch.arange(40) % 4)
    mean, deviation = x.double().mean(0), x.double().std(0, correction=0)
    a = torch.cat([(x.double() - mean) / deviation, torch.ones(12, 1)], 1)
    wanted = torch.full((12, 4), -1.0, dtype=torch.float64)
    wanted[torch.arange(12), torch.arange(12) % 4] = 1
    # The same minimum as an ordinary least-squares problem with rows for the penalty.
    rows = torch.cat([a, 3.0**0.5 * torch.eye(4, dtype=torch.float64)])
    solution = torch.linalg.lstsq(rows, torch.cat([wanted, torch.zeros(4, 4, dtype=torch.float64)])).solution
    scores = torch.cat([(z.double() - mean) / deviation, torch.ones(40, 1)], 1) @ solution
    expected = 100 * (scores.argmax(1) == query.label_N).double().mean().item()
    assert ridge_accuracy(train, query, num_classes=4, l2=3.0) == pytest.approx(expected)
    assert 0 < expected < 100


def test_a_constant_feature_does_no_harm():
    train = features([[1, 7], [2, 7], [-1, 7], [-2, 7]], [0, 0, 1, 1])
    assert ridge_accuracy(train, features([[1.5, 7], [-0.5, 7]], [0, 1]), num_classes=2, l2=1.0) == 100.0


def test_options():
    overrides, options = parse_options(["data.path=x", "--k", "3", "run.seed=1", "--shots", "0"])
    assert overrides == ["data.path=x", "run.seed=1"]
    assert (options.k, options.shots, options.draws, options.l2) == (3, 0, 3, 1024.0)
    with pytest.raises(ValueError, match="--draws >= 1"):
        parse_options(["--draws", "0"])
