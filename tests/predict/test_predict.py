"""`swin-moe predict`: files, folders, patterns and standard input, in batches, prepared as evaluation prepares them."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import swin_moe
from swin_moe import predict, train
from swin_moe.config.io import load_config
from swin_moe.predict.command import _shares_capacity
from swin_moe.run.session import run_main
from tests.run.test_data_fit import SMALL

EXPERTS = "model.name=swin_moe model.moe.blocks=[[-1],[0]] model.moe.num_experts=2 model.moe.gate_noise=1.0".split()


@pytest.fixture(scope="module", params=["dense", "experts"])
def run(request, tmp_path_factory):
    """Returns the directory of a run of one epoch on photos of three classes and different sizes."""
    root = tmp_path_factory.mktemp(request.param)
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 7)):
        for name in ("cat", "dog", "emu"):
            (root / "photos" / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(0, 256, (30 + k, 50 - k, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "photos" / split / name / f"{k}.png")
    more = EXPERTS if request.param == "experts" else []
    words = ["finetune_photos", f"data.path={root / 'photos'}", f"run.output={root}", "run.name=run", *SMALL, *more]
    run_main(train.main, [*words, "engine.precision=fp32"])
    return root / "run"


def say(capfd, *words) -> tuple[int, str, str]:
    """Returns (exit code, what was printed, what was said beside it)."""
    code = 0
    try:
        run_main(predict.main, [str(word) for word in words])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    said = capfd.readouterr()
    return code, said.out, said.err


def slowly(run: Path, image: Path) -> dict[str, float]:
    """Returns class -> probability, of one image by itself, as a user's own Python computes them."""
    model, classes, preprocess = swin_moe.load(run)
    with torch.inference_mode():
        output = model(preprocess(image)[None])
    logits = output[0] if isinstance(output, tuple) else output
    return dict(zip(classes, logits.softmax(1)[0].tolist()))


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_batches_say_what_single_images_say(run, batch, capfd):
    folder = run.parent / "photos" / "val"
    code, out, error = say(capfd, run, "--json", "--batch", batch, folder)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [Path(row["image"]) for row in rows] == sorted(folder.rglob("*.png")) and "weights: " in error
    for row in rows[:: 5 if batch == 4 else 10]:
        expected = slowly(run, row["image"])
        assert {found["name"]: found["probability"] for found in row["classes"]} == pytest.approx(expected, abs=2e-6)


def test_a_table_standard_input_and_patterns(run, capfd, monkeypatch):
    folder = run.parent / "photos" / "val"
    names = [str(path) for path in sorted((folder / "cat").glob("*.png"))[:3]]
    _, out, _ = say(capfd, run, "--csv", "--top", 2, *names)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["image"] for row in rows] == [name for name in names for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * 3
    best = max(slowly(run, Path(names[0])).items(), key=lambda item: item[1])
    assert rows[0]["class"] == best[0] and float(rows[0]["probability"]) == pytest.approx(best[1], abs=2e-6)
    for text in ("\n".join(names) + "\n", "\0".join(names) + "\0"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert say(capfd, run, "--csv", "--top", 2, "-")[1] == out
    assert say(capfd, run, "--csv", "--top", 2, folder / "cat" / "[0-2].png")[1] == out


def test_images_that_cannot_be_read_do_not_stop_the_others(run, capfd, tmp_path):
    good = next(iter((run.parent / "photos/val/cat").iterdir()))
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").write_bytes(good.read_bytes())
    (tmp_path / "c.png").write_bytes(good.read_bytes()[:60])
    code, out, error = say(capfd, run, tmp_path)
    assert code == 2 and out.startswith(f"{tmp_path / 'b.png'}: ") and out.count("\n") == 1
    assert error.splitlines()[-1].startswith("error: 2 of 3 images cannot be read, the first: broken image ")
    assert f"broken image {tmp_path / 'c.png'}" in error
    assert say(capfd, run, "data.on_broken=skip", tmp_path)[:2] == (0, out)
    code, _, error = say(capfd, run, tmp_path / "a.png")
    assert code == 2 and error.count("broken image") == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["--json", "--csv"], "--json and --csv are two ways"),
        (["--batch", "-3"], "--batch must be >= 1, got -3"),
        (["--top", "x" * 5000], f"argument --top: invalid int value: '{'x' * 200}"),
        (["--batch", "0"], "--batch must be >= 1, got 0"),
        (["--out", ""], "--out is followed by an empty word"),
        (["--csvv"], "did you mean --csv?"),
        ([""], "no such image file: ''"),
    ],
)
def test_wrong_words_are_one_sentence(words, said, run, capfd):
    code, out, error = say(capfd, run, *words, "x.png")
    assert code == 2 and not out and error.startswith("error: ") and said in error and error.count("\n") == 1
    assert len(error) < 500


@pytest.mark.parametrize(
    "words, said",
    [
        (["--out", "drawn"], "--out is for networks that find objects or label maps"),
        (["--score", "0.3", "--out", "drawn"], "--out and --score are for networks"),
    ],
)
def test_options_without_an_effect_are_refused(words, said, run, capfd):
    code, out, error = say(capfd, run, *words, run.parent / "photos/val/cat/0.png")
    assert code == 2 and not out and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "given", [None, io.TextIOWrapper(io.BytesIO(b"\x89PNG\xff"), encoding="utf-8")], ids=["closed", "binary"]
)
def test_a_standard_input_without_paths_is_said(given, run, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", given)
    code, _, error = say(capfd, run, "-")
    assert code == 2 and error.startswith("error: predict -: standard input ") and error.count("\n") == 1


def test_empty_standard_input_is_said(run, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "standard input has no path" in say(capfd, run, "-")[2]


@pytest.mark.parametrize(
    "options, shares",
    [
        ([], False),
        (EXPERTS, False),
        ([*EXPERTS, "model.moe.eval_capacity_factor=1.0"], True),
        ([*EXPERTS, "model.moe.choice=expert", "model.moe.balance_loss=none"], True),
    ],
)
def test_images_that_compete_for_experts_come_one_by_one(options, shares):
    assert _shares_capacity(load_config("finetune_photos", ["data.path=x", *SMALL, *options])) is shares
