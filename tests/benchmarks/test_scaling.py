"""Studies of many runs: what is finished stays, a killed study goes on, and figures show what was measured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCALING = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling"
sys.path.insert(0, str(SCALING))

import cells  # noqa: E402
import quality  # noqa: E402
import sweep  # noqa: E402
from cells import Cell, Study  # noqa: E402

# In the place of a training run: notes that it began, waits, and writes one record or ends with a code.
STAND_IN = """
import json, pathlib, sys, time
folder, seconds, code = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent.parent / "began.txt").open("a") as file:
    file.write(folder.name + "\\n")
time.sleep(seconds)
(folder / "value.json").write_text(json.dumps({"speed": 2.0}))
sys.exit(code)
"""


def stand_in(cell, launch, output):
    """Returns the command of a cell whose words are its seconds and exit code."""
    return [sys.executable, "-c", STAND_IN, str(output / cell.name), *cell.words]


def read(folder):
    return json.loads((Path(folder) / "value.json").read_text())


def began(folder):
    return (folder / "began.txt").read_text().split()


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "command_of", stand_in)
    return Study(tmp_path, read)


def test_what_is_finished_is_not_run_again_and_what_changed_is(study, tmp_path, capsys):
    first = [Cell("a", 1, ("0", "0")), Cell("b", 1, ("0", "3")), Cell("c", 1, ("0", "0"))]
    failures = study.run(first)
    assert len(failures) == 1 and "exit code 3" in failures[0] and "b.txt" in failures[0]
    assert study.result(first[0]) == {"speed": 2.0} and study.result(first[1]) is None
    assert began(tmp_path) == ["a", "b", "c"] and not (tmp_path / "runs" / "a").exists()
    assert "[3/3] c: speed 2 " in capsys.readouterr().out
    second = [first[0], Cell("b", 1, ("0", "0")), Cell("c", 1, ("0.01", "0"))]
    assert study.run(second) == []
    assert began(tmp_path)[3:] == ["b", "c"]
    (tmp_path / "cells" / "a.json").write_text('{"cell": {"na')  # cut off by a full disk
    assert study.run(second) == [] and began(tmp_path)[5:] == ["a"]


def test_a_run_that_cannot_be_read_is_one_failure(study, tmp_path):
    def refuse(folder):
        if folder.endswith("a"):
            raise ValueError("no records of steps")
        return read(folder)

    picky = Study(tmp_path, refuse)
    (failure,) = picky.run([Cell("a", 1, ("0", "0")), Cell("b", 1, ("0", "0"))])
    assert "cannot be read: no records" in failure and began(tmp_path) == ["a", "b"]


def test_a_run_without_memory_is_a_result(study):
    cell = Cell("large", 1, ("0", str(cells.NO_MEMORY)))
    assert study.run([cell]) == [] and study.result(cell) == {"fits": False}


def test_a_killed_study_leaves_its_run_the_folder_and_then_goes_on(study, tmp_path):
    program = (
        f"import sys; sys.path[:0] = [{str(SCALING)!r}, {str(SCALING.parents[1])!r}]\n"
        "import cells; from pathlib import Path; from tests.benchmarks.test_scaling import stand_in, read\n"
        "cells.command_of = stand_in\n"
        f"study = cells.Study(Path({str(tmp_path)!r}), read)\n"
        "study.run([cells.Cell('a', 1, ('0', '0')), cells.Cell('b', 1, ('4', '0'))])"
    )
    child = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (tmp_path / "began.txt").exists() or began(tmp_path) != ["a", "b"]:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    wanted = [Cell("a", 1, ("0", "0")), Cell("b", 1, ("0", "0"))]
    with pytest.raises(ValueError, match="in use by another study, or by a run that one left behind"):
        study.run(wanted)
    while True:
        try:
            assert study.run(wanted) == []
            break
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert began(tmp_path) == ["a", "b", "b"]


@pytest.mark.mpi
def test_a_sweep_and_a_quality_study_of_real_runs(tmp_path, monkeypatch, capsys):
    tiny = ["model.embed_dim=8", "model.num_heads=[1,2]", "engine.threads=1"]
    words = [str(tmp_path / "s"), "weak", "--ranks", "1", "--repeats", "1", "--steps", "4", "--batch", "4", *tiny]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
    assert sweep.work() == []
    speed = json.loads((tmp_path / "s" / "cells" / "weak-r1-1-0.json").read_text())["result"]
    assert speed["images_per_second"] > 0 and speed["s_forward"] > 0
    assert (tmp_path / "s" / "scaling.png").stat().st_size > 0 and "| weak | 1 | 1 |" in capsys.readouterr().out
    words = [
        str(tmp_path / "q"),
        "--experts",
        "2",
        "--widths",
        "8",
        "--seeds",
        "1",
        "model.num_heads=[1,2]",
        "optim.epochs=1",
        "optim.warmup_epochs=0",
        "data.images_per_class=4",
        "engine.threads=1",
    ]
    monkeypatch.setattr(sys, "argv", ["quality.py", *words])
    assert quality.work() == []
    text = (tmp_path / "q" / "quality.md").read_text()
    assert "| 8 | dense |" in text and "| 8 | 2 |" in text and (tmp_path / "q" / "quality.png").stat().st_size > 0


def test_cells_are_what_the_sweep_says():
    options = sweep.parse(["OUT", "weak", "strong", "experts", "--ranks", "1,4", "--experts", "2,8", "--repeats", "2"])
    wanted = sweep.cells_of(options)
    assert [(w.kind, w.ranks, w.x) for w in wanted[: len(wanted) // 2]] == [
        ("weak", 1, 1),
        ("strong", 1, 1),
        ("experts", 1, 0),
        ("experts", 1, 2),
        ("experts", 1, 8),
        ("weak", 4, 4),
        ("strong", 4, 4),
        ("experts", 4, 0),
        ("experts", 4, 2),
        ("experts", 4, 8),
    ]
    batches = [next(x for x in w.cell.words if x.startswith("data.global_batch")) for w in wanted[:2] + wanted[5:7]]
    assert batches == [f"data.global_batch={n}" for n in (16, 64, 64, 64)]
    assert len({w.cell.name for w in wanted}) == len(wanted)


def test_models_end_where_memory_does(tmp_path, monkeypatch):
    options = sweep.parse(
        ["OUT", "models", "--ranks", "1", "--repeats", "1", "--largest", "swinv2_small_patch4_window8_256"]
    )
    wanted = sweep.cells_of(options)
    assert [round(w.x, 2) for w in wanted] == sorted(round(w.x, 2) for w in wanted)
    monkeypatch.setattr(
        cells, "command_of", lambda cell, launch, output: stand_in(Cell(cell.name, 1, ("0", "0")), launch, output)
    )
    monkeypatch.setattr(sweep, "room", lambda: 0.75e9)  # the small ones and their process, not SwinV2-T
    study = Study(tmp_path, read)
    assert sweep.run(study, wanted) == []
    found = [study.result(w.cell) for w in wanted]
    assert found[:2] == [{"speed": 2.0}] * 2 and found[2]["fits"] is False and "GiB" in found[2]["why"]
    assert found[3] is None and began(tmp_path) == [w.cell.name for w in wanted[:2]]


def test_medians_ranges_and_shares(tmp_path):
    speeds = [sweep.Speed("weak", 1, 1, [90.0, 100.0, 130.0], 2**30), sweep.Speed("weak", 4, 4, [200.0], 2**30)]
    lines = sweep.table(speeds)
    assert lines[2] == "| weak | 1 | 1 | 100 | 90 to 130 | 100 % | 1.00 |" and "| 50 % |" in lines[3]
    points = [quality.Point(24, 0, 3e6, 160_000, [90.0, 92.0]), quality.Point(24, 2, 3e6, 200_000, [93.0, 94.0])]
    assert quality.table(points)[3].endswith("| 2 | 93.50 ± 0.71 | 93.00 to 94.00 | +2.50 |")
    for picture in (sweep.draw(speeds, "t"), quality.draw(points, "t")):
        assert len(picture.getcolors(1 << 20)) > 3


def test_wrong_use_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no sweep 'weka'; there are weak, strong, experts, models"):
        sweep.parse(["OUT", "weka"])
    with pytest.raises(ValueError, match="'1,x' must be whole numbers"):
        sweep.parse(["OUT", "--ranks", "1,x"])
    with pytest.raises(ValueError, match="has no MoE blocks"):
        quality.parse(["OUT", "--config", "digits_dense"])
    with pytest.raises(ValueError, match="no folder of images"):
        quality.parse(["OUT", "--data", str(tmp_path)])
    with pytest.raises(ValueError, match="--seeds must be >= 1"):
        quality.parse(["OUT", "--seeds", "0"])
