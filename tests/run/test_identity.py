"""What a run is, is checked when it is continued: classes, data, seed, network; and class names follow a checkpoint."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from swin_moe import train
from swin_moe.checkpoint import Index
from swin_moe.config import Config, DataConfig, ModelConfig, MoEConfig
from swin_moe.config.io import load_config
from swin_moe.data.datasets import build_dataset
from swin_moe.data.sets.listing import Relabeled, listing_digest
from swin_moe.run.identity import RunIdentity, place_in_data
from swin_moe.run.session import run_main
from tests.ranks import run_ranks
from tests.training.test_commands import QUICK, checkpoints, perform, refused

CLASSES = ("cat", "dog", "emu", "fox")
OPTIONS = (
    "model.num_classes=4 data.name=folder data.global_batch=8 data.eval_batch=4 data.auto_augment= "
    "data.color_jitter=0 data.erase_prob=0 optim.epochs=1 optim.warmup_epochs=0 data.workers=0"
).split()


def write_photos(root, counts=(6, 2), classes=CLASSES):
    for split, count in zip(("train", "val"), counts):
        for shade, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((16, 16, 3), 60 * shade + number, np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder of a run of 3 steps on four classes, and its data."""
    root = tmp_path_factory.mktemp("trained")
    data = write_photos(root / "photos")
    run_main(train.main, ["digits_swin_moe", *QUICK, *OPTIONS, f"data.path={data}", f"run.output={root}"])
    return root


@pytest.fixture
def run(trained, tmp_path):
    """Returns a copy of the run and its data, to be changed."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def options(run, *more):
    return [*OPTIONS, f"data.path={run / 'photos'}", *more]


def test_a_checkpoint_holds_classes_data_and_seed(run):
    (step,) = checkpoints(run)
    state = Index.read(run / "run" / "checkpoints" / step).state
    assert state["classes"] == list(CLASSES) and state["seed"] == 0
    assert state["data_digest"].keys() == {"train", "val"}


def test_the_same_run_continues_without_a_word(run, capfd):
    out = perform("train", run, capfd, *options(run, "optim.epochs=1"))
    assert "already finished" in out and "changed options" not in out


def test_a_checkpoint_with_the_options_of_tasks_beside_the_name_is_of_the_same_run(run):
    index = Index.read(run / "run" / "checkpoints" / checkpoints(run)[-1])
    config = load_config(run / "run" / "config.yaml")
    train_data, val_data = (build_dataset(config.data, split, img_size=(16, 16)) for split in ("train", "val"))
    identity = RunIdentity.of(config, train_data, val_data)
    task = {"name": "classify"}
    for section in ("classify", "simmim", "distill", "moby"):
        task |= index.config["task"][section]
    old = dataclasses.replace(index, config={**index.config, "task": task})
    assert identity.check_resume(old) == identity.check_resume(index) == []
    task["mixup"] = 0.625
    assert identity.check_resume(old) == [f"task.classify.mixup: 0.625 -> {config.task.classify.mixup}"]


def test_what_changes_the_course_is_said_in_one_line(run, capfd):
    out = perform("train", run, capfd, *options(run, "optim.epochs=2", "optim.lr=0.01", "engine.precision=bf16"))
    (line,) = [line for line in out.splitlines() if "resumed with changed options" in line]
    for text in ("optim.epochs: 1.0 -> 2.0", "optim.lr: ", "engine.precision: fp32 -> bf16"):
        assert text in line
    assert "model" not in line and "run." not in line


@pytest.mark.parametrize(
    "saved, old, new, drop_last, step, again",
    [
        (3, 8, 8, True, 3, 0),
        (3, 8, 4, True, 6, 0),
        (2, 8, 12, True, 1, 4),
        (5, 8, 4, True, 10, 0),
        (2, 8, 16, True, 1, 0),
        (2, 10, 4, True, 6, 0),  # 24 images are two batches of ten: the second epoch begins, for both
        (2, 10, 4, False, 5, 0),  # and three with the last four
        (3, 10, 8, False, 3, 0),
        (4, 4, 10, False, 1, 6),
    ],
)
def test_another_batch_begins_at_the_same_image(saved, old, new, drop_last, step, again, caplog):
    progress = {"step": saved, "samples": saved * old, "best": 0.5, "skipped": 0, "global_batch": old}
    config = Config(data=DataConfig(global_batch=new, drop_last=drop_last))
    config_then = {"data": {"drop_last": drop_last}}
    index = Index(saved, 1, {}, {}, {"progress": progress}, config_then)
    with caplog.at_level("INFO"):
        found = place_in_data(index, config, images=24, own=False)
    assert (found.step, found.samples, found.best) == (step, saved * old, 0.5)
    assert (f"; {again} images are seen again" in caplog.text) is bool(again)
    if old != new:
        with pytest.raises(ValueError, match=f"data.global_batch={new}, but this run's checkpoint of step {saved} was"):
            place_in_data(index, config, images=24, own=True)


def test_a_new_run_continues_another_with_another_batch(run, capfd):
    larger = options(run, "data.global_batch=4", "optim.epochs=2")
    refusal = refused("train", run, capfd, *larger)
    assert "was trained with 8; a run keeps its batch" in refusal and "checkpoint.load=" in refusal
    out = perform("train", run, capfd, *larger, "run.name=larger", f"checkpoint.load={run / 'run'}", "log.every=1")
    assert "the checkpoint's step 3 of 8 images is step 6 of 4 images" in out and "resumed from step 6" in out
    assert "data.global_batch: 8 -> 4" in out and "finished: step 12 of 12" in out
    records = [json.loads(line) for line in (run / "larger" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/loss" in r] == list(range(7, 13))


def test_a_folder_that_is_not_to_be_continued_is_refused(run, capfd):
    before = checkpoints(run)
    sentence = refused("train", run, capfd, *options(run, "checkpoint.resume=never", "optim.epochs=2"))
    assert "checkpoint.resume=never, but" in sentence and before[-1] in sentence and checkpoints(run) == before
    assert "finished" in perform("train", run, capfd, *options(run, "checkpoint.resume=never", "run.name=other"))


def test_what_was_loaded_is_evaluated_before_the_first_step_and_counts_not_as_best(run, capfd):
    more = ("log.eval_first=true", "optim.epochs=2", "run.name=more", f"checkpoint.load={run / 'run'}")
    out = perform("train", run, capfd, *options(run, *more))
    wanted = accuracy(perform("evaluate", run, capfd, *options(run)))
    line = next(line for line in out.splitlines() if "evaluation before the first step (epoch 1.0): " in line)
    numbers = [re.findall(r"[\d.]+", text) for text in (accuracy(line), wanted)]
    assert [float(n) for n in numbers[0]] == pytest.approx([float(n) for n in numbers[1]], rel=1e-3)
    assert "best" not in line
    assert "before the first step" not in perform("train", run, capfd, *options(run, "optim.epochs=2"))


def test_checkpoints_come_by_epochs(run, capfd):
    perform(
        "train",
        run,
        capfd,
        *options(
            run,
            "optim.epochs=6",
            "checkpoint.every=0",
            "checkpoint.every_epochs=2",
            "checkpoint.keep=0",
            "log.eval_every=0",
        ),
    )
    assert [int(name) for name in checkpoints(run)] == [3, 6, 12, 18]  # 3: from before


def rename_class(run):
    for split in ("train", "val"):
        (run / "photos" / split / "cat").rename(run / "photos" / split / "zcat")


def remove_image(run):
    (run / "photos" / "train" / "dog" / "5.png").unlink()


def rename_image(run):
    (run / "photos" / "train" / "dog" / "5.png").rename(run / "photos" / "train" / "dog" / "6.png")


@pytest.mark.parametrize(
    "change, more, sentence",
    [
        (rename_class, [], "classes: without 'cat', new 'zcat'"),
        (remove_image, [], "data: other images"),
        (rename_image, [], "data: other images"),
        (None, ["run.seed=1"], "run.seed: 0 -> 1"),
        (None, ["model.moe.top_k=2"], "model.moe.top_k: 1 -> 2"),
        (None, ["model.qk_scale=0.5"], "model.qk_scale: null -> 0.5"),
    ],
)
def test_what_changes_the_meaning_is_refused(run, capfd, change, more, sentence):
    before = (run / "run" / "config.yaml").read_bytes()
    if change:
        change(run)
    error = refused("train", run, capfd, *options(run, "optim.epochs=2", *more))
    assert sentence in error and "checkpoint.accept_changes" in error and "run.name" in error
    assert (run / "run" / "config.yaml").read_bytes() == before
    out = perform("train", run, capfd, *options(run, "optim.epochs=2", "checkpoint.accept_changes=true", *more))
    assert sentence in out.split("resumed with changed options: ")[1].splitlines()[0]


@pytest.mark.parametrize(
    "change, said",
    [
        (["model.moe.num_experts=8"], "model.moe.num_experts: 4 -> 8"),
        (["model.num_classes=5"], "model.num_classes: 4 -> 5"),
        (["model.embed_dim=16"], "model.embed_dim: 8 -> 16"),
        (["model.moe.router=cosine"], "model.moe.router: linear -> cosine"),
    ],
)
def test_another_network_is_refused_by_its_option_and_not_by_a_tensor(run, capfd, change, said):
    error = refused("train", run, capfd, *options(run, *change, "optim.epochs=2"))
    assert said in error and "shape" not in error


def test_a_refused_resume_leaves_the_runs_config(run, capfd):
    before = (run / "run" / "config.yaml").read_bytes()
    refused("train", run, capfd, *options(run, "model.embed_dim=16", "optim.epochs=2"))
    assert (run / "run" / "config.yaml").read_bytes() == before


def test_predict_needs_no_data_and_names_the_checkpoints_classes(run, capfd, tmp_path):
    photos, image = run / "photos", tmp_path / "an image.png"
    shutil.copy(photos / "val" / "emu" / "0.png", image)
    first = perform("predict", run, capfd, *options(run), str(image))
    rename_class(run)
    assert perform("predict", run, capfd, *options(run), str(image)) == first
    shutil.rmtree(photos)
    assert perform("predict", run, capfd, *options(run), str(image)) == first
    assert all(name in first for name in CLASSES)
    lines = perform("predict", run, capfd, *options(run), "--json", "--top", "2", str(tmp_path)).splitlines()
    told = [json.loads(line) for line in lines if "an image" in line]
    assert [len(row["classes"]) for row in told] == [2] and told[0]["classes"][0]["name"] in CLASSES
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    assert "has 3 names" in refused("predict", run, capfd, *options(run), "--names", str(names), str(image))
    assert "--tpo" in refused("predict", run, capfd, *options(run), "--tpo", "1", str(image))


def accuracy(out):
    return out.split("loss ")[1].splitlines()[0]


def test_evaluation_goes_by_class_names(run, capfd):
    whole = accuracy(perform("evaluate", run, capfd, *options(run)))
    for name in CLASSES[1:]:  # only the first class is left, without a train folder that numbers it
        shutil.rmtree(run / "photos" / "val" / name)
    shutil.rmtree(run / "photos" / "train")
    only_cats = perform("evaluate", run, capfd, *options(run))
    (run / "photos" / "val" / "cat").rename(run / "photos" / "val" / "fox")
    assert accuracy(only_cats) != accuracy(perform("evaluate", run, capfd, *options(run)))
    (run / "photos" / "val" / "fox").rename(run / "photos" / "val" / "gnu")
    assert "class 'gnu'" in refused("evaluate", run, capfd, *options(run))
    assert whole


def test_labels_follow_names(tmp_path):
    config = DataConfig(name="folder", path=str(write_photos(tmp_path, classes=("dog", "fox"))))
    found = Relabeled(build_dataset(config, "val", img_size=(8, 8)), CLASSES)
    assert found.labels().tolist() == [1, 1, 3, 3] and found.sample(2)[1] == 3 and found.num_classes == 4


def test_the_digest_is_of_names_labels_and_classes(tmp_path):
    def digest(path):
        return listing_digest(build_dataset(DataConfig(name="folder", path=str(path)), "train", img_size=(8, 8)))

    write_photos(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "other" / "place")
    assert digest(tmp_path / "a") == digest(tmp_path / "other" / "place")
    (tmp_path / "a" / "train" / "cat" / "5.png").rename(tmp_path / "a" / "train" / "dog" / "6.png")
    assert digest(tmp_path / "a") != digest(tmp_path / "other" / "place")


def test_many_outputs_without_a_class_are_told(tmp_path, caplog):
    path = write_photos(tmp_path)
    config = load_config("digits_swin_moe", ["data.name=folder", f"data.path={path}", "model.num_classes=1000"])
    train = build_dataset(config.data, "train", img_size=(8, 8))
    RunIdentity.of(config, train, build_dataset(config.data, "val", img_size=(8, 8)))
    assert "model.num_classes=1000" in caplog.text and "has 4 classes" in caplog.text


def compare(folder, swap):

    path = f"{folder}/{dist.get_rank() if swap else 0}"
    config = load_config("digits_swin_moe", ["data.name=folder", f"data.path={path}", "model.num_classes=4"])
    sets = [build_dataset(config.data, split, img_size=(8, 8)) for split in ("train", "val")]
    try:
        RunIdentity.of(config, *sets).compare_ranks(None)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_see_other_data_are_told(tmp_path):
    write_photos(tmp_path / "0")
    write_photos(tmp_path / "1", counts=(5, 2))
    assert run_ranks(compare, 2, tmp_path, str(tmp_path), False) == ["", ""]
    for error in run_ranks(compare, 2, tmp_path, str(tmp_path), True):
        assert "rank 1 sees other train data than rank 0" in error


def test_a_start_epoch_is_the_rest_of_a_whole_run(run, capfd):
    """SGD without momentum keeps nothing between steps, so weights and position are all that a run continues from."""
    sgd = ["optim.epochs=2", "optim.warmup_epochs=1", "optim.name=sgd", "optim.momentum=0", "optim.ema=0"]
    perform("train", run, capfd, *options(run, *sgd, "run.name=whole", "checkpoint.every=3"))
    half = f"checkpoint.init={run / 'whole' / 'checkpoints' / '0000000003'}"
    out = perform("train", run, capfd, *options(run, *sgd, "run.name=rest", "optim.start_epoch=1", half))
    assert "begins at epoch 1 (optim.start_epoch), step 3" in out and "finished: step 6 of 6" in out
    whole, rest = (
        [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "rest")
    )
    kept = [
        [(r["step"], r["train/loss"], r["train/lr"]) for r in rows if r["step"] > 3 and "train/loss" in r]
        for rows in (whole, rest)
    ]
    assert kept[0] == kept[1] and [step for step, *_ in kept[1]] == [4, 5, 6]
    last = [Index.read(run / name / "checkpoints" / "0000000006").state["progress"] for name in ("whole", "rest")]
    assert last[0]["samples"] == last[1]["samples"] == 48


def changes(path, old: ModelConfig, new: ModelConfig) -> list[str]:
    """Returns what is said of a run with a network that continues a checkpoint of another."""
    index = SimpleNamespace(path=path, state={}, config=dataclasses.asdict(Config(model=old)))
    return RunIdentity(Config(model=new), (), {}).check_resume(cast(Index, index))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"name": "swin"}, {"moe": MoEConfig(blocks=((), (-1,)), num_experts=4, top_k=2)}),
        ({"name": "swin"}, {"pretrained_window_sizes": (7, 7)}),
        ({"name": "swin_mlp"}, {"pretrained_window_sizes": (0, 0), "qk_scale": 0.5}),
        ({"name": "swinv2"}, {"pretrained_window_sizes": (0, 0), "qk_scale": 0.5}),
    ],
)
def test_options_without_an_effect_are_not_compared(tmp_path, old, new):
    assert changes(tmp_path, ModelConfig(**old), ModelConfig(**old | new)) == []


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("canvas_mask_rcnn", "task.detect.anchor_scale=9.0"),
        ("canvas_mask_rcnn", "task.detect.finest_scale=28.0"),
        ("canvas_mask_rcnn", "task.detect.stage_stds=[[0.2,0.2,0.2,0.2]]"),
        ("canvas_reppoints", "task.detect.point_scale=2.0"),
        ("canvas_soft_teacher", "task.detect.anchor_ratios=[1.0,2.0,3.0]"),
        ("canvas_upernet", "task.segment.pool_scales=[1,2]"),
    ],
)
def test_what_the_weights_of_a_dense_head_mean_is_compared(name, option, tmp_path):
    def continued(*more: str) -> list[str]:
        stored = dataclasses.asdict(load_config(name))
        index = SimpleNamespace(path=tmp_path, state={}, config=stored)
        return RunIdentity(load_config(name, [*more]), (), {}).check_resume(cast(Index, index))

    with pytest.raises(ValueError, match=rf"cannot be continued.*{option.partition('=')[0]}: "):
        continued(option)
    assert continued(option, "checkpoint.accept_changes=true")[0].startswith(f"{option.partition('=')[0]}: ")
    section = option.partition("=")[0].rpartition(".")[0]
    assert [said.partition(": ")[0] for said in continued(f"{section}.scales=[1.0,2.0]")] == [f"{section}.scales"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"name": "swin"}, {"moe": MoEConfig(blocks=((0,),))}, r"model\.moe\.blocks: \[\] -> \[\[0\]\]"),
        ({"name": "swin_moe", "moe": MoEConfig(blocks=((0,),))}, {"moe": MoEConfig(blocks=((0,),), top_k=2)}, "top_k"),
        ({"name": "swinv2"}, {"pretrained_window_sizes": (8, 8, 8, 8)}, "pretrained_window_sizes"),
        ({"name": "swin_moe"}, {"qk_scale": 0.5}, "qk_scale"),
        ({"name": "swin"}, {"name": "swinv2"}, "model.name"),
    ],
)
def test_options_with_an_effect_are_compared(tmp_path, old, new, said):
    with pytest.raises(ValueError, match=said):
        changes(tmp_path, ModelConfig(**old), ModelConfig(**old | new))
