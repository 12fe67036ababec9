"""Files as people have them: any name, any wrapper, known prefixes; and one sentence that helps for what is refused."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.__main__ import main
from checkpoint_tools.formats import find_format
from checkpoint_tools.verbs import text
from swin_moe import create_model, load_official
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.manager import CheckpointManager, find_checkpoint, load
from swin_moe.checkpoint.pieces import Piece
from tests.checkpoint_tools.formats.official_files import convert, tensors_of

SMALL = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 3}
SIZES = {"img_size": "32", "window_size": "4"}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: p.detach().clone() for name, p in create_model("swin", **SMALL).named_parameters()}


@pytest.fixture
def run(capsys):
    """Runs a verb; returns (exit code, output, errors)."""

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


FILES = {
    "plain": ("x.pth", lambda w: w, ""),
    "official": ("x.pth", lambda w: {"model": w}, ""),
    "tar": ("x.pth.tar", lambda w: {"state_dict": w, "epoch": 3, "arch": "swin"}, "the key 'state_dict'"),
    "lightning": (
        "x.ckpt",
        lambda w: {"state_dict": prefixed(w, "model."), "epoch": 3},
        "the key 'state_dict' and the prefix 'model.'",
    ),
    "bin": ("x.bin", lambda w: w, ""),
    "no ending": ("weights", lambda w: {"model_state_dict": w}, "the key 'model_state_dict'"),
    "ddp": ("x.pth", lambda w: {"model": prefixed(w, "module.")}, "the prefix 'module.'"),
    "compiled": ("x.pth", lambda w: prefixed(w, "_orig_mod."), "the prefix '_orig_mod.'"),
    "compiled inside": (
        "x.pth",
        lambda w: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in w.items()},
        "the prefix '_orig_mod.'",
    ),
    "ddp of compiled": (
        "x.pth",
        lambda w: prefixed(w, "module._orig_mod."),
        "the prefix '_orig_mod.' and the prefix 'module.'",
    ),
    "backbone and head": (
        "x.pth",
        lambda w: {("" if k.startswith("head") else "backbone.") + k: v for k, v in w.items()},
        "the prefix 'backbone.'",
    ),
    "averaged": ("x.pth", lambda w: prefixed(w, "module.") | {"n_averaged": torch.tensor(3)}, "the prefix 'module.'"),
}


@pytest.mark.parametrize("case", FILES)
def test_known_wrappers_are_taken_off_and_told(case, weights, tmp_path, run):
    name, wrap, told = FILES[case]
    torch.save(wrap(weights), tmp_path / name)
    said = []
    native = convert(tmp_path / name, tmp_path / "native", extra=SIZES, report=said.append)
    assert {n: t.tolist() for n, t in tensors_of(native).items()} == {n: t.tolist() for n, t in weights.items()}
    assert [text for text in said if "read without" in text] == [f"{tmp_path / name}: read without {told}"] * bool(told)
    assert run("inspect", tmp_path / name)[0] == 0 and run("verify", tmp_path / name)[0] == 0


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pth"])
def test_safetensors_are_known_by_their_content(name, weights, tmp_path):
    save_file({k: v.contiguous() for k, v in prefixed(weights, "module.").items()}, tmp_path / name)
    assert find_format(tmp_path / name) == "official"
    native = convert(tmp_path / name, tmp_path / "native")
    assert torch.equal(tensors_of(native)["head.weight"], weights["head.weight"])


@pytest.mark.parametrize("moe", [False, True])
def test_our_own_export_is_read_back(moe, tmp_path, run):
    """The same network, config and class names: what an index holds of a network outlives the way over one file."""
    options = {"num_experts": 4, "moe_blocks": ((-1,), (1,)), "top_k": 2} if moe else {}
    model = create_model("swin_moe" if moe else "swinv2", **SMALL, **options)
    pieces = [Piece.of(name, p.detach()) for name, p in model.named_parameters()]
    network = {"name": "swin_moe" if moe else "swinv2", "img_size": [32, 32], "window_size": 4, "drop_path_rate": 0.3}
    network |= {"moe": {"top_k": 2}} if moe else {}
    manager = CheckpointManager(tmp_path / "run")
    path = manager.save(7, pieces, state={"classes": ["a", "b", "c"]}, config={"model": network})
    exported = tmp_path / "x.safetensors"
    assert run("export", path, exported, "--to", "safetensors")[0] == 0
    assert find_format(exported) == "safetensors"
    code, out, _ = run("inspect", exported, "--json")
    content = json.loads(out)
    assert code == 0 and content["step"] == 7 and content["state"] == {"classes": ["a", "b", "c"]}
    assert run("verify", exported)[0] == 0 and run("diff", exported, exported)[0] == 0
    assert run("convert", exported, tmp_path / "back", "--to", "native")[0] == 0
    stored = Index.read(tmp_path / "back")
    assert stored.config["model"]["drop_path_rate"] == 0.3 and stored.config["model"]["window_size"] == 4
    assert stored.config["model"].get("moe", {}).get("top_k") == (2 if moe else None)
    wanted = [Piece.of(name, torch.empty_like(p)) for name, p in model.named_parameters()]
    load(tmp_path / "back", wanted, exact=True)
    assert all(torch.equal(piece.tensor, p.detach()) for piece, p in zip(wanted, model.parameters()))


def test_official_moby_files_give_their_encoder(weights, tmp_path, run):
    encoder = {name: value for name, value in weights.items() if not name.startswith("head.")}
    other = {name: value + 1 for name, value in encoder.items()}
    heads = {f"{head}.linear_hidden.1.weight": torch.ones(4, 4) for head in ("projector", "projector_k", "predictor")}
    queue = {"queue1": torch.ones(2, 4), "queue2": torch.ones(2, 4), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    content = prefixed(encoder, "encoder.") | prefixed(other, "encoder_k.") | heads | queue
    torch.save({"model": prefixed(content, "module."), "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "m")
    code, out, _ = run("convert", tmp_path / "m", tmp_path / "native", "--to", "native")
    assert code == 0 and "a file of MoBY: its momentum network, heads, queue and optimizer are left out" in out
    found = tensors_of(tmp_path / "native")
    assert found.keys() == encoder.keys() and all(torch.equal(found[n], value) for n, value in encoder.items())
    code, _, error = run("convert", tmp_path / "m", tmp_path / "n2", "--to", "native", "--set", "encoder=keep")
    assert code == 2 and "only the encoder is read" in error


class Whole(torch.nn.Linear):
    """A network of somebody's, pickled whole."""


def test_what_is_refused_says_what_helps(weights, tmp_path, run):
    def refusal(name, content):
        torch.save(content, tmp_path / name)
        code, _, error = run("inspect", tmp_path / name)
        assert code == 2 and error.count("\n") == 1, error
        return error

    assert "have the prefix 'student.net2.'; known are module." in refusal("a", prefixed(weights, "student.net2."))
    assert "holds tensors under the key 'generator'; known are model," in refusal("b", {"generator": weights})
    whole = refusal("c", Whole(2, 2))
    assert "test_files_as_they_come.Whole, which is refused" in whole and "save its state_dict()" in whole
    twice = prefixed(weights, "module.") | {"head.bias": torch.ones(3)}
    assert "two tensors stand for head.bias" in refusal("d", twice)
    assert "its 1 tensors (fc.weight, ...) are no Swin network's" in refusal("e", {"fc.weight": torch.ones(2)})
    assert "'epoch' is a int, not a tensor" in refusal("f", {"epoch": 3})


def test_paths_that_are_not_what_a_verb_takes_say_which_is(weights, tmp_path, run):
    def refusal(*arguments):
        code, _, error = run(*arguments)
        assert code == 2 and error.count("\n") == 1, error
        return error

    assert refusal("inspect", tmp_path / "nope") == f"error: {tmp_path / 'nope'}: does not exist\n"
    for ending in ("rank0", "rank1", "master"):
        torch.save({"model": weights}, tmp_path / f"x.pth.{ending}")
    for ending in ("rank0", "rank1", "master"):
        error = refusal("inspect", tmp_path / f"x.pth.{ending}")
        assert f"give their path without .{ending}: {tmp_path / 'x.pth'}\n" in error
    path = CheckpointManager(tmp_path / "run").save(
        1, [Piece.of(n, v) for n, v in weights.items()], state={}, config={}
    )
    for name in ("shard-00000.safetensors", "index.json", "provenance.json"):
        assert f"is one file of a checkpoint; give its directory: {path}" in refusal("verify", path / name)
    torch.save(weights, tmp_path / "good.pth")
    data = (tmp_path / "good.pth").read_bytes()
    for length, reason in ((len(data) // 2, "is cut off"), (0, "is empty"), (3, "neither a file of torch.save")):
        (tmp_path / "cut.pth").write_bytes(data[:length])
        assert reason in refusal("inspect", tmp_path / "cut.pth")


def test_another_number_of_experts_is_told_the_verb_that_makes_it(tmp_path):
    """Whichever tensor is looked at first: the router has a row for each expert."""
    name, router = "layers.0.blocks.1.mlp.experts.fc1_bias", "layers.0.blocks.1.mlp.router.weight"
    stored = [Piece.of(name, torch.ones(4, 2)), Piece.of(router, torch.ones(4, 8))]
    path = CheckpointManager(tmp_path).save(1, stored, state={}, config={})
    for wanted in ([router, name], [name, router]):
        pieces = [Piece.of(n, torch.ones(8, 8 if n == router else 2)) for n in wanted]
        with pytest.raises(CheckpointError, match=f"{wanted[0]}.*`swin-moe checkpoint experts` makes another number"):
            load(path, pieces)
    with pytest.raises(CheckpointError, match=r"\(4, 8\), \(4, 9\) is wanted$"):
        load(path, [Piece.of(router, torch.ones(4, 9)), Piece.of(name, torch.ones(4, 2))])


def test_an_optimizer_in_another_order_is_left_out_and_told(weights, tmp_path):
    said = []
    optimizer = {"state": {}, "param_groups": [{"params": [0], "lr": 1.0}]}
    torch.save({"state_dict": weights, "optimizer": optimizer}, tmp_path / "timm.pth.tar")
    convert(tmp_path / "timm.pth.tar", tmp_path / "native", extra=SIZES, report=said.append)
    assert any("its optimizer is not in the official order" in text for text in said)


def averages_in(path) -> dict[str, torch.Tensor]:
    return {name[4:]: value for name, value in tensors_of(path).items() if name.startswith("ema/")}


AVERAGES = {
    "official": (lambda w, a: {"model": w, "model_ema": a, "epoch": 2}, "model_ema"),
    "timm": (lambda w, a: {"state_dict": w, "state_dict_ema": prefixed(a, "module."), "epoch": 2}, "state_dict_ema"),
    "in a wrapper of their own": (lambda w, a: {"model": w, "ema": {"module": a, "decay": 0.9}}, "ema"),
    "wrapped with the weights": (lambda w, a: {"net": {"model": w, "ema_state_dict": a}}, "ema_state_dict"),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_averages_beside_weights_are_carried_to_our_format(case, weights, tmp_path):
    wrap, key = AVERAGES[case]
    averages = {name: value + 1 for name, value in weights.items()}
    torch.save(wrap(weights, averages), tmp_path / "x.pth")
    said = []
    native = convert(tmp_path / "x.pth", tmp_path / "native", extra=SIZES, report=said.append)
    found = tensors_of(native)
    assert all(torch.equal(found.pop(name), value) for name, value in weights.items())
    assert all(torch.equal(found.pop(f"ema/{name}"), value) for name, value in averages.items()) and not found
    assert any(text.endswith(f"with the averages under {key!r}") for text in said)


@pytest.mark.parametrize("strange", [{"head.bias": torch.ones(7)}, {"head.scale": torch.ones(3)}])
def test_averages_of_another_network_are_left_out_and_told(strange, weights, tmp_path):
    torch.save({"model": weights, "model_ema": weights | strange}, tmp_path / "x.pth")
    said = []
    native = convert(tmp_path / "x.pth", tmp_path / "native", extra=SIZES, report=said.append)
    assert tensors_of(native).keys() == weights.keys()
    assert f"{tmp_path / 'x.pth'}: read without the averages under 'model_ema'" in said


def test_averages_of_rank_files_are_joined_as_the_weights_are(tmp_path):
    model = create_model("swin_moe", **SMALL, num_experts=4, moe_blocks=((-1,), (1,)))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = CheckpointManager(tmp_path).save(1, [Piece.of(*item) for item in weights.items()], state={}, config={})
    convert(ours, tmp_path / "ranks.pth", to="official-moe", world=2, extra={**SIZES, "form": "epoch"})
    for rank in range(2):
        file = tmp_path / f"ranks.pth.rank{rank}"
        content = torch.load(file)
        averages = {name: value + 1 for name, value in content["model"].items() if value.is_floating_point()}
        torch.save({**content, "model_ema": averages}, file)
    found = averages_in(convert(tmp_path / "ranks.pth", tmp_path / "native", extra=SIZES))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value + 1) for name, value in weights.items())


def test_averages_go_to_timm_and_back(weights, tmp_path):
    """One parameter has no average, as one that a run does not train: timm's loader needs all, so it stands twice."""
    averages = {name: value + 1 for name, value in weights.items() if name != "head.bias"}
    pieces = [Piece.of(n, v) for n, v in (weights | {f"ema/{n}": v for n, v in averages.items()}).items()]
    ours = CheckpointManager(tmp_path).save(1, pieces, state={}, config={})
    convert(ours, tmp_path / "timm.pth.tar", to="timm", extra=SIZES)
    content = torch.load(tmp_path / "timm.pth.tar")
    assert content.keys() == {"state_dict", "state_dict_ema"}
    assert torch.equal(content["state_dict_ema"]["head.fc.weight"], weights["head.weight"] + 1)
    back = convert(tmp_path / "timm.pth.tar", tmp_path / "back", extra=SIZES)
    found = averages_in(back)
    assert all(torch.equal(tensors_of(back)[name], value) for name, value in weights.items())
    assert all(torch.equal(found.pop(name), value) for name, value in averages.items())
    assert found.keys() == {"head.bias"} and torch.equal(found["head.bias"], weights["head.bias"])
    convert(ours, tmp_path / "timm.safetensors", to="timm", extra=SIZES)
    assert len(load_file(tmp_path / "timm.safetensors")) == len(weights)


def test_load_official_takes_averages_as_every_command_does(weights):
    averages = {name: value + 1 for name, value in weights.items()}
    model = create_model("swin", **SMALL)
    report = load_official(model, {"model": weights, "model_ema": averages})
    assert all(torch.equal(value, averages[name]) for name, value in model.named_parameters())
    assert "read with the averages under 'model_ema'" in str(report)


@pytest.mark.parametrize("to", ["native", "timm", "hf", "dcp", "official", "official-moe"])
def test_convert_reports_what_it_wrote_and_the_folders_it_makes(to, weights, tmp_path, run):
    """Of weights, two moments and averages some formats hold the weights alone, timm's the averages too."""
    kinds = ("", "optim.exp_avg/", "optim.exp_avg_sq/", "ema/")
    pieces = [Piece.of(kind + name, value) for kind in kinds for name, value in weights.items()]
    model = {**SMALL, "name": "swin", "img_size": [32, 32], "depths": [1, 2], "num_heads": [1, 2], "patch_size": [4, 4]}
    source = CheckpointManager(tmp_path).save(1, pieces, state={}, config={"model": model})
    target = tmp_path / "out" if to in ("native", "hf", "dcp", "official-moe") else tmp_path / "out.pth"
    code, out, _ = run("convert", source, target, "--to", to)
    times = {"native": 4, "timm": 2, "hf": 1}.get(to, 3)
    size = text.format_bytes(times * sum(value.nbytes for value in weights.values()))
    expected = f"{target}: {to}, {times * len(weights)} tensors, {size}, from {source} (native)"
    assert code == 0 and out.splitlines()[-1] == expected
    code, out, _ = run("convert", source, tmp_path / "no" / "such" / target.name, "--to", to)
    assert code == 0 and out.startswith(f"{tmp_path / 'no' / 'such'}: does not exist and is made\n")


def test_average_names_what_it_is_of(weights, tmp_path, run):
    paths = []
    for step in (1, 2):
        pieces = [Piece.of(name, value) for name, value in weights.items()]
        paths.append(CheckpointManager(tmp_path).save(step, pieces, state={}, config={}))
    code, out, _ = run("average", *paths, tmp_path / "mean", "--weights", "0.25,0.75")
    assert code == 0 and f"from 0.25 x {paths[0]} + 0.75 x {paths[1]} (the mean)" in out


def test_a_long_entry_does_not_widen_the_table_of_differences(weights, tmp_path, run):
    paths = []
    for step, state in ((1, {"names": ["x" * 90] * 40}), (2, {"names": ["y"]})):
        pieces = [Piece.of(name, value) for name, value in weights.items()]
        paths.append(CheckpointManager(tmp_path / str(step)).save(step, pieces, state=state, config={}))
    code, out, _ = run("diff", *paths)
    assert code == 1 and "names" in out and max(map(len, out.splitlines())) < 80 + 2 * max(60, len(str(paths[0])))
    assert json.loads(run("diff", *paths, "--json")[1])["entries"]["state.names"][0] == ["x" * 90] * 40


def test_a_router_of_another_kind_is_refused_by_name(tmp_path, run):
    """Copied as it is, a router of 4 experts would be written into a network of 8."""
    block = "layers.0.blocks.1.mlp"
    shapes = {
        f"{block}.router.table": (4, 8),
        f"{block}.experts.fc1_weight": (4, 8, 8),
        f"{block}.experts.fc1_bias": (4, 8),
        f"{block}.experts.fc2_weight": (4, 8, 8),
        f"{block}.experts.fc2_bias": (4, 8),
    }
    pieces = [Piece.of(name, torch.ones(shape)) for name, shape in shapes.items()]
    config = {"model": {"name": "swin_moe", "moe": {"num_experts": 4, "top_k": 1}}}
    source = CheckpointManager(tmp_path).save(1, pieces, state={}, config=config)
    for operation, count in (("duplicate", 8), ("split", 8), ("merge", 2)):
        code, _, error = run("experts", source, tmp_path / "out", f"--{operation}", count, "--no-check")
        assert code == 2 and f"tensor {block}.router.table belongs to a router that this verb does not know" in error
        assert not (tmp_path / "out").exists()


def _tar(data: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("x.pth")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("program", "pack"),
    {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "tar": _tar}.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["x.pth", "x.pth.tar", "x.safetensors"])
def test_a_packed_file_is_told_as_such(weights, tmp_path, run, name, program, pack):
    torch.save(weights, tmp_path / "plain.pth")
    (tmp_path / name).write_bytes(pack((tmp_path / "plain.pth").read_bytes()))
    sentence = f"{tmp_path / name}: is packed by {program}; unpack it first"
    for words in (["inspect"], ["convert", "--to", "native"], ["convert", "--from", "official", "--to", "native"]):
        target = [tmp_path / "out"] if words[0] == "convert" else []
        code, _, errors = run(words[0], tmp_path / name, *target, *words[1:])
        assert code == 2 and sentence in errors, errors
    with pytest.raises(CheckpointError, match="is packed by"):
        load_official(create_model("swin", **SMALL), tmp_path / name)


def test_rank_files_are_named_together(tmp_path, run):
    """What is wrong with one of them, and what is done about it, is said of their common path."""
    whole = tmp_path / "ckpt_epoch_7.pth"
    for name in ("rank1", "rank0"):
        (tmp_path / f"{whole.name}.{name}").write_bytes(b"x")
        if name == "rank1":
            code, _, errors = run("inspect", whole)
            assert code == 2 and f"does not exist, but there is {whole.name}.rank1: .rank0 is missing" in errors
    for given in (whole, f"{whole}.rank0", f"{whole}.rank1"):
        with pytest.raises(CheckpointError, match=f"convert {whole} DIR .* checkpoint.init={whole} takes the weights"):
            find_checkpoint(given, key="checkpoint.load")
