"""Checkpoints carry between tasks and layouts: what is loaded, changed to fit, left out, and told."""

import json
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from checkpoint_tools.__main__ import main as tools
from swin_moe.checkpoint import CheckpointError
from swin_moe.engine.common import materialize
from swin_moe.models import build_model
from swin_moe.models.attention import resize_bias_table
from swin_moe.models.geometric import resize_bias_table_geometric
from swin_moe.train import Trainer
from swin_moe.weights.load import load_weights, start_from
from tests.ranks import run_ranks
from tests.tasks import cases
from tests.tasks.transfer import CPU, MOE, begun, session_of, trained, untouched, weights


@pytest.mark.parametrize("options", [(), ("model.name=swinv2",), MOE], ids=["swin", "swinv2", "moe"])
def test_an_encoder_is_fine_tuned(tmp_path, options):
    source = trained(tmp_path, "digits_simmim", *options)
    before = weights(source)
    new, report = begun(tmp_path, "digits_dense", source.session.directory, *options)
    after, fresh = weights(new), untouched(new)
    for name, value in after.items():
        torch.testing.assert_close(value, fresh[name] if name.startswith("head.") else before[f"encoder.{name}"])
    assert "task simmim, step 2" in report and "only for SimMIM pre-training" in report
    assert re.search(r"reinitialized 2 \(head.weight, head.bias\)", report)
    assert "dropped 3 (decoder.0.bias, decoder.0.weight, ...)" in report


def test_a_classifier_begins_simmim(tmp_path):
    source = trained(tmp_path, "digits_dense")
    before = weights(source)
    new, report = begun(tmp_path, "digits_simmim", source.session.directory)
    after, fresh = weights(new), untouched(new)
    for name, value in after.items():
        inner = name.removeprefix("encoder.")
        torch.testing.assert_close(value, before[inner] if inner in before else fresh[name])
    assert "the model has no head" in report and "begins from the seed" in report


def test_simmim_goes_on_with_its_decoder(tmp_path):
    source = trained(tmp_path, "digits_simmim")
    new, report = begun(tmp_path, "digits_simmim", source.session.directory)
    for name, value in weights(new).items():
        assert torch.equal(value, weights(source)[name]), name
    assert "dropped" not in report and "reinitialized" not in report


@pytest.mark.parametrize("task", ["digits_simmim", "digits_moby", "digits_distill"])
def test_the_export_of_any_task_begins_a_run_as_its_checkpoint_does(tmp_path, task):
    options = [f"task.teacher={trained(tmp_path, 'digits_dense').session.directory}"] if "distill" in task else []
    options += ["task.queue=20"] if "moby" in task else []
    source = trained(tmp_path, task, "run.name=source", *options).session.directory
    exported = tmp_path / "x.safetensors"
    assert tools(["export", str(source), str(exported), "--to", "safetensors"]) == 0
    for config in (task, "digits_dense"):
        given = options if config == task else []
        (wanted, _), (found, report) = (begun(tmp_path, config, path, *given) for path in (source, exported))
        assert all(torch.equal(value, weights(found)[name]) for name, value in weights(wanted).items())
    assert tools(["convert", str(exported), str(tmp_path / "native"), "--to", "native"]) == 0
    assert tools(["diff", str(exported), str(tmp_path / "native")]) in (0, 1)


def test_averaged_weights_come_first_and_start_the_new_average(tmp_path):
    source = trained(tmp_path, "digits_dense", "optim.ema=0.9")
    average = {name: value.clone() for name, value in source.engine.ema.average.items()}
    new, report = begun(tmp_path, "digits_dense", source.session.directory, "optim.ema=0.5")
    for name, value in weights(new).items():
        assert torch.equal(value, average[name]) and torch.equal(new.engine.ema.average[name], value), name
        assert not torch.equal(value, weights(source)[name]) or not value.requires_grad
    assert f"{len(average)} of {len(average)} averaged" in report


# Windows and resolutions.


@pytest.mark.parametrize(
    ("task", "resize"), [("digits_simmim", resize_bias_table_geometric), ("digits_dense", resize_bias_table)]
)
def test_bias_tables_follow_a_new_window(tmp_path, task, resize):
    source = trained(tmp_path, task, "model.name=swin")
    old = weights(source)
    new, report = begun(
        tmp_path,
        "digits_dense",
        source.session.directory,
        "model.name=swin",
        "model.img_size=28",
        "model.window_size=7",
    )
    prefix = "encoder." if task == "digits_simmim" else ""
    for name, value in weights(new).items():
        if name.endswith("relative_position_bias_table"):
            before = old[prefix + name]
            assert before.shape[0] == 49 and value.shape[0] == 169
            torch.testing.assert_close(value, resize(before, 7))
        elif not name.startswith("head."):
            assert torch.equal(value, old[prefix + name]), name
    rule = "geometric" if task == "digits_simmim" else "bicubic"
    assert f"{rule}, 7 x 7 to 13 x 13 offsets" in report


def test_bias_networks_need_the_windows_they_were_trained_with(tmp_path):
    source = trained(tmp_path, "digits_dense", "model.name=swinv2")
    larger = ("model.name=swinv2", "model.img_size=32", "model.window_size=8")
    _, report = begun(tmp_path, "digits_dense", source.session.directory, *larger)
    assert "trained with windows [4, 4], the model reads them with [8, 8]" in report
    assert "model.pretrained_window_sizes=[4, 4]" in report
    new, report = begun(
        tmp_path, "digits_dense", source.session.directory, *larger, "model.pretrained_window_sizes=[4,4]"
    )
    assert "note" not in report
    for name, value in weights(new).items():
        assert torch.equal(value, weights(source)[name]), name


def test_absolute_positions_follow_a_new_resolution(tmp_path):
    source = trained(tmp_path, "digits_dense", "model.ape=true")
    new, report = begun(tmp_path, "digits_dense", source.session.directory, "model.ape=true", "model.img_size=32")
    assert weights(new)["absolute_pos_embed"].shape == (1, 256, 8)
    assert "bicubic, 8 x 8 to 16 x 16 tokens" in report


@pytest.mark.parametrize("kind", ["run", "export"])
def test_absolute_positions_know_the_shape_of_their_image(tmp_path, kind):
    """8 x 32 tokens into 16 x 16, as many: interpolated as the picture they are of, never read in another order."""
    wide = ("model.ape=true", "model.img_size=[16,64]")
    source = trained(tmp_path, "digits_dense", *wide)
    folder = source.session.directory
    if kind == "export":
        assert tools(["export", str(folder), str(tmp_path / "x.safetensors"), "--to", "safetensors"]) == 0
    path = folder if kind == "run" else tmp_path / "x.safetensors"
    old = weights(source)["absolute_pos_embed"]
    for size, grid in (("32", (16, 16)), ("[32,128]", (16, 64)), ("[64,16]", (32, 8))):
        new, report = begun(tmp_path, "digits_dense", path, "model.ape=true", f"model.img_size={size}")
        picture = old.transpose(1, 2).unflatten(2, (8, 32))
        wanted = F.interpolate(picture, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
        torch.testing.assert_close(weights(new)["absolute_pos_embed"], wanted)
        assert f"bicubic, 8 x 32 to {grid[0]} x {grid[1]} tokens" in report
    new, report = begun(tmp_path, "digits_dense", path, *wide)
    assert torch.equal(weights(new)["absolute_pos_embed"], old) and "bicubic" not in report
    if kind == "run":
        session = session_of(tmp_path, "digits_dense", "model.ape=true", "model.img_size=32", f"checkpoint.load={path}")
        model = materialize(build_model(session.config.model), session.config, CPU)
        said = r"are of 8 x 32 tokens, the model has 16 x 16; set model.img_size=\[16,64\]"
        with pytest.raises(ValueError, match=said):
            load_weights(model, session)


def test_an_export_that_states_a_square_image_is_interpolated(tmp_path):
    source = trained(tmp_path, "digits_dense", "model.ape=true", "model.img_size=32")
    tools(["export", str(source.session.directory), str(tmp_path / "x.safetensors"), "--to", "safetensors"])
    _, report = begun(tmp_path, "digits_dense", tmp_path / "x.safetensors", "model.ape=true", "model.img_size=[16,64]")
    assert "bicubic, 16 x 16 to 8 x 32 tokens" in report


# Heads of tasks that are still to come.


def test_an_official_simmim_file_begins_a_run(tmp_path):
    source = trained(tmp_path, "digits_simmim", "model.name=swinv2", "model.extra_norm_every=2")
    state = {name.replace("cpb_mlp", "rpe_mlp"): value for name, value in weights(source).items()}
    assert any("enorm" in name for name in state) and any("rpe_mlp" in name for name in state)
    torch.save({"model": state}, tmp_path / "official.pth")
    options = ("model.name=swinv2", "model.extra_norm_every=2")
    new, report = begun(tmp_path, "digits_dense", tmp_path / "official.pth", *options)
    for name, value in weights(new).items():
        if not name.startswith("head."):
            assert torch.equal(value, weights(source)[f"encoder.{name}"]), name
    assert "reinitialized 2 (head.weight, head.bias): no head in the file" in report
    # The whole network is evaluated from such a file, too.
    session = session_of(tmp_path, "digits_simmim", *options, f"checkpoint.load={tmp_path / 'official.pth'}")
    task = cases.build_task(session.config)
    model = materialize(_on_meta(task), session.config, CPU)
    assert "loaded" in load_weights(model, session)
    for name, value in model.named_parameters():
        assert torch.equal(value, weights(source)[name]), name


def _on_meta(task):
    with torch.device("meta"):
        return task.build_network()


# What does not fit.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("model.embed_dim=16",), "of another network: model.embed_dim=8, not model.embed_dim=16"),
        (("model.depths=[1,3]",), r"of another network: model.depths=\[1,2\], not model.depths=\[1,3\]"),
        (("model.depths=[1,1]",), r"of another network: model.depths=\[1,2\], not model.depths=\[1,1\]"),
        (MOE, "layers.1.blocks.1.mlp.experts.fc1_weight: missing in the file"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, options, said):
    source = trained(tmp_path, "digits_dense")
    trainer = Trainer(session_of(tmp_path, "digits_dense", "run.name=new", *options))
    before = weights(trainer)
    with pytest.raises(CheckpointError, match=said):
        start_from(str(source.session.directory), trainer.engine, trainer.session)
    for name, value in weights(trainer).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "^checkpoint.init=[^ ]*nowhere: does not exist$"),
        ("x.pth", "^checkpoint.init=[^ ]*x.pth: does not exist$"),
        ("folder", "^checkpoint.init=[^ ]*folder: is no checkpoint of a known format$"),
        ("bad.pth", "^checkpoint.init=[^ ]*bad.pth: is neither a file of torch.save nor a safetensors file$"),
        ("empty.pth", "^checkpoint.init=[^ ]*empty.pth: is empty$"),
        ("cut.pth", "^checkpoint.init=[^ ]*cut.pth: is cut off: it begins as a file of torch.save, its end is"),
        ("object.pth", "object.pth: its pickle asks for the global fractions.Fraction, which is refused: only tensors"),
    ],
)
def test_a_source_that_is_none_is_named(tmp_path, name, said):
    (tmp_path / "bad.pth").write_bytes(b"not a file of torch's")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "folder").mkdir()
    torch.save({"model": {"x": Fraction(1, 2)}}, tmp_path / "object.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "object.pth").read_bytes()[:-100])
    trainer = Trainer(session_of(tmp_path, "digits_dense"))
    with pytest.raises(CheckpointError, match=said):
        start_from(str(tmp_path / name), trainer.engine, trainer.session)


def test_a_run_that_has_a_checkpoint_goes_on_from_it(tmp_path):
    source = trained(tmp_path, "digits_simmim", "run.name=source")
    init = f"checkpoint.init={source.session.directory}"
    first = trained(tmp_path, "digits_dense", "run.name=tuned", init)
    again = Trainer(session_of(tmp_path, "digits_dense", "run.name=tuned", init))
    again.resume()
    assert again.progress.step == first.progress.step == 2
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(again).items())


# Freezing.


@pytest.mark.parametrize(
    ("freeze", "moves"),
    [
        ("experts", lambda name: ".experts." not in name),
        ("moe", lambda name: ".experts." not in name and ".router." not in name),
        ("backbone", lambda name: name.startswith("head.")),
    ],
)
def test_what_is_frozen_keeps_its_weights(tmp_path, freeze, moves):
    balanced = ("model.moe.scores=sigmoid", "model.moe.bias_rate=0.01", "model.moe.balance_loss=none")
    three_steps = "data.images_per_class=3"  # an odd number, so that a bias that moves cannot be back where it began
    options = (*MOE, *balanced, f"optim.freeze={freeze}", "optim.name=sgd", "optim.lr=0.1", three_steps)
    trainer = Trainer(session_of(tmp_path, "digits_dense", *options))
    before = weights(trainer)
    trainer.run()
    for name, value in weights(trainer).items():
        if name.endswith("qkv.bias"):
            continue  # a third of it has no gradient
        assert torch.equal(value, before[name]) != moves(name), name


def test_a_linear_probe_sees_the_features_of_evaluation(tmp_path):
    options = (*MOE, "optim.freeze=backbone", "model.drop_path_rate=0.5", "task.mixup=0.0", "task.label_smoothing=0.0")
    trainer = Trainer(session_of(tmp_path, "digits_dense", *options, "model.moe.capacity_factor=0.1"))
    batch = {"image": torch.randn(4, 3, 16, 16), "target": torch.arange(4), "sample": torch.arange(4)}
    first, second = (
        trainer.task.loss(trainer.engine.model, batch, trainer._context(step, 4)).task.item() for step in (0, 1)
    )
    assert first == second, "nothing is drawn"
    model = trainer.engine.local_model.eval()
    expected = torch.nn.functional.cross_entropy(model(batch["image"])[0], batch["target"])
    assert first == pytest.approx(expected.item(), rel=1e-6)


# Layouts.


@pytest.mark.mpi
def test_pre_trained_on_four_ranks_tuned_on_two_evaluated_on_one(tmp_path):
    options = (*MOE, "model.moe.top_k=2")
    run_ranks(cases.tune, 4, tmp_path, str(tmp_path), "digits_simmim", "run.name=pre", *options, "parallel.zero=3")
    tune = (*options, f"checkpoint.init={tmp_path / 'pre'}")
    parts = run_ranks(cases.tune_and_measure, 2, tmp_path, str(tmp_path), *tune)
    (whole,) = run_ranks(cases.measure_alone, 1, tmp_path, str(tmp_path), *tune)
    assert "pre/checkpoints/0000000003 (task simmim, step 3" in whole["report"]
    for part in parts:
        assert part["report"] == whole["report"]
        for name, (shape, offset, value) in part["begun"].items():
            box = tuple(slice(o, o + n) for o, n in zip(offset, value.shape))
            assert torch.equal(whole["begun"][name][2][box], value), name
            assert tuple(whole["begun"][name][0]) == tuple(shape)
    assert any(".experts." in name and value.shape[0] == 2 for name, (_, _, value) in parts[0]["begun"].items())
    for key, value in whole["evaluation"].items():
        assert parts[0]["evaluation"][f"eval/{key}"] == pytest.approx(value, rel=1e-6), key  # of float32 logits
    assert whole["features"] == pytest.approx(parts[0]["features"], rel=1e-9)
    assert parts[0]["features"] == parts[1]["features"]
    assert set(whole["features"]) == {"knn", "few_shot", "few_shot_deviation"} and whole["features"]["knn"] > 10


def test_the_report_is_in_the_log(tmp_path, caplog):
    source = trained(tmp_path, "digits_simmim", "run.name=source")
    trainer = Trainer(session_of(tmp_path, "digits_dense", f"checkpoint.init={source.session.directory}"))
    from swin_moe.run.metrics import LOGGER

    LOGGER.propagate = True
    with caplog.at_level("INFO"):
        trainer.resume()
    assert "initial weights:" in caplog.text and "loaded" in caplog.text
    assert json.loads((source.session.directory / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert replace(trainer.config).checkpoint.init
