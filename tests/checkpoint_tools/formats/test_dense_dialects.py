"""Detectors and segmentors as mmdetection's and mmsegmentation's own port, and transformers, name them."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_tools.__main__ import main as tools
from checkpoint_tools.formats import find_format, open_source
from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.data.torchvision_compat import import_torchvision
from swin_moe.engine.common import materialize
from swin_moe.models.layers import PatchMerging
from swin_moe.run.session import build_meta_model
from swin_moe.tasks.base import build_task
from swin_moe.weights.load import load_weights
from tests.checkpoint_tools.formats.official_files import QUIET, convert, tensors_of
from tests.checkpoint_tools.formats.test_dense import MICRO
from tests.models.dense.golden import error, fill, image, load
from tests.tasks.transfer import begun, session_of, weights

DERIVED = ("relative_position_index", "num_batches_tracked")
State = dict[str, Tensor]


def official(name: str) -> State:
    """Returns the parameters and buffers of a golden's network."""
    return {key: fill(key, tuple(shape)) for key, shape in load(name)["keys"].items()}


def unfolded(weight: Tensor) -> Tensor:
    """Returns what mmdetection keeps for a reduction (rows, 4 C) or a norm (4 C,): channel by channel, in each the four
    places row by row; the official order is place by place, down the columns."""
    channels = weight.shape[-1] // 4
    places = [weight[..., q * channels : (q + 1) * channels] for q in (0, 2, 1, 3)]
    return torch.stack(places, dim=-1).flatten(-2)


def as_open_mmlab(state: State) -> State:
    """Returns a state dict under the names, and with the orders, of mmdetection 3 and mmsegmentation 1."""
    found = {}
    for name, value in state.items():
        if ".downsample." in name:
            value = unfolded(value)
        for ours, theirs in (
            ("backbone.layers.", "backbone.stages."),
            ("patch_embed.proj.", "patch_embed.projection."),
            (".attn.", ".attn.w_msa."),
            (".mlp.fc1.", ".ffn.layers.0.0."),
            (".mlp.fc2.", ".ffn.layers.1."),
        ):
            name = name.replace(ours, theirs)
        found[name] = value.contiguous()
    return found


def as_transformers(state: State, *, hub: bool) -> State:
    """Returns a state dict as UperNetForSemanticSegmentation has it: as its files name tensors, or its modules."""
    found = {}
    blocks = {
        ".attn.proj.": ".attention.output.dense." if hub else ".attention.o_proj.",
        ".attn.relative": ".attention.self.relative" if hub else ".attention.relative_position_bias.relative",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".mlp.fc1.": ".intermediate.dense." if hub else ".mlp.fc1.",
        ".mlp.fc2.": ".output.dense." if hub else ".mlp.fc2.",
    }
    start = "backbone." if hub else "backbone.swin."
    for name, value in state.items():
        if ".blocks." in name:
            for ours, theirs in blocks.items():
                name = name.replace(ours, theirs)
        name = re.sub(r"^backbone\.norm(\d)", lambda m: f"backbone.hidden_states_norms.stage{int(m[1]) + 1}", name)
        name = name.replace("backbone.layers.", f"{start}encoder.layers.")
        name = name.replace("backbone.patch_embed.proj.", f"{start}embeddings.patch_embeddings.projection.")
        name = name.replace("backbone.patch_embed.norm.", f"{start}embeddings.norm.")
        name = name.replace(".bn.", ".batch_norm.").replace(".conv_seg.", ".classifier.")
        if ".attn.qkv." in name:
            words = (".self.query.", ".self.key.", ".self.value.") if hub else (".q_proj.", ".k_proj.", ".v_proj.")
            for word, part in zip(words, value.chunk(3)):
                found[name.replace(".attn.qkv.", f".attention{word}")] = part.contiguous()
        else:
            found[name] = value
    # Of the norm after the last stage, which no map goes through.
    unused = {
        f"backbone.swin.layernorm.{kind}": torch.full_like(state["backbone.norm3.bias"], 7.0)
        for kind in ("weight", "bias")
    }
    return found | unused


@pytest.mark.parametrize("channels", [1, 6])
def test_unfolded_merging_computes_what_the_official_merging_computes(channels):
    merging = PatchMerging(channels, norm_after=False).double()
    with torch.no_grad():
        for parameter in merging.parameters():
            parameter.copy_(torch.randn_like(parameter))
    maps = torch.randn(2, 4, 6, channels, dtype=torch.float64)
    rows = F.unfold(maps.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    norm = [unfolded(p) for p in (merging.norm.weight, merging.norm.bias)]
    found = F.layer_norm(rows, rows.shape[2:], *norm) @ unfolded(merging.reduction.weight).T
    torch.testing.assert_close(found.view(2, 2, 3, -1), merging(maps))


@pytest.mark.parametrize("name", ["mask_rcnn_micro", "cascade_giou_micro", "htc_micro", "upernet_micro"])
def test_files_of_open_mmlab_are_read_bit_for_bit(name, tmp_path):
    state = official(name)
    content = {"meta": {"dataset_meta": {"classes": ("a", "b"), "palette": [(1, 2, 3)] * 2}}}
    torch.save({**content, "state_dict": as_open_mmlab(state)}, tmp_path / "later.pth")
    assert find_format(tmp_path / "later.pth") == "dense"
    with open_source(tmp_path / "later.pth", Options(**QUIET)) as source:
        model = source.config["model"]
        assert (model["name"], model["embed_dim"], model["window_size"]) == ("swin", 24, 7)
        assert source.state["classes"] == ["a", "b"]
    convert(tmp_path / "later.pth", tmp_path / "native")
    stored = tensors_of(tmp_path / "native")
    assert stored.keys() == {key for key in state if not key.endswith(DERIVED)}
    assert all(torch.equal(value, state[key]) for key, value in stored.items())


@pytest.mark.parametrize("form", ["file of the hub", "file of modules", "directory"])
def test_files_of_transformers_are_read_bit_for_bit(form, tmp_path):
    state = official("upernet_micro")
    theirs = as_transformers(state, hub=form != "file of modules")
    path = tmp_path / "upernet"
    if form == "directory":
        path.mkdir()
        labels = {str(n): letter for n, letter in enumerate("abcdefg")}
        config = {"model_type": "upernet", "backbone_config": {"model_type": "swin"}, "id2label": labels}
        (path / "config.json").write_text(json.dumps(config))
        save_file(theirs, path / "model.safetensors")
    else:
        torch.save(theirs, path)
    assert find_format(path) == "dense"
    with open_source(path, Options(**QUIET)) as source:
        assert source.config["model"]["num_classes"] == 7
        assert source.state == ({"classes": list("abcdefg")} if form == "directory" else {})
    convert(path, tmp_path / "native")
    stored = tensors_of(tmp_path / "native")
    assert stored.keys() == {key for key in state if not key.endswith(DERIVED)}
    assert all(torch.equal(value, state[key]) for key, value in stored.items())


@pytest.mark.parametrize("dialect", ["open-mmlab", "transformers"])
def test_runs_evaluate_and_begin_with_them(dialect, tmp_path):
    golden, state = load("upernet_micro"), official("upernet_micro")

    def save(state: State, name: str) -> Path:
        theirs = as_open_mmlab(state) if dialect == "open-mmlab" else as_transformers(state, hub=True)
        torch.save({"state_dict": theirs}, tmp_path / name)
        return tmp_path / name

    session = session_of(tmp_path, "canvas_upernet", *MICRO, f"checkpoint.load={save(state, 'a.pth')}")
    model = materialize(build_meta_model(session, build_task(session.config)), session.config, session.device)
    assert "dense" in load_weights(model, session)
    with torch.no_grad():
        logits = model.eval()(image((3, 3, *golden["shape"][1:]), golden["name"])).logits
    assert error(golden["decode_logits"], logits) < 1e-5
    state |= {key: torch.zeros(11, *value.shape[1:]) for key, value in state.items() if ".conv_seg." in key}
    trainer, report = begun(tmp_path, "canvas_upernet", save(state, "b.pth"), *MICRO, "model.num_classes=11")
    name = "backbone.layers.1.downsample.reduction.weight"
    assert torch.equal(weights(trainer)[name], state[name]) and "dense" in report


REFUSED = {
    "positions of open-mmlab": ("backbone.absolute_pos_embed", (1, 4, 24), "open-mmlab only SwinV1 without absolute"),
    "SwinV2 of open-mmlab": ("backbone.stages.0.blocks.0.attn.w_msa.logit_scale", (1, 1, 1), "only SwinV1"),
    "another head": ("panoptic_head.conv.weight", (1,), "'panoptic_head.conv.weight' has no place"),
    "another block": ("backbone.stages.0.blocks.0.gamma_1", (24,), "gamma_1' has no place"),
    "odd merging": ("backbone.stages.0.downsample.norm.weight", (95,), r"\[95\] is none of patch merging"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_network_of_ours_is_refused_by_name(what, tmp_path):
    name, shape, reason = REFUSED[what]
    torch.save(
        {"state_dict": as_open_mmlab(official("upernet_micro")) | {name: torch.zeros(shape)}}, tmp_path / "a.pth"
    )
    with pytest.raises(CheckpointError, match=f"a.pth: .*{reason}"):
        convert(tmp_path / "a.pth", tmp_path / "native")


def test_other_families_of_transformers_are_refused(tmp_path, capsys):
    state = as_transformers(official("upernet_micro"), hub=True)
    second = {"backbone.encoder.layers.0.blocks.0.attention.self.logit_scale": torch.zeros(1, 1, 1)}
    torch.save(state | second, tmp_path / "a.bin")
    assert tools(["convert", str(tmp_path / "a.bin"), str(tmp_path / "x"), "--to", "native"]) == 2
    assert "of transformers only SwinV1 without absolute positions is read" in capsys.readouterr().err
    torch.save({"patch_embed.projection.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "b.pth")  # without any head
    assert tools(["convert", str(tmp_path / "b.pth"), str(tmp_path / "x"), "--to", "native"]) == 2
    assert "are no Swin network's" in capsys.readouterr().err


def test_transformers_itself_computes_the_same(tmp_path: Path):
    pytest.importorskip("transformers")
    import_torchvision()
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = [f"stage{n}" for n in (1, 2, 3, 4)]
    swin = SwinConfig(image_size=64, embed_dim=24, depths=[2] * 4, num_heads=[1, 2, 4, 8], out_features=stages)
    sizes = {"hidden_size": 32, "num_labels": 7, "auxiliary_channels": 16, "auxiliary_in_channels": 96}
    theirs = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=swin, **sizes)).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(fill(name, tuple(tensor.shape)))
    theirs.save_pretrained(tmp_path / "saved")
    session = session_of(tmp_path, "canvas_upernet", *MICRO, f"checkpoint.load={tmp_path / 'saved'}")
    ours = materialize(build_meta_model(session, build_task(session.config)), session.config, session.device).eval()
    load_weights(ours, session)
    images = torch.randn(2, 3, 95, 134, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(images).logits
        found = F.interpolate(ours(images).logits, size=(95, 134), mode="bilinear", align_corners=False)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
