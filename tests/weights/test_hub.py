"""save_pretrained and from_pretrained, and our networks by timm's names: the same function, whatever the folder."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import swin_moe
from checkpoint_tools.formats import find_format
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.config import DataConfig
from swin_moe.models.swin import SwinTransformer

SMALL = dict(img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=3)
EXPERTS = {"moe": {"blocks": ((-1,), (0,)), "num_experts": 4}}
NETWORKS = {
    "swin": ("swin", {}, "transformers"),
    "swinv2": ("swinv2", {}, "transformers"),
    "swin_mlp": ("swin_mlp", {}, "swin_moe"),
    "swin_moe": ("swin_moe", EXPERTS, "swin_moe"),
    "swinv2 with experts": ("swinv2", EXPERTS, "swin_moe"),
}
CLASSES = ["cat", "dog", "eel"]


def network(name: str, **more) -> SwinTransformer:
    return swin_moe.create_model(name, **(SMALL | more)).eval()


def outputs(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found = model(images)
    return found[0] if isinstance(found, tuple) else found


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", ["auto", "swin_moe"])
@pytest.mark.parametrize("case", NETWORKS)
def test_a_folder_gives_the_same_network(case, layout, tmp_path, images):
    name, more, expected = NETWORKS[case]
    model = network(name, **more)
    reading = DataConfig(interpolation="bilinear", eval_crop=False)
    written = model.save_pretrained(tmp_path / "out", classes=CLASSES, data=reading, layout=layout)
    assert written == (expected if layout == "auto" else "swin_moe")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    back, classes, _ = swin_moe.load(tmp_path / "out")
    assert torch.equal(outputs(back, images), outputs(model, images)) and list(classes) == CLASSES
    assert back.reading is not None and (back.reading.interpolation, back.reading.eval_crop) == ("bilinear", False)
    assert torch.equal(outputs(SwinTransformer.from_pretrained(tmp_path / "out"), images), outputs(model, images))
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told["id2label"] == {"0": "cat", "1": "dog", "2": "eel"}
    assert told["model_type"] == (name if written == "transformers" else "swin_moe")
    assert find_format(tmp_path / "out") == ("hf" if written == "transformers" else "safetensors")
    back.save_pretrained(tmp_path / "again", layout=layout)  # with the classes and reading it came with
    for file, key in (("config.json", "id2label"), ("preprocessor_config.json", "resample")):
        again, before = (json.loads((tmp_path / folder / file).read_text()) for folder in ("again", "out"))
        assert again[key] == before[key]


def test_names_are_transformers_where_it_has_the_network(tmp_path):
    network("swin").save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "swin.encoder.layers.0.blocks.0.attention.self.query.weight" in names and "classifier.weight" in names


def test_a_new_run_and_other_overrides_begin_with_a_folder(tmp_path, images):
    model = network("swin_moe", **EXPERTS)
    model.save_pretrained(tmp_path / "out", classes=CLASSES)
    other = swin_moe.create_model("swin_moe", pretrained=tmp_path / "out", **(SMALL | EXPERTS | {"num_classes": 5}))
    assert torch.equal(other.layers[1].blocks[1].mlp.fc1.weight, model.layers[1].blocks[1].mlp.fc1.weight)


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    model = network("swin_moe", **EXPERTS)
    with pytest.raises(ValueError, match="2 classes, the network has 3 outputs"):
        model.save_pretrained(tmp_path / "a", classes=["x", "y"])
    with pytest.raises(CheckpointError, match="transformers"):
        model.save_pretrained(tmp_path / "b", layout="transformers")
    with torch.device("meta"):
        empty = swin_moe.create_model("swin", **SMALL)
    with pytest.raises(ValueError, match="has to hold all of its parameters"):
        empty.save_pretrained(tmp_path / "c")
    assert not list(tmp_path.iterdir())
    for name, more in (("swin", {}), ("swin_moe", EXPERTS)):
        network(name, **more).save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}.* exists|{name}: .*there"):
            network(name, **more).save_pretrained(tmp_path / name)


# --- timm ---


@pytest.fixture(scope="module")
def timm():
    swin_moe.register_timm()
    import timm

    return timm


def test_timm_lists_every_classifier_once(timm, recwarn):
    names = swin_moe.register_timm()
    assert not [warning for warning in recwarn if "Overwriting" in str(warning.message)]  # a second time is none
    assert set(names) <= set(timm.list_models("swin_moe_*")) and len(names) == len(set(names)) > 50
    assert timm.is_model("swin_moe_swin_tiny_patch4_window7_224")
    assert timm.is_model("swin_moe_small_patch4_window12_192_8expert_32gpu_22k")
    assert "swin_tiny_patch4_window7_224" in timm.list_models("swin_tiny*")  # timm's own stays


@pytest.mark.parametrize("name", ["swin_moe_swinv2_tiny_patch4_window8_256", "swin_moe_swin_tiny_patch4_window7_224"])
def test_features_are_those_of_the_network(name, timm, images):
    backbone = timm.create_model(name, features_only=True, out_indices=(1, 3)).eval()
    assert backbone.feature_info.channels() == [192, 768] and backbone.feature_info.reduction() == [8, 32]
    assert backbone.feature_info.module_name() == ["network.layers.1", "network.layers.3"]
    with torch.inference_mode():
        maps, expected = backbone(images), backbone.model.network.forward_features(images, (1, 3))
    assert [tuple(m.shape) for m in maps] == [(2, 192, 8, 8), (2, 768, 2, 2)]
    assert all(map(torch.equal, maps, expected))
    assert backbone.feature_info.get_dicts(keys=["num_chs"]) == [{"num_chs": 192}, {"num_chs": 768}]


def test_a_network_with_experts_is_a_timm_model(timm):
    name = "swin_moe_small_patch4_window12_192_8expert_32gpu_22k"
    with torch.device("meta"):
        made = timm.create_model(name, num_classes=10)
    assert made.num_classes == 10 and made.get_classifier().out_features == 10
    assert any(".experts." in key or ".mlp.fc1" in key for key in made.state_dict())


def test_members_of_timms_models(timm, images):
    model = timm.create_model("swin_moe_swin_tiny_patch4_window7_224", num_classes=5, drop_path_rate=0.0).eval()
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 224, 224) and data["crop_pct"] == 0.875 and data["interpolation"] == "bicubic"
    with torch.inference_mode():
        logits, features = model(images), model.forward_features(images)
        assert torch.equal(model.forward_head(features), logits) and features.shape == (2, 2, 2, 768)
        assert model.forward_head(features, pre_logits=True).shape == (2, 768)
        last, maps = model.forward_intermediates(images, indices=2, output_fmt="NHWC")
        assert torch.equal(last, features) and [m.shape[-1] for m in maps] == [384, 768]
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert model(images).shape == (2, 768)
    decayless = model.no_weight_decay()
    assert decayless and decayless <= {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"global_pool": "max"}, "unknown option global_pool"),
        ({"features_only": True, "out_indices": (9,)}, "must be of its 4 stages"),
    ],
)
def test_wrong_options_of_timm_are_named(options, said, timm, images):
    with pytest.raises(ValueError, match=said):
        timm.create_model("swin_moe_swin_tiny_patch4_window7_224", **options)(images)


def test_timm_is_not_imported_before_it_is_asked_for():
    code = "import sys, swin_moe; swin_moe.load; print('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_what_was_written_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="swin_moe"):
        network("swin_mlp").save_pretrained(tmp_path / "out")
    assert f"{tmp_path / 'out'}: written as swin_moe" in caplog.text
