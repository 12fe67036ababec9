"""Every kind of weights into every command: it works and computes the same, or ends with one sentence that helps."""

import dataclasses
import importlib
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import checkpoint_tools.weights
from checkpoint_tools.__main__ import main as tools
from checkpoint_tools.formats import open_source
from swin_moe.checkpoint import CheckpointError, load
from swin_moe.checkpoint.manager import CheckpointManager
from swin_moe.checkpoint.pieces import Piece
from swin_moe.config import DataConfig
from swin_moe.config.io import load_config
from swin_moe.data.transforms import EvalTransform
from swin_moe.models import build_model
from swin_moe.parallel.groups import single_process_groups
from swin_moe.run.session import Session, run_main
from swin_moe.train import Trainer
from swin_moe.train import main as train
from swin_moe.weights.load import start_from

DENSE = (
    "model.name=swin model.img_size=32 model.patch_size=4 model.embed_dim=8 model.depths=[1,2] model.num_heads=[1,2] "
    "model.window_size=4 data.images_per_class=1 data.global_batch=10 data.eval_batch=120 data.drop_last=false "
    "optim.epochs=1 optim.warmup_epochs=0 log.tensorboard=false"
).split()
MOE = (
    *DENSE,
    "model.name=swin_moe",
    "model.moe.blocks=[[-1],[1]]",
    "model.moe.num_experts=4",
    "model.moe.group_images=2",
)
CLASSES = [f"digit {n}" for n in range(10)]


class CfgNode(dict):
    """Stands for yacs' class: what torch.load refuses in the files of the official loop."""


class Whole(torch.nn.Linear):
    """A network of somebody's, pickled whole."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Returns a folder with the same two networks, dense and with experts, in files of every kind; and broken ones."""
    root = tmp_path_factory.mktemp("weights")
    for family, options in (("dense", DENSE), ("moe", MOE)):
        config = load_config("digits_dense", options)
        model = build_model(config.model)
        model.init_weights(5)
        with torch.no_grad():
            model.get_parameter("head.weight").normal_(std=1.0)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        pieces = [Piece.of(name, value) for name, value in weights.items()]
        manager = CheckpointManager(root / f"{family}-run" / "checkpoints")
        tree = dataclasses.asdict(config)
        manager.save(3, pieces, state={"classes": CLASSES}, config=json.loads(json.dumps(tree)))
        make_files(root, family, weights)
    make_broken(root)
    return root


def make_files(root: Path, family: str, weights: dict[str, torch.Tensor]) -> None:
    """Writes one network as people have it; formats of others by `checkpoint convert`, tested elsewhere."""

    def convert(to: str, name: str, *more: str) -> None:
        assert tools(["convert", str(root / f"{family}-run"), str(root / name), "--to", to, *more]) == 0

    run, export = str(root / f"{family}-run"), str(root / f"{family}.safetensors")
    assert tools(["export", run, export, "--to", "safetensors"]) == 0
    convert("official", f"{family}-official.pth")
    official = torch.load(root / f"{family}-official.pth", weights_only=True)["model"]
    torch.save(official, root / f"{family}-bare.bin")
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("yacs.config")
        vars(module)["CfgNode"] = CfgNode
        patch.setattr(CfgNode, "__module__", "yacs.config")
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        options = CfgNode(MODEL=CfgNode(TYPE="swin", NAME="x"), TRAIN=CfgNode(EPOCHS=3))
        content = {"model": official, "config": options, "epoch": 2, "max_accuracy": 1.0}
        torch.save(content, root / f"{family}-training.pth")
    lightning = {"state_dict": {f"model.{k}": v for k, v in weights.items()}, "epoch": 3}
    torch.save(lightning, root / f"{family}-lightning.ckpt")
    compiled = {f"module._orig_mod.{k}": v for k, v in weights.items()}
    torch.save({"model_state_dict": compiled}, root / f"{family}-compiled.pth.tar")
    averaged = {"model_ema": weights, "model": {k: v + 1 for k, v in weights.items()}}
    torch.save({"model_ema": weights}, root / f"{family}-averaged.pt")
    torch.save(averaged, root / f"{family}-both.pt")
    save_file({f"backbone.{k}": v.contiguous() for k, v in weights.items()}, root / f"{family}-backbone.bin")
    torch.save(weights, root / f"{family}-old.pth", _use_new_zipfile_serialization=False)
    torch.save({"student": weights}, root / f"{family}-student.pth")
    torch.save({f"student.{k}": v for k, v in weights.items()}, root / f"{family}-prefix.pth")
    headless = {k: v for k, v in weights.items() if not k.startswith("head.")}
    torch.save({"model": headless}, root / f"{family}-headless.pth")
    if family == "moe":
        convert("official-moe", "moe-ranks.pth", "--world", "4")
        convert("tutel", "moe-tutel.pth")
        convert("fairscale", "moe-fairscale.pth")
        more = {
            k: v.repeat(2, *[1] * (v.ndim - 1)) if ".mlp.experts." in k or ".router." in k else v
            for k, v in weights.items()
        }
        torch.save(more, root / "moe-experts.pth")
    else:
        convert("timm", "dense-timm.pth")
        convert("hf", "dense-hf")
    convert("dcp", f"{family}-dcp")


def make_broken(root: Path) -> None:
    """Writes what no command can take."""
    data = (root / "dense-official.pth").read_bytes()
    (root / "cut.pth").write_bytes(data[: len(data) // 2])
    (root / "empty.pth").touch()
    (root / "noise.pth").write_bytes(bytes(range(256)) * 9)
    (root / "text.yaml").write_text("model: {name: swin}\n")
    torch.save(Whole(2, 2), root / "whole.pth")
    torch.save({"fc.weight": torch.ones(2)}, root / "other.pth")
    (root / "photos").mkdir()
    Image.new("RGB", (40, 30), (200, 10, 60)).save(root / "photos" / "x.png")
    cut = (root / "dense.safetensors").read_bytes()
    (root / "cut.safetensors").write_bytes(cut[: len(cut) // 2])


WORKS = (
    "run run/checkpoints/0000000003 .safetensors -official.pth -bare.bin -training.pth -lightning.ckpt "
    "-compiled.pth.tar -averaged.pt -both.pt -backbone.bin -old.pth -dcp"
).split()
PATHS = [
    *(f"{family}-{name}" if name.startswith("run") else family + name for family in ("dense", "moe") for name in WORKS),
    "dense-timm.pth",
    "dense-hf",
    "dense-hf/model.safetensors",
    "moe-ranks.pth",
    "moe-tutel.pth",
    "moe-fairscale.pth",
]
NAMED = ("dense-run", "moe-run", "dense.safetensors", "moe.safetensors", "dense-hf")  # hold the names of classes
# What every command says of a path; a directory of one that is read by its parts is named.
REFUSED = {
    "nowhere.pth": "nowhere.pth: does not exist",
    "cut.pth": "cut.pth: is cut off",
    "cut.safetensors": "cut.safetensors: .*(end behind the file|no safetensors file)",
    "empty.pth": "empty.pth: is empty",
    "noise.pth": "noise.pth: is neither a file of torch.save nor a safetensors file",
    "text.yaml": "text.yaml: is neither a file of torch.save nor a safetensors file",
    "whole.pth": "whole.pth: its pickle asks for the global .*Whole, which is refused.*save its state_dict",
    "other.pth": r"other.pth: its 1 tensors \(fc.weight, ...\) are no Swin network's",
    "photos": "photos: is no checkpoint of a known format",
    "photos/x.png": "x.png: is neither a file of torch.save nor a safetensors file",
    "moe-ranks.pth.rank0": "rank0: is one of several rank files; give their path without .rank0",
    "dense-student.pth": "student.pth: holds tensors under the key 'student'; known are model, ",
    "dense-prefix.pth": "prefix.pth: its tensors have the prefix 'student.'; known are module.",
    "dense-run/checkpoints/0000000003/shard-00000.safetensors": "is one file of a checkpoint; give its directory",
    "dense-run/checkpoints/0000000003/index.json": "is one file of a checkpoint; give its directory",
}


def options_of(path: str, root: Path) -> list[str]:
    return [*(MOE if path.startswith("moe") else DENSE), f"run.output={root / 'out'}"]


def perform(command: str, path: str, root: Path, capfd: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    """Returns (exit code, output, errors) of a command with checkpoint.load=path, run in this process."""
    arguments = ["digits_dense", *options_of(path, root), f"checkpoint.load={root / path}", *words]
    capfd.readouterr()
    try:
        run_main(importlib.import_module(f"swin_moe.{command}").main, arguments)
        code = 0
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        code = stop.code
    return code, *capfd.readouterr()


def begin(path: str, root: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Returns (the weights of a new run that begins from a path, the report)."""
    config = load_config("digits_dense", options_of(path, root))
    trainer = Trainer(Session(config, single_process_groups(), torch.device("cpu")))
    report = start_from(str(root / path), trainer.engine, trainer.session)
    return {name: p.detach().clone() for name, p in trainer.engine.local_model.named_parameters()}, report


@pytest.fixture(scope="module")
def wanted(files) -> dict[str, dict[str, torch.Tensor]]:
    return {family: begin(f"{family}-run", files)[0] for family in ("dense", "moe")}


@pytest.fixture(scope="module")
def predicted(files) -> dict[str, list[dict]]:
    """Returns what the networks answer to the photo, computed here."""
    image = EvalTransform(DataConfig(), (32, 32))(Image.open(files / "photos" / "x.png"))
    found = {}
    for family, options in (("dense", DENSE), ("moe", MOE)):
        model = build_model(load_config("digits_dense", options).model).eval()
        pieces = [Piece.of(name, p.detach()) for name, p in model.named_parameters()]
        load(files / f"{family}-run" / "checkpoints" / "0000000003", pieces)
        with torch.no_grad():
            output = model(image[None])
        logits = output[0] if isinstance(output, tuple) else output
        best = logits.softmax(1)[0].topk(5)
        found[family] = [{"name": CLASSES[i], "probability": p} for p, i in zip(*(x.tolist() for x in best))]
    return found


@pytest.mark.parametrize("path", PATHS)
def test_every_kind_of_weights_begins_a_run_and_predicts(path, files, wanted, predicted, capfd):
    family = path.partition("-")[0].partition(".")[0]
    found, report = begin(path, files)
    assert all(torch.equal(found[name], value) for name, value in wanted[family].items())
    assert "reinitialized" not in report and "was trained" not in report
    code, out, error = perform("predict", path, files, capfd, "--json", str(files / "photos"))
    assert code == 0, error
    answer = json.loads(out)["classes"]
    expected = predicted[family]
    assert [one["probability"] for one in answer] == [one["probability"] for one in expected]
    assert [one["name"].removeprefix("digit ") for one in answer] == [one["name"][6:] for one in expected]
    assert answer[0]["name"].startswith("digit ") == path.startswith(NAMED)


@pytest.mark.parametrize("path", PATHS)
def test_every_verb_takes_every_kind_of_weights(path, files, tmp_path, capfd):
    family = path.partition("-")[0].partition(".")[0]
    for words in (["inspect"], ["verify"], ["diff", str(files / f"{family}-run")]):
        code = tools([words[0], str(files / path), *words[1:]])
        assert code in ((0, 1) if words[0] == "diff" else (0,)), capfd.readouterr().err
    assert tools(["convert", str(files / path), str(tmp_path / "native"), "--to", "native"]) == 0
    assert tools(["export", str(files / path), str(tmp_path / "x.safetensors"), "--to", "safetensors"]) == 0


def sentence(error: str) -> str:
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_refused_is_refused_alike(path, files, tmp_path, capfd):
    for command, words in (("predict", [str(files / "photos")]), ("evaluate", []), ("evaluate_features", [])):
        code, _, error = perform(command, path, files, capfd, *words)
        assert code == 2
        assert_said(sentence(error), REFUSED[path], "checkpoint.load=")
    with pytest.raises(CheckpointError) as refused:
        begin(path, files)
    assert_said(str(refused.value), REFUSED[path], "checkpoint.init=")
    for words in (["inspect"], ["verify"], ["convert", "--to", "native"], ["export", "--to", "safetensors"], ["diff"]):
        target = {"inspect": [], "verify": [], "diff": [str(files / "dense-run")]}.get(words[0], [str(tmp_path / "x")])
        assert tools([words[0], str(files / path), *target, *words[1:]]) == 2
        assert_said(sentence(capfd.readouterr().err), REFUSED[path], "")


def assert_said(text: str, said: str, key: str) -> None:
    assert re.search(said, text) and key in text and len(text) < 500, text
    assert not key or "--from" not in text, text


def test_a_run_goes_on_from_checkpoints_only_and_says_what_else_there_is(files, capfd):
    for path in ("dense-training.pth", "dense.safetensors", "moe-ranks.pth"):
        code, _, error = perform("train", path, files, capfd, "run.name=new")
        said = sentence(error)
        assert code == 2 and f"checkpoint.load={files / path}: is a file" in said, said
        assert f"`swin-moe checkpoint convert {files / path} DIR --to native`" in said and "checkpoint.init=" in said


def test_weights_that_do_not_fit_say_what_does(files, capfd):
    code, _, error = perform("evaluate", "moe-experts.pth", files, capfd)
    assert code == 2 and "`swin-moe checkpoint experts` makes another number of experts" in sentence(error)
    for path in ("dense-official.pth", "dense-timm.pth", "dense.safetensors"):
        code, _, error = perform("predict", path, files, capfd, "model.num_classes=7", str(files / "photos"))
        assert code == 2 and "head: 10 classes in the file, 7 in the model; set model.num_classes=10" in sentence(error)
    code, _, error = perform("evaluate", "dense-headless.pth", files, capfd)
    assert code == 2 and "head.bias: missing in the file" in sentence(error)
    assert "reinitialized 2 (head.weight, head.bias)" in begin("dense-headless.pth", files)[1]


def test_what_was_taken_off_is_told(files):
    told = {
        "dense-lightning.ckpt": "note: read without the key 'state_dict' and the prefix 'model.'",
        "dense-compiled.pth.tar": "the key 'model_state_dict' and the prefix '_orig_mod.' and the prefix 'module.'",
        "dense-averaged.pt": "note: read without the key 'model_ema'",
        "dense-both.pt": "note: read with the averages under 'model_ema'",
        "dense-backbone.bin": "note: read without the prefix 'backbone.'",
    }
    for path, text in told.items():
        assert text in begin(path, files)[1]
    assert "note" not in begin("dense-official.pth", files)[1]


def test_prediction_turns_images_as_training_does(files, tmp_path, capfd):
    """A picture on its side with its orientation in EXIF is the upright one with data.exif, and only then."""
    upright = Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 20).convert("RGB")
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the scene's top is the stored picture's left side
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    answers = {}
    for name, option in (("upright", "false"), ("turned", "false"), ("turned", "true")):
        words = ("--json", f"data.exif={option}", str(tmp_path / f"{name}.png"))
        code, out, _ = perform("predict", "dense-run", files, capfd, *words)
        assert code == 0
        answers[name, option] = json.loads(out)["classes"]
    assert answers["turned", "true"] == answers["upright", "false"] != answers["turned", "false"]


@pytest.mark.parametrize("command", ["evaluate", "predict", "inspect_routing"])
def test_a_command_opens_a_checkpoint_once(command, files, tmp_path, monkeypatch, capfd):
    opened = []
    monkeypatch.setattr(
        checkpoint_tools.weights, "open_source", lambda path, *a: opened.append(path) or open_source(path, *a)
    )
    words = {"predict": [str(files / "photos")], "inspect_routing": ["--images", "2", "--out", str(tmp_path)]}
    code, _, error = perform(command, "moe-training.pth", files, capfd, *words.get(command, []))
    assert code == 0 and len(opened) == 1, error


def test_what_training_begins_with_is_looked_at_before_a_network_is_built(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("swin_moe.train.Trainer", None)  # whoever comes so far is too late
    teacher = ("task.name=distill", "task.distill.teacher_model=swin_tiny_patch4_window7_224")
    for words, sentence in (
        (["checkpoint.init=nowhere.pth"], "checkpoint.init=nowhere.pth: does not exist"),
        (["checkpoint.load=nowhere"], "checkpoint.load=nowhere: is neither a checkpoint"),
        ([*teacher, "task.distill.teacher=nowhere.pth"], "task.distill.teacher=nowhere.pth: does not exist"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_main(train, ["digits_dense", *DENSE, f"run.output={tmp_path}", "run.name=early", *words])
        error = capfd.readouterr().err
        assert ended.value.code == 2 and sentence in error, error
