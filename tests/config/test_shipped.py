"""`swin-moe configs` and `swin-moe show`: what is listed is what the networks and files are."""

import json

import pytest
import torch

from swin_moe.config.io import config_files, config_folder, find_config, load_config
from swin_moe.config.shipped import listing, show
from swin_moe.models import build_model
from swin_moe.tasks.base import build_task

RUNS = [path for path in config_files() if path.parent != config_folder()]


def network_of(path):
    """Returns the network that is counted: of detectors and segmentors the whole one, else without the task's part."""
    config = load_config(path)
    task = build_task(config)
    with torch.device("meta"):
        return task.build_network() if task.needs_boxes or task.needs_label_maps else build_model(config.model)


def test_counts_are_those_of_the_networks():
    counted, expected = listing._counts(), {}
    for path in RUNS:
        model = network_of(path)
        expected[path.stem] = (sum(p.numel() for p in model.parameters()), float(f"{model.flops():.0f}"))
    rows = [f"{name}\t{n}\t{flops:.0f}" for name, (n, flops) in expected.items() if counted.get(name) != (n, flops)]
    assert not rows, "rows of configs/counts.tsv have to be:\n" + "\n".join(rows)
    assert counted.keys() == expected.keys()


def test_the_list_tells_size_accuracy_and_weights(capsys):
    listing.run(["swin_tiny_patch4"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["parameters", "GMACs", "image", "acc@1", "weights"]
    assert "swin_tiny_patch4_window7_224 28.3 M 4.49 224 81.2 yes".split() in [line.split() for line in lines]
    listing.run(["simmim_finetune__swinv2_huge"])
    assert "658 M 118 224 - 12 files".split() == capsys.readouterr().out.split()[-7:]
    listing.run(["window12_384_22kto1k", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["weights"] == ["swin_base_patch4_window12_384_22kto1k"] and rows[0]["top1"] == 86.4
    for words, said in ((["resnet"], "no shipped config has 'resnet'"), (["--jsn"], "did you mean --json?")):
        with pytest.raises(SystemExit) as ended:
            listing.run(words)
        assert ended.value.code == 2
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_every_value_tells_where_it_comes_from(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {lr: 1.0, epochs: 5, warmup_epochs: 1}\ndata: {name: synthetic}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\noptim: {epochs: 7}\n")
    rows = {key: (value, origin) for key, value, origin in show.resolved(tmp_path / "mine.yaml", ["optim.clip_norm=2"])}
    assert rows["optim.lr"] == (1.0, str(tmp_path / "base.yaml"))
    assert rows["optim.epochs"] == (7.0, str(tmp_path / "mine.yaml"))
    assert rows["optim.clip_norm"] == (2.0, "command line")
    assert rows["optim.betas"] == ((0.9, 0.999), "default")
    assert rows["run.name"] == ("mine", "name of the file")


@pytest.mark.parametrize("name", ["digits_swin_moe", "swinv2_base_patch4_window16_256", "digits_simmim"])
def test_what_is_shown_is_a_config_that_reads_back_equal(name, tmp_path, capsys):
    for words in ([name, "optim.lr=0.5"], [name, "optim.lr=0.5", "--changed"]):
        assert show.main(words) == 0
        (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
        assert load_config(tmp_path / "shown.yaml") == load_config(name, ["optim.lr=0.5"])


def test_official_files_are_shown_as_ours(capsys):
    path = find_config("swin_tiny_patch4_window7_224").parents[2] / "tests/golden/official_configs"
    file = next(iter(sorted(path.glob("*.yaml"))))
    assert show.main([str(file), "--section", "model", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model.embed_dim"]["value"] == load_config(file).model.embed_dim
    assert all(key.startswith("model.") for key in shown)


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere"], "no config file or config name 'nowhere'"),
        (["digits_swin_moe", "optim.learning_rate=1"], "did you mean optim.lr"),
        (["digits_swin_moe", "--section", "opt"], "no option below 'opt'; sections: run, data"),
        ([], "required: CONFIG"),
    ],
)
def test_wrong_words_are_one_sentence(words, said, capsys):
    assert show.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
