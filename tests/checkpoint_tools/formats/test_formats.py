"""Foreign formats against the programs they belong to, or against what those computed."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from checkpoint_tools.formats import find_format, open_source, write_checkpoint
from checkpoint_tools.formats.infer import merge_model
from checkpoint_tools.sources.base import Options
from swin_moe import create_model
from swin_moe.checkpoint import CheckpointError, Piece, load
from swin_moe.checkpoint.index import Index
from swin_moe.config.variants import VARIANTS
from tests.checkpoint_tools.formats.official_files import FILES, FORMS, convert, identity, tensors_of
from tests.models.reference import GOLDEN, normal

SMALL = {"num_classes": 5, "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
RECORDED = json.loads((GOLDEN / "transformers.json").read_text())
TIMM = {
    "swin": ("swin_tiny_patch4_window7_224", 224, 7),
    "swinv2": ("swinv2_tiny_window8_256", 256, 8),
}


def logits_of(path: Path, family: str, image: torch.Tensor, **options) -> torch.Tensor:
    """Returns what our network computes with the parameters of a native checkpoint, which must be all of them."""
    model = create_model(family, **SMALL, **options).eval()
    load(path, [Piece.of(name, p.detach()) for name, p in model.named_parameters()], exact=True)
    with torch.no_grad():
        return model(image)


@pytest.fixture(scope="module")
def timm():
    from swin_moe.data.torchvision_compat import import_torchvision

    import_torchvision()
    return pytest.importorskip("timm")


@pytest.mark.parametrize("family", TIMM)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_timm_both_ways(tmp_path, timm, family, ending):
    name, size, window = TIMM[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        image = torch.randn(2, 3, size, size)
        expected = model(image)
    path = tmp_path / f"timm{ending}"
    (torch.save if ending == ".pth" else save_file)(model.state_dict(), path)
    assert find_format(path) == "timm"
    native = convert(path, tmp_path / "native", extra={"img_size": str(size), "window_size": str(window)})
    logits = logits_of(native, family, image, img_size=size, window_size=window)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert Index.read(native).config["model"]["img_size"] == [size, size]
    written = convert(native, tmp_path / f"back{ending}", "timm")
    back = torch.load(written, weights_only=True) if ending == ".pth" else load_file(written)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_transformers_both_ways(tmp_path, family):
    recorded = RECORDED[family]
    tensors, live = {}, {}
    for name, (inside, shape) in recorded["tensors"].items():  # as saved, and as the module calls it
        z = normal(inside, tuple(shape)).float()
        tensors[name] = live[inside] = 1 + 0.1 * z if len(shape) == 1 and name.endswith(".weight") else 0.2 * z
    directory = tmp_path / "hf"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(recorded["config"]))
    assert find_format(directory) == "hf"
    native = convert(directory, tmp_path / "native")
    image = normal(family, (2, 3, 64, 64)).float()
    logits = logits_of(native, family, image, img_size=64, patch_size=2, window_size=4)
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"]), rtol=1e-4, atol=1e-5)
    back = convert(native, tmp_path / "back", "hf")
    loaded = load_file(back / "model.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], value) for n, value in tensors.items())
    config = json.loads((back / "config.json").read_text())
    assert {key: config[key] for key in recorded["config"]} == recorded["config"]
    one = convert(native, tmp_path / "one.bin", "hf")
    assert torch.load(one, weights_only=True).keys() == tensors.keys()
    torch.save(live, tmp_path / "live.pth")
    same = convert(tmp_path / "live.pth", tmp_path / "live")
    assert identity(same)["shard-00000.safetensors"] == identity(native)["shard-00000.safetensors"]


def test_a_sharded_index_stays_in_its_directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../x.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="outside its directory|is no index"):
            open_source(tmp_path, Options(report=lambda text: None))
    tensors = {name: torch.zeros(shape) for name, (_, shape) in RECORDED["swin"]["tensors"].items()}
    names = sorted(tensors)
    for part, chosen in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: tensors[name] for name in chosen}, tmp_path / f"{part}.safetensors")
    index.write_text(json.dumps({"weight_map": {n: f"{'ab'[i % 2]}.safetensors" for i, n in enumerate(names)}}))
    with open_source(tmp_path, Options(report=lambda text: None)) as source:
        joined = sum(".self.query." in name or ".self.key." in name for name in names)
        assert len(source.tensors) == len(names) - joined


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return convert(FILES / FORMS["epoch"], tmp_path_factory.mktemp("moe") / "native")


def flattened(names) -> dict[str, str]:
    """Returns the names that torch flattens {"model": ..., "optim": {"state": ...}} to, by ours."""
    result = {}
    for name in names:
        kind, slash, parameter = name.partition("/")
        result[name] = f"optim.state.{parameter}.{kind.removeprefix('optim.')}" if slash else f"model.{name}"
    return result


def test_dcp_is_what_torch_loads_and_saves(tmp_path, native):
    warnings.simplefilter("ignore")
    tensors = tensors_of(native)
    written = convert(native, tmp_path / "dcp", "dcp", file_size=1 << 16)
    assert find_format(written) == "dcp" and len(list(written.glob("*.distcp"))) > 3
    loaded = {foreign: torch.zeros_like(tensors[name]) for name, foreign in flattened(tensors).items()}
    dcp.load(loaded, checkpoint_id=written)
    for name, foreign in flattened(tensors).items():
        assert torch.equal(loaded[foreign], tensors[name]), name
    state: dict = {}
    for name in tensors:
        kind, slash, parameter = name.partition("/")
        if slash:
            own = state.setdefault(parameter, {"step": torch.tensor(3.0)})
            own[kind.removeprefix("optim.")] = tensors[name]
    parameters = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    optim = {"state": state, "param_groups": [{"lr": 0.1}]}
    dcp.save({"model": parameters, "optim": optim}, checkpoint_id=tmp_path / "torch")
    told: list[str] = []
    for path in (tmp_path / "torch", written):
        back = convert(path, tmp_path / f"{path.name}-back", report=told.append)
        assert Index.read(back).step == 3
        found = tensors_of(back)
        assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    assert any("optim.param_groups" in text for text in told)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_dcp_metadata_that_calls_code_or_leaves_the_directory(tmp_path, native, capsys):
    import pickle

    written = convert(native, tmp_path / "dcp", "dcp")
    metadata = written / ".metadata"
    good = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"builtins\.print, which is refused"):
        open_source(written, Options())
    assert "executed" not in capsys.readouterr().out
    for name in (b"../_0.distcp", b"/_0_0.distcp"):
        metadata.write_bytes(good.replace(b"__0_0.distcp", name))
        with pytest.raises(CheckpointError, match="outside the directory"):
            open_source(written, Options())
    for length in range(0, len(good), max(1, len(good) // 60)):
        metadata.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            open_source(written, Options())
    metadata.write_bytes(good)
    (written / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp: is missing"):
        open_source(written, Options())


def test_fairscale_loads_what_is_written(tmp_path, native):
    fairscale = pytest.importorskip("fairscale.optim.oss")
    from torch import distributed

    written = convert(native, tmp_path / "fairscale.pt", "fairscale")
    assert find_format(written) == "fairscale"
    found = tensors_of(convert(written, tmp_path / "back"))
    tensors = tensors_of(native)
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    content = torch.load(written, weights_only=True)
    groups = [len(group["params"]) for group in content["optimizer"]["param_groups"]]
    parameters = [torch.nn.Parameter(torch.zeros_like(v["exp_avg"])) for v in content["optimizer"]["state"].values()]
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        cut = [{"params": parameters[: groups[0]]}, {"params": parameters[groups[0] :], "weight_decay": 0.0}]
        optimizer = fairscale.OSS(cut, optim=torch.optim.AdamW, lr=1e-3)
        optimizer.load_state_dict(content["optimizer"])
        for parameter, state in zip(parameters, content["optimizer"]["state"].values()):
            torch.testing.assert_close(optimizer.optim.state[parameter]["exp_avg"], state["exp_avg"], rtol=0, atol=0)
        optimizer.consolidate_state_dict()
        torch.save({"model": content["model"], "optimizer": optimizer.state_dict()}, tmp_path / "oss.pt")
    finally:
        distributed.destroy_process_group()
    again = tensors_of(convert(tmp_path / "oss.pt", tmp_path / "oss"))
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())


def test_simmim_is_read_for_fine_tuning_or_kept(tmp_path):
    model = create_model("swinv2", **SMALL, img_size=64, patch_size=2, window_size=4)
    official = {name.replace("cpb_mlp", "rpe_mlp"): t for name, t in model.state_dict().items() if "head" not in name}
    encoder = {f"encoder.{name}": tensor for name, tensor in official.items()}
    extra = {"encoder.mask_token": torch.ones(1, 1, 12), "decoder.0.weight": torch.ones(12, 96, 1, 1)}
    torch.save({"model": encoder | extra | {"decoder.0.bias": torch.ones(12)}}, tmp_path / "pretrain.pth")
    assert find_format(tmp_path / "pretrain.pth") == "simmim"
    stripped = tensors_of(convert(tmp_path / "pretrain.pth", tmp_path / "strip"))
    assert stripped.keys() == {name for name in model.state_dict() if "head" not in name}
    assert all(torch.equal(stripped[name], model.state_dict()[name]) for name in stripped)
    kept = convert(tmp_path / "pretrain.pth", tmp_path / "keep", extra={"encoder": "keep"})
    assert tensors_of(kept).keys() == {f"encoder.{name}" for name in stripped} | extra.keys() | {"decoder.0.bias"}
    sizes = {"img_size": "64", "window_size": "4"}
    back = convert(kept, tmp_path / "back.pth", "simmim", extra=sizes)
    names = torch.load(back, weights_only=True)["model"]
    assert "encoder.layers.2.blocks.1.attn_mask" in names and "encoder.layers.0.blocks.0.attn.cpb_mlp.2.weight" in names
    again = convert(back, tmp_path / "again", extra={"encoder": "keep"})
    assert identity(again)["shard-00000.safetensors"] == identity(kept)["shard-00000.safetensors"]


def test_what_a_format_cannot_hold_is_refused_or_told(tmp_path, native):
    for to, reason in (("timm", "no networks with experts"), ("hf", "no networks with experts")):
        with pytest.raises(CheckpointError, match=f"expert.*{reason}"):
            convert(native, tmp_path / "x.pth", to)
    torch.save({"patch_embed.proj.weight": torch.zeros(8, 3, 2, 2), "conv.weight": torch.zeros(2)}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="'conv.weight' has no place in a Swin network"):
        convert(tmp_path / "y.pth", tmp_path / "z")
    with open_source(native, Options()) as source:
        told: list[str] = []
        write_checkpoint(source, tmp_path / "dcp", Options(report=told.append), "dcp")
    assert not told


@pytest.mark.parametrize("stated", ["swin", "swin_post"])
def test_of_families_with_the_same_parameters_the_stated_one_counts(monkeypatch, stated):
    post = replace(VARIANTS["swin"], norm="post")
    monkeypatch.setattr("checkpoint_tools.formats.infer.VARIANTS", {"swin_post": post, **VARIANTS})
    found = merge_model({"model": {"name": stated, "ape": True}}, {"name": "swin_post", "ape": False})
    assert found == {"model": {"name": stated, "ape": False}}
    assert merge_model({"model": {"name": "swinv2"}}, {"name": "swin"}) == {"model": {"name": "swin"}}
