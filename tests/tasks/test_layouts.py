"""Every task gives the same losses, gradients, weights and evaluation on 1, 2 and 4 ranks, under real MPI."""

import functools

import pytest
import torch

from tests.gathered import gathered
from tests.ranks import TWO_AND_FOUR, run_ranks
from tests.tasks import cases

pytestmark = pytest.mark.mpi
WORLDS = (1, *TWO_AND_FOUR)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns world -> the result of each rank; a world is started once, when it is first asked for."""
    root = tmp_path_factory.mktemp("tasks")
    cases.write_teacher(root)
    return functools.cache(lambda world: run_ranks(cases.run_world, world, root, str(root), world, timeout=900))


def weights_of(results: list[dict], run: str) -> dict[str, torch.Tensor]:
    return gathered((name, *held) for result in results for name, held in result[run]["weights"].items())


@pytest.mark.parametrize("name", cases.RUNS)
@pytest.mark.parametrize("world", WORLDS)
def test_layout_accumulation_and_recomputation_change_nothing(runs, world, name):
    reference = cases.REFERENCE.get(name, name)
    expected, actual = runs(1)[0][reference], runs(world)[0][name]
    torch.testing.assert_close(torch.tensor(actual["losses"]), torch.tensor(expected["losses"]), rtol=1e-10, atol=1e-12)
    for key, value in expected["evaluation"].items():
        assert actual["evaluation"][key] == pytest.approx(value, rel=1e-7), key
    weights = weights_of(runs(1), reference)
    for key, tensor in weights_of(runs(world), name).items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("world", WORLDS)
def test_pictures_are_of_the_same_images_on_every_rank(runs, world):
    expected = runs(1)[0]["simmim v2"]["pictures"]["reconstructions"]
    assert expected.shape == (4 + 4 * 100, 4 + 3 * 100, 3)
    for result in runs(world):
        difference = result["simmim v2"]["pictures"]["reconstructions"].astype(int) - expected
        assert abs(difference).max() <= 1  # a rounding
        assert not result["moby"]["pictures"]


def test_every_step_counts(runs):
    for name in cases.RUNS:
        losses = torch.tensor(runs(1)[0][name]["losses"])
        assert len(losses) == 3 and losses[:, 0].min() > 0 and losses[:, 2].min() > 0
    assert all(loss[1] > 0 for loss in runs(1)[0]["simmim moe"]["losses"])
