"""The page of a run: what it shows is what the run wrote and what evaluation says; nothing is fetched to show it."""

import base64
import contextlib
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from swin_moe import evaluate, train
from swin_moe.report import command, draw, page
from swin_moe.report.charts import curve_figures, layer_figures, layers_of
from swin_moe.report.records import Run, Series, read_run, read_runs
from swin_moe.report.results import Results, look

OPTIONS = (
    "model.embed_dim=8 model.depths=[1,2] model.num_heads=[1,2] model.moe.blocks=[[0],[1]] model.moe.num_experts=4 "
    "model.moe.group_images=2 data.images_per_class=4 data.global_batch=20 optim.epochs=3 optim.warmup_epochs=0 "
    "log.every=1 log.eval_every=1 log.tensorboard=false run.name=little"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the folder of a run of six steps with two MoE layers."""
    root = tmp_path_factory.mktemp("report")
    train.main(["digits_swin_moe", *OPTIONS, f"run.output={root}"])
    return root / "little"


class Images(HTMLParser):
    """Collects what a page shows and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.fetched, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "img":
            assert given["alt"] and given["src"].startswith("data:image/png;base64,")
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(given["src"].partition(",")[2]))))
        self.fetched += [given[key] for key in ("href", "src") if not given.get(key, "data:").startswith("data:")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def made_up(layers, experts, records=30, name="made up"):
    """Returns a run of so many MoE layers that never was."""
    steps, draws = np.arange(1, records + 1), np.random.default_rng(0)
    series = {"train/loss": Series(steps, 3 / steps), "train/lr": Series(steps, np.full(records, 1e-3))}
    for layer in range(layers):
        key = f"moe/layers.{layer // 4}.blocks.{layer % 4}"
        series[f"{key}/load"] = Series(steps, draws.integers(0, 50, (records, experts)).astype(float))
        series[f"{key}/dropped_percent"] = Series(steps, draws.random(records))
    return Run(name, None, {"optim.lr": 1e-3, "run.name": name}, series, {})


def test_the_page_shows_what_was_recorded_and_fetches_nothing(run, capsys):
    command.main([str(run), "--pictures"])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    text = (run / "report.html").read_text()
    seen = Images(text)
    assert not seen.fetched and not seen.open and "http" not in text
    files = sorted((run / "report").glob("*.png"))
    assert len(files) == len(seen.pictures) > 15
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert f"train/loss {losses[-1]:.4g}" in text and "<code>model.moe.num_experts</code>" in text
    for title in ("Experts", "Validation images", "Routing", "Accuracy by class"):
        assert title in text


def test_what_it_says_of_images_is_what_evaluation_says(run):
    found = look(run, 10_000)
    lines = []
    with contextlib.redirect_stdout(io.StringIO()) as said:
        evaluate.main([str(run / "config.yaml"), f"checkpoint.load={run}"])
    lines = said.getvalue().splitlines()
    assert f"top1 {100 * np.trace(found.counts) / found.images:.6g}," in lines[-1] and "samples 360" in lines[-1]
    assert found.images == found.total == 360 == found.counts.sum()
    worst = [one.probability for one in found.worst]
    assert worst == sorted(worst) and len(worst) == 8 and found.classes == tuple("0123456789")
    assert all(one.said == one.label for one in found.best) and len(found.routed) == 2
    assert [maps.layer for maps in found.routed[0][1]] == ["layers.0.blocks.0", "layers.1.blocks.1"]


def test_fewer_images_are_spread_over_the_set(run):
    found = look(run, 100)
    assert found.images == 90 and (found.counts.sum(axis=1) > 0).all()


def test_a_run_away_from_its_data_has_a_page_all_the_same(run, tmp_path, capsys):
    moved = shutil.copytree(run, tmp_path / "moved")
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace("name: digits\n  path: ''", "name: folder\n  path: /nowhere"))
    assert "/nowhere" in (moved / "config.yaml").read_text()
    command.main([str(moved)])
    error = capsys.readouterr().err
    assert "nothing is shown of its validation images" in error and "/nowhere" in error
    assert "nothing is shown of its validation images" in (moved / "report.html").read_text()


def test_several_runs_stand_side_by_side(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("name: little,", "name: 'a <b>',").replace("lr: 0.002", "lr: 0.5"))
    command.main([str(run), str(other), "--images", "0", "--out", str(tmp_path / "x" / "both.html")])
    page_text = (tmp_path / "x" / "both.html").read_text()
    assert "a &lt;b&gt;" in page_text and "<b>" not in page_text
    assert "What differs:" in page_text and "<td>0.002</td><td>0.5</td>" in page_text
    assert not (tmp_path / "x" / "both").exists()
    assert [one.name for one in read_runs([str(run), str(run)])] == [f"{run} (1)", f"{run} (2)"]


@pytest.mark.parametrize("layers, experts", [(1, 4), (12, 512)])
def test_any_number_of_layers_and_experts_is_drawn(layers, experts):
    run = made_up(layers, experts, records=1000)
    figures = list(layer_figures(run))
    assert len(figures) == layers + 1 and len(layers_of(run)) == layers
    assert layers_of(run)[-1] == f"layers.{(layers - 1) // 4}.blocks.{(layers - 1) % 4}"
    for figure in figures:
        assert figure.picture.size == (draw.WIDTH, draw.HEIGHT)
        assert len(np.unique(np.asarray(figure.picture).reshape(-1, 3), axis=0)) > 10


def test_a_heat_map_shows_each_experts_share():
    steps = np.array([1, 2])
    run = Run("x", None, {}, {"moe/l/load": Series(steps, np.array([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))}, {})
    (figure,) = layer_figures(run)
    pixels = np.asarray(figure.picture)
    assert tuple(pixels[60, 150]) == tuple(draw.shade(np.array([1.0]))[0])  # all tokens: four even shares, the most
    assert tuple(pixels[300, 150]) == tuple(draw.shade(np.array([0.0]))[0])
    assert tuple(pixels[60, 800]) == tuple(draw.shade(np.array([0.25]))[0])
    assert "from 1.00 (expert 0) to 1.00" in figure.words


@pytest.mark.parametrize("classes", [4, 40, 41, 1000])
def test_any_number_of_classes_is_drawn(classes):
    counts = np.zeros((classes, classes), dtype=np.int64)
    counts[np.arange(classes), np.arange(classes)] = 5
    counts[0, classes - 1] = 45
    picture = np.asarray(draw.draw_counts(counts, [f"class of {k}" for k in range(classes)], down="is", across="said"))
    full, most = draw.shade(np.array([1.0, 0.9]))
    assert (picture == full).all(axis=2).any() and (picture == most).all(axis=2).any()
    assert max(picture.shape[:2]) < 1300
    found = Results(tuple(map(str, range(classes))), counts, 50, 50, "")
    assert found.confused(9) == [(45, 0, classes - 1)] and found.accuracy[0] == 10.0


def test_the_curve_goes_through_its_values():
    """A falling line starts at the top left and ends at the bottom right of its frame."""
    curve = draw.Curve("x", np.array([0.0, 10.0]), np.array([10.0, 0.0]))
    pixels = np.asarray(draw.draw_curves([curve]))
    rows, columns = np.nonzero((pixels == draw.COLOURS[0]).all(axis=2))
    first, last = columns.argmin(), columns.argmax()
    assert rows[first] < 40 and rows[last] > draw.HEIGHT - 100 and abs(np.polyfit(columns, rows, 1)[0]) > 0.3


def test_records_that_a_kill_cut_or_that_are_no_numbers_are_left_out(run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "broken")
    with open(broken / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\0\x98\n")
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "train/loss": NaN, "train/lr": "x", "train/aux": true}\n[1]\n{"step": 8, "train/lo')
    assert len(read_run(broken).series["train/loss"].steps) == len(read_run(run).series["train/loss"].steps)


def test_what_never_changes_is_no_picture():
    steps = np.arange(3)
    series = {"train/loss": Series(steps, steps * 1.0), "speed/ranks": Series(steps, np.ones(3))}
    assert [f.name for f in curve_figures([Run("x", None, {}, series, {})])] == ["train-loss"]
    series["speed/ranks"] = Series(steps, np.array([4.0, 4.0, 3.0]))  # a restart on fewer
    assert [f.name for f in curve_figures([Run("x", None, {}, series, {})])] == ["train-loss", "speed-ranks"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["/nowhere"], "/nowhere is no folder of a run: it has no config.yaml"),
        ([], "required: RUN"),
        (["x", "--images", "-1"], "--images must be >= 0"),
        (["x", "--picture"], "no such option|/|x"),
    ],
)
def test_wrong_words_are_one_sentence(words, said):
    with pytest.raises(ValueError, match=said):
        command.main(words)


def test_a_run_without_records_says_so(run, tmp_path):
    fresh = shutil.copytree(run, tmp_path / "fresh")
    (fresh / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl holds no record yet"):
        command.main([str(fresh)])


def test_a_browser_shows_every_picture(run, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser here")
    text, _ = page.build([read_run(run)], [look(run, 360)])
    script = (
        "<script>addEventListener('load',()=>{const all=[...document.images];document.title="
        "`${all.filter(i=>i.naturalWidth).length} of ${all.length} ${document.documentElement.scrollWidth<=innerWidth}`"
        "})</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", script + "</body>"))
    for width in (400, 1400):
        shown = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--window-size={width},900",
                "--dump-dom",
                f"file://{tmp_path / 'page.html'}",
            ],
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout
        count = text.count("<img ")
        assert f"<title>{count} of {count} true</title>" in shown
