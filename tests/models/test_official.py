"""Official state dicts into our models: tiny networks of our own under official names, and the official key lists."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swin_moe.models.official as official_module
from swin_moe.config import Family, ModelConfig, MoEConfig
from swin_moe.config.io import load_config
from swin_moe.models.attention import relative_coords_table, resize_bias_table
from swin_moe.models.build import build_model
from swin_moe.models.geometric import geometric_positions, resize_bias_table_geometric
from swin_moe.models.official import (
    CLASSES_22K,
    _Loading,
    load_official,
    read_class_map,
)
from swin_moe.models.swin import SwinTransformer

GOLDEN = Path(__file__).parent.parent / "golden"
NUMBERS = json.loads((GOLDEN / "numbers.json").read_text())
KEYS = json.loads((GOLDEN / "state_dict_keys.json").read_text())
TO_OFFICIAL = (
    (r"mlp\.experts\.fc(\d)_weight$", r"mlp._moe_layer.experts.batched_fc\1_w"),
    (r"mlp\.experts\.fc(\d)_bias$", r"mlp._moe_layer.experts.batched_fc\1_bias"),
    (r"mlp\.router\.weight$", "mlp._moe_layer.gates.0.wg.weight"),
    (r"mlp\.router\.projector\.", "mlp._moe_layer.gates.0.cosine_projector."),
    (r"mlp\.router\.(temperature|sim_matrix)$", r"mlp._moe_layer.gates.0.\1"),
)
BLOCK = "layers.0.blocks.0"
MOE_BLOCK = "layers.1.blocks.1.mlp._moe_layer"
MOE = MoEConfig(blocks=((), (1,)), num_experts=4)


def tiny(name: Family, *, seed: int = 0, **options: Any) -> SwinTransformer:
    """Returns a two-stage network of 2 + 2 blocks and 5 classes; every parameter is random and different per seed."""
    defaults: dict[str, Any] = {
        "img_size": (32, 32),
        "num_classes": 5,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "pretrained_window_sizes": (0, 0),
    }
    config = ModelConfig(name=name, **(defaults | options))
    model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not (key.endswith("experts.fc2_bias") and not config.mlp_fc2_bias):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            else:
                parameter.zero_()
    return model.eval()


def official(model, prefix: str = "") -> dict[str, Tensor]:
    """Returns the model's state dict under official names, with the official buffers."""
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in TO_OFFICIAL:
            name = re.sub(pattern, replacement, name)
        out[prefix + name] = value.clone()
        if name.endswith("_moe_layer.experts.batched_fc1_w"):
            out[prefix + name.replace("experts.batched_fc1_w", "_num_global_experts")] = torch.tensor(value.shape[0])
    for name, module in model.named_modules():
        if name.endswith(".attn"):
            n = module.window**2
            out[f"{prefix}{name}.relative_position_index"] = torch.zeros(n, n, dtype=torch.int64)
            out[f"{prefix}{name.removesuffix('.attn')}.attn_mask"] = torch.zeros(4, n, n)
            if hasattr(module, "cpb_mlp"):
                table = relative_coords_table(
                    module.window, module.pretrained_window, torch.device("cpu"), torch.float32
                )
                side = 2 * module.window - 1
                out[f"{prefix}{name}.relative_coords_table"] = table.reshape(1, side, side, 2)
    return out


def snapshot(model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, expected: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    for name, value in model.state_dict().items():
        if name not in but:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


CASES: dict[str, dict[str, Any]] = {
    "swin": {"name": "swin"},
    "swin_ape": {"name": "swin", "ape": True},
    "swinv2": {"name": "swinv2"},
    "swinv2_extra_norm": {"name": "swinv2", "extra_norm_every": 2},
    "swin_mlp": {"name": "swin_mlp"},
    "dense_twin": {"name": "swin_moe", "mlp_fc2_bias": False},
    "linear": {"name": "swin_moe", "mlp_fc2_bias": False, "moe": MOE},
    "cosine": {"name": "swin_moe", "moe": MoEConfig(blocks=((1,), (1,)), num_experts=2, router="cosine", cosine_dim=8)},
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("case", CASES)
def test_every_family_loads_whole(case, wrapped):
    source, model = tiny(seed=1, **CASES[case]), tiny(seed=2, **CASES[case])
    state = official(source)
    report = load_official(model, {"model": state, "epoch": 3} if wrapped else state)
    assert_same(model, source.state_dict())
    assert sorted(report.loaded) == sorted(model.state_dict())
    assert not report.interpolated
    assert not report.reinitialized
    assert not report.notes
    assert len(report.dropped) == len(state) - len(report.loaded)
    assert "loaded" in str(report)


@pytest.mark.parametrize("name", KEYS)
def test_official_key_lists_fit_our_models(name):
    config = load_config(name).model
    with torch.device("meta"):
        model = build_model(config)
    state = {}
    for key, shape in KEYS[name].items():
        if "_moe_layer.experts." in key:  # the list is of one rank: 1 expert, or a part of one
            dim = int(KEYS[name][key.partition("_moe_layer")[0].replace("mlp.", "norm2.weight")][0])
            full = {"fc1_w": (4 * dim, dim), "fc2_w": (4 * dim, dim), "fc1_bias": (4 * dim,), "fc2_bias": (dim,)}
            shape = (config.moe.num_experts, *full[key.rpartition("batched_")[2]])
        state[key] = torch.zeros(()).expand(tuple(shape))
        if key.endswith("_num_global_experts"):
            state[key] = torch.tensor(config.moe.num_experts)
    loading = _Loading(model, model.state_dict(), state, "bicubic")
    source = loading.rename(state)
    loading.fit_head(source)
    loading.fit(source)
    assert loading.problems == []
    assert sorted(loading.report.loaded) == sorted(model.state_dict())
    reasons = {reason for _, reason in loading.report.dropped}
    assert reasons <= {"computed by the model", "checked against the model", "only for SimMIM pre-training"}


def test_simmim_files_lose_their_prefix_and_decoder():
    source = tiny("swinv2", num_classes=0, seed=1)
    state = official(source, prefix="encoder.")
    state = {key.replace("cpb_mlp", "rpe_mlp"): value for key, value in state.items()}
    state |= {"encoder.mask_token": torch.zeros(1, 1, 16), "decoder.0.weight": torch.zeros(12, 32, 1, 1)}
    model = tiny("swinv2", seed=2)
    before = snapshot(model)
    report = load_official(model, {"model": state})
    assert_same(model, source.state_dict() | {k: before[k] for k in ("head.weight", "head.bias")})
    assert [name for name, _ in report.reinitialized] == ["head.weight", "head.bias"]
    assert ("encoder.mask_token", "only for SimMIM pre-training") in report.dropped


@pytest.mark.parametrize(
    ("prefix", "rule", "chosen"),
    [
        ("", "bicubic", None),
        ("encoder.", "geometric", None),
        ("", "geometric", "geometric"),
        ("encoder.", "bicubic", "bicubic"),
    ],
)
def test_bias_tables_of_another_window_are_interpolated(prefix, rule, chosen):
    source, model = tiny("swin", img_size=(48, 48), window_size=3, seed=1), tiny("swin", seed=2)
    report = load_official(model, official(source, prefix), interpolation=chosen)
    resize = resize_bias_table if rule == "bicubic" else resize_bias_table_geometric
    key = "layers.1.blocks.0.attn.relative_position_bias_table"
    torch.testing.assert_close(model.state_dict()[key], resize(source.state_dict()[key], 4))
    assert (key, f"{rule}, 5 x 5 to 7 x 7 offsets") in report.interpolated
    assert len(report.interpolated) == 4


def test_bicubic_table_equals_the_official_numbers():
    golden = NUMBERS["rpb_bicubic_7to12"]
    table = torch.sin(0.1 * torch.arange(169, dtype=torch.float64)[:, None] + torch.arange(3))
    got = resize_bias_table(table.float(), 12)
    for row in (0, 264, 528):
        torch.testing.assert_close(got[row], torch.tensor(golden[f"R[{row}]"]), rtol=0, atol=1e-6)


def test_geometric_table_equals_the_official_numbers():
    golden = NUMBERS["rpb_geometric_6to7"]
    assert geometric_positions(11, 13) == pytest.approx(golden["src_positions"], abs=1e-12)
    table = torch.sin(0.1 * torch.arange(121, dtype=torch.float64)[:, None] + torch.arange(3))
    got = resize_bias_table_geometric(table, 7)
    assert got.sum().item() == pytest.approx(golden["sum"], abs=1e-4)
    for row in (0, 84, 168):
        expected = torch.tensor(golden[f"out[{row}]"], dtype=torch.float64)
        torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-6)


def test_spline_equals_scipy():
    interpolate = pytest.importorskip("scipy.interpolate")
    generator = torch.Generator().manual_seed(0)
    for old, new in ((3, 8), (7, 12), (12, 6)):
        side, positions = 2 * old - 1, geometric_positions(2 * old - 1, 2 * new - 1)
        table = torch.randn(side * side, 1, generator=generator, dtype=torch.float64)
        wanted = (torch.arange(2 * new - 1, dtype=torch.float64) - (new - 1)).clamp(positions[0], positions[-1])
        spline = interpolate.RectBivariateSpline(positions, positions, table.view(side, side).numpy(), s=0)
        expected = torch.from_numpy(spline(wanted.numpy(), wanted.numpy())).reshape(-1, 1)
        torch.testing.assert_close(resize_bias_table_geometric(table, new), expected, rtol=0, atol=1e-12)


def test_windows_of_bias_networks_are_noted():
    source = tiny("swinv2", seed=1)
    model = tiny("swinv2", img_size=(64, 64), window_size=8, seed=2)
    report = load_official(model, official(source))
    assert "pretrained_window_sizes=[4, 4]" in report.notes[0]
    told = tiny("swinv2", img_size=(64, 64), window_size=8, pretrained_window_sizes=(4, 4), seed=2)
    assert load_official(told, official(source)).notes == []
    # A fine-tuned file has the model's window but other coordinates.
    assert "pretrained_window_sizes=[4, 4]" in load_official(model, official(told)).notes[0]


def test_head_from_22k_to_1k_classes_by_the_map():
    ids = read_class_map()
    file = Path(official_module.__file__).parent.parent / "data" / "map22kto1k.txt"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (len(ids), ids[:3], ids[-1]) == (1000, [359, 368, 460], 21817)
    assert digest == "4fff66d6f337db6dd0b41d1b6c863e617f9400d37892df630eecfcfa50131aab"
    source, model = tiny("swin", num_classes=CLASSES_22K, seed=1), tiny("swin", num_classes=1000, seed=2)
    report = load_official(model, official(source))
    torch.testing.assert_close(model.head.weight, source.head.weight[ids], rtol=0, atol=0)
    torch.testing.assert_close(model.head.bias, source.head.bias[ids], rtol=0, atol=0)
    assert [name for name, _ in report.interpolated] == ["head.weight", "head.bias"]


def test_head_of_other_classes_is_zeroed_and_told():
    source, model = tiny("swin", seed=1), tiny("swin", num_classes=7, seed=2)
    report = load_official(model, official(source))
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    assert report.reinitialized[0] == ("head.weight", "5 classes in the file, 7 in the model: set to zero")
    headless = tiny("swin", num_classes=0, seed=2)
    assert ("head.bias", "the model has no head") in load_official(headless, official(source)).dropped


def test_early_tutel_files():
    source, model = tiny(seed=1, **CASES["linear"]), tiny(seed=2, **CASES["linear"])
    state = official(source)
    for key in list(state):
        if key.endswith("_num_global_experts"):
            del state[key]
        elif "batched" in key and key.endswith("_bias"):
            state[key] = state[key][:, None]
    load_official(model, state)
    assert_same(model, source.state_dict())
    del state[f"{MOE_BLOCK}.experts.batched_fc2_bias"]
    report = load_official(model, state)
    assert report.reinitialized == [
        ("layers.1.blocks.1.mlp.experts.fc2_bias", "not in the file and not trained: kept at zero")
    ]


def tampered(case: str, change) -> tuple[dict[str, Tensor], dict]:
    state = official(tiny(seed=1, **CASES[case]))
    change(state)
    return state, CASES[case]


TAMPERING = {
    "missing": ("swin", lambda s: s.pop("norm.weight"), "norm.weight: missing in the file"),
    "unexpected": ("swin", lambda s: s.update(extra=torch.zeros(1)), "extra: unexpected"),
    "enorm_without_place": (
        "swinv2",
        lambda s: s.update({f"{BLOCK}.enorm.weight": torch.ones(16)}),
        f"{BLOCK}.enorm.weight: unexpected",
    ),
    "mis_shaped": ("swin", lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm.bias: shape \(3,\) in"),
    "integers": (
        "swin",
        lambda s: s.update({"norm.bias": torch.zeros(32, dtype=torch.int64)}),
        "norm.bias: holds torch.int64",
    ),
    "heads": (
        "swin",
        lambda s: s.update({f"{BLOCK}.attn.relative_position_bias_table": torch.zeros(25, 3)}),
        "bias_table: shape",
    ),
    "no_square": (
        "swin",
        lambda s: s.update({f"{BLOCK}.attn.relative_position_bias_table": torch.zeros(24, 1)}),
        "24 rows are no square",
    ),
    "head_without_bias": ("swin", lambda s: s.pop("head.bias"), "head.bias: missing in the file"),
    "head_width": ("swin", lambda s: s.update({"head.weight": torch.zeros(5, 8)}), "head.weight: shape"),
    "number_of_experts": (
        "linear",
        lambda s: s.update({f"{MOE_BLOCK}._num_global_experts": torch.tensor(8)}),
        "8 experts in the file, 4 in",
    ),
    "one_rank": (
        "linear",
        lambda s: s.update({f"{MOE_BLOCK}.experts.batched_fc1_w": torch.zeros(1, 128, 32)}),
        "a file of one rank",
    ),
    "both_names": (
        "swinv2",
        lambda s: s.update({f"{BLOCK}.attn.rpe_mlp.0.bias": torch.zeros(512)}),
        "in the file twice",
    ),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_what_does_not_fit_is_an_error_and_changes_nothing(kind):
    case, change, said = TAMPERING[kind]
    state, options = tampered(case, change)
    model = tiny(seed=2, **options)
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        load_official(model, state)
    assert_same(model, before)


def test_not_strict_loads_the_rest_and_tells():
    source, model = tiny("swin", seed=1), tiny("swin", seed=2)
    before = snapshot(model)
    state = official(source) | {"extra": torch.zeros(1), "norm.bias": torch.zeros(3)}
    del state["norm.weight"]
    report = load_official(model, state, strict=False)
    kept = {name: before[name] for name in ("norm.weight", "norm.bias")}
    assert_same(model, source.state_dict() | kept)
    assert [name for name, _ in report.reinitialized] == ["norm.weight", "norm.bias"]
    assert report.dropped[-1][0] == "extra"


def test_all_problems_are_listed_at_once():
    state = official(tiny("swin", seed=1))
    del state["norm.weight"], state["norm.bias"]
    with pytest.raises(ValueError, match=r"\(2 tensors\): norm.bias: missing in the file; norm.weight: missing"):
        load_official(tiny("swin"), state)


@pytest.mark.parametrize(
    ("state", "said"),
    [({}, "not an official state dict"), ({"model": 3}, "model is int"), ({"epoch": 3}, "'epoch' is a int")],
)
def test_other_files_are_refused(state, said):
    with pytest.raises(ValueError, match=said):
        load_official(tiny("swin"), state)


def test_a_meta_model_and_an_unknown_rule_are_refused():
    with torch.device("meta"):
        model = build_model(ModelConfig(name="swin"))
    with pytest.raises(ValueError, match="meta device"):
        load_official(model, {"norm.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="interpolation must be"):
        load_official(tiny("swin"), {}, interpolation="linear")


def test_tables_of_a_tiny_window_have_no_geometric_rule():
    with pytest.raises(ValueError, match="window of at least 3, the file's is 2"):
        resize_bias_table_geometric(torch.zeros(9, 1), 4)


def test_frozen_bias_that_is_not_zero_is_loaded_and_told():
    """The official module keeps it frozen, but computes with what the file holds."""
    key = f"{MOE_BLOCK}.experts.batched_fc2_bias"
    state, options = tampered("linear", lambda s: s.update({key: torch.ones(4, 32)}))
    model = tiny(seed=2, **options)
    report = load_official(model, state)
    assert any("fc2_bias is not zero" in note for note in report.notes)
    bias = model.layers[1].blocks[1].mlp.experts.fc2_bias
    assert torch.equal(bias, torch.ones(4, 32)) and not bias.requires_grad
