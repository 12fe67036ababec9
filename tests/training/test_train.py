"""Training end to end under MPI: resume is exact, the layout changes nothing, replicas stay identical."""

import functools

import pytest
import torch

from tests.gathered import gathered
from tests.ranks import TWO_AND_FOUR, run_ranks
from tests.training import cases

WORLDS = (1, *TWO_AND_FOUR)
CASES = (
    "double",
    "accumulated",
    "recomputed",
    "uneven",
    "tuned",
    "together in parts",
    *(pytest.param(case, marks=pytest.mark.full) for case in cases.LAYOUTS),
)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint of 2 ranks after 3 of 5 steps."""
    root = tmp_path_factory.mktemp("half")
    run_ranks(cases.leave_half, 2, root, str(root))
    return root / "run" / "checkpoints" / "0000000003"


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, half):
    """Returns world -> the result of each rank; a world is started once, when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")
    given = (str(root), str(half), request.config.getoption("--full"))
    return functools.cache(lambda world: run_ranks(cases.run_world, world, root, *given, timeout=300))


def weights_of(results: list, case: str) -> dict[str, torch.Tensor]:
    return gathered((name, *held) for result in results for name, held in result[case][1].items())


@pytest.mark.parametrize("world", WORLDS)
def test_resume_is_bit_exact(runs, world):
    assert runs(world)[0]["whole"][0] == runs(world)[0]["parts"][0]
    assert len(runs(world)[0]["whole"][0]) == 5
    for result in runs(world):
        whole, parts = result["whole"][1], result["parts"][1]
        assert whole.keys() == parts.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, parts[name]), name


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
def test_resume_of_sharded_state_is_bit_exact(tmp_path, world):
    for result in run_ranks(cases.resume_sharded, world, tmp_path, str(tmp_path), timeout=600):
        assert result == {zero: (True, []) for zero in (1, 2, 3)}


@pytest.mark.parametrize("world", WORLDS)
def test_every_record_says_what_the_experts_did(runs, world):
    layer = "moe/layers.1.blocks.1"
    records = runs(world)[0]["records"]
    assert len(records) == 5
    for record in records:
        load = torch.tensor(record[f"{layer}/load"], dtype=torch.float64)
        assert len(load) == 4 and load.sum() == 32 * 4 * 4  # 32 images of 4 x 4 tokens, each with one choice
        assert record[f"{layer}/load_cv"] == pytest.approx(float(load.std(correction=0) / load.mean()))
        assert record[f"{layer}/dead_experts"] == int((load == 0).sum())
        assert 0 <= record[f"{layer}/dropped_percent"] < 100 and 0 < record[f"{layer}/entropy"] <= 1.4
        assert all(record[f"{layer}/ms_{phase}"] > 0 for phase in ("route", "dispatch", "experts", "combine"))
    assert records[0][f"{layer}/load"] == runs(1)[0]["records"][0][f"{layer}/load"]


@pytest.mark.parametrize("world", TWO_AND_FOUR)
def test_a_save_that_fails_in_the_background_ends_the_run_on_every_rank(runs, world):
    for result in runs(world):
        kind, message, step, left = result["failed save"]
        assert kind == "CheckpointError" and message.startswith(f"rank {world - 1}: ") and "No space left" in message
        assert 20 <= step <= 30, "at the latest where the next save would begin, which waits for this one"
        assert left == ["0000000010"]


@pytest.mark.parametrize("world", TWO_AND_FOUR)
def test_replicas_stay_identical_and_a_difference_is_named(runs, world):
    assert runs(world)[0]["differs"] is None
    assert runs(world)[0]["tampered"] == "head.bias"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_layout_accumulation_and_recomputation_change_nothing(runs, case, world):
    reference = "double" if case in ("accumulated", "recomputed", "replicated", "tuned") else case
    expected, actual = runs(1)[0][reference], runs(world)[0][case]
    torch.testing.assert_close(torch.tensor(actual[0]), torch.tensor(expected[0]), rtol=1e-10, atol=1e-12)
    weights = weights_of(runs(1), reference)
    for name, tensor in weights_of(runs(world), case).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("world", WORLDS)
def test_choices_are_kept_and_what_travels_is_recorded(runs, world):
    assert len(runs(world)[0]["choices"]) == (world > 1)  # one MoE layer; its rows travel only between ranks
    rows = [row for row in runs(world)[0]["rounded"] if "train/loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    layer = "moe/layers.1.blocks.1"
    for row in rows:
        if world == 1:
            assert not [key for key in row if "bytes" in key and key.startswith(layer) or "payload" in key]
            continue
        assert 0.01 < row[f"{layer}/payload_error"] < 0.04 and 0.01 < row[f"{layer}/payload_gradient_error"] < 0.04
        # 32 images of 16 tokens; a row of 16 channels is 20 bytes, sent out and home, forward and backward.
        most = 32 * 16 * 20 * 4
        assert 0.3 * most * (1 - 1 / world) < row[f"{layer}/sent_bytes"] <= most
        assert row[f"{layer}/crossing_bytes"] == 0
        assert 0 < row[f"{layer}/ms_exposed"] < sum(row[f"{layer}/ms_{p}"] for p in ("dispatch", "experts", "combine"))
    exact = torch.tensor(runs(world)[0]["whole"][0])[:, 0]
    torch.testing.assert_close(torch.tensor([row["train/loss"] for row in rows])[-1], exact[-1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("world", TWO_AND_FOUR)
def test_evaluation_is_exact_in_every_world(runs, world):
    one, many = runs(1)[0]["uneven"][2][-1], runs(world)[0]["uneven"][2][-1]
    assert one["eval/samples"] == many["eval/samples"] == 360
    assert one["eval/top1"] == many["eval/top1"] and one["eval/top5"] == many["eval/top5"]
    assert one["eval/loss"] == pytest.approx(many["eval/loss"], rel=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_half_precisions_follow_float32(runs, world):
    full = torch.tensor(runs(world)[0]["whole"][0])[:, 0]
    torch.testing.assert_close(torch.tensor(runs(world)[0]["bf16"])[:, 0], full, rtol=2e-2, atol=0)
    fp16_losses, scale, updates = runs(world)[0]["fp16"]
    assert updates >= 1 and scale <= 2.0**16
    assert all(r["fp16"][1:] == (scale, updates) for r in runs(world))


@pytest.mark.parametrize("target", [1, 4])
def test_another_world_continues_the_same_curve(runs, target):
    rest = runs(target)[0]["resumed elsewhere"]
    expected = torch.tensor(runs(1)[0]["double"][0][3:])
    torch.testing.assert_close(torch.tensor(rest[0]), expected, rtol=1e-10, atol=1e-12)
