"""`swin-moe simulate` as a user calls it."""

import json

import pytest

from swin_moe.planner.simulation.command import main

SMALL = ["digits_swin_moe", "--hardware", "a100_80", "--gpus", "8", "data.global_batch=64", "parallel.expert=8"]


def simulated(capsys, *arguments):
    assert main([*SMALL, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_uneven_experts_make_a_step_longer(capsys, tmp_path):
    even, uneven = simulated(capsys), simulated(capsys, "--spread", "1.0")
    assert even["load_cv"] == 0 and even["simulated"]["waiting"] == pytest.approx(0, abs=1e-12)
    assert even["simulated"]["images_per_second"] == pytest.approx(64 / even["simulated"]["seconds"])
    assert uneven["load_cv"] > 0.3 and uneven["simulated"]["seconds"] >= even["simulated"]["seconds"]
    record = {"step": 9, "moe/layers.0.blocks.1/load": [40, 0, 0, 0, 0, 0, 0, 0]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert main([*SMALL, "--routing", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for words in ("simulated step", "waiting for the slowest experts", "layout: parallel.expert=8"):
        assert words in text


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--spread", "-1"], "--spread must be >= 0, got -1.0"),
        (["--spread", "nan"], "--spread must be >= 0, got nan"),
        (["--oversubscription", "0.5"], "--oversubscription must be >= 1"),
        (["--spread", "1", "--routing", "x"], "give one"),
        (["--routing", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--leaf", "0"], "--leaf must be >= 1"),
        (["--gpus", str(1 << 40)], "--gpus must be at most 1048576"),
        (["--sprd", "1"], "did you mean --spread?"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, arguments, sentence):
    assert main([*SMALL, *arguments]) == 2
    found = capsys.readouterr()
    assert sentence in found.err and found.err.count("\n") == 1 and not found.out
