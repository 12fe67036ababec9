"""Logits and every gradient norm against the official implementation's recorded outputs."""

import json

import pytest
import torch

from swin_moe import create_model
from swin_moe.models.heads import MaskedImageModel, masked_l1, normalize_targets
from swin_moe.models.swin import SwinTransformer
from swin_moe.ops.extension import available
from tests.models.reference import (
    GOLDEN,
    NUMBERS,
    SMALL,
    fill_by_name,
    fill_by_rank,
    gradient_norms,
    normal,
    official_name,
    relative_error,
)

BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask", "_num_global_experts")
TOLERANCE = 1e-5
ATTENTION = [
    "auto",
    "sdpa",
    "analytic",
    "reference",
    pytest.param("fused", marks=pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")),
]

DENSE = {
    "swin_tiny_patch4_window7_224": ("swin", {}),
    "swinv2_tiny_patch4_window8_256": ("swinv2", {"img_size": 256, "window_size": 8}),
    "swin_mlp_tiny_c24_patch4_window8_256": (
        "swin_mlp",
        {"img_size": 256, "window_size": 8, "num_heads": [4, 8, 16, 32]},
    ),
    "swin_micro_ape_nobias": (
        "swin",
        {
            "img_size": 112,
            "num_classes": 11,
            "embed_dim": 24,
            "depths": [1, 3, 2],
            "num_heads": [1, 2, 4],
            "mlp_ratio": 3.0,
            "ape": True,
            "qkv_bias": False,
        },
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_logits_and_gradients(case):
    check_dense(case, "auto")


@pytest.mark.parametrize("attention", ATTENTION[1:])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.full),
        pytest.param("swinv2_tiny_patch4_window8_256", marks=pytest.mark.full),
        "swin_micro_ape_nobias",
    ],
)
def test_dense_logits_and_gradients_with_every_attention(case, attention):
    check_dense(case, attention)


def check_dense(case, attention):
    family, arguments = DENSE[case]
    golden = torch.load(GOLDEN / "dense" / f"{case}.pt", weights_only=True)
    model = create_model(family, **arguments, attention=attention).eval()
    fill_by_name(model)
    assert {n: list(t.shape) for n, t in model.state_dict().items()} == golden["keys"]
    image = normal(case, (golden["batch"], 3, golden["size"], golden["size"])).float().requires_grad_()
    logits = model(image)
    assert relative_error(logits.detach(), golden["logits"]) < TOLERANCE
    with torch.no_grad():
        assert relative_error(model(image), golden["logits"]) < TOLERANCE
    loss = logits.square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], rel=TOLERANCE)
    assert image.grad.double().norm().item() == pytest.approx(golden["input_grad_norm"], rel=TOLERANCE)
    assert gradient_norms(model) == pytest.approx(golden["grad_norms"], rel=TOLERANCE)
    assert model.flops() == golden["flops"]
    assert sum(p.numel() for p in model.parameters()) == golden["params"]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("routing", ["nodrop", "top1"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_moe_logits_auxiliary_loss_and_gradients(routing, world, attention):
    """Ranks are run one after the other: capacity and balance loss are a rank's own, expert gradients add up."""
    case = f"moe_linear_8e_{routing}"
    golden = torch.load(GOLDEN / "moe" / f"{case}_w{world}.pt", weights_only=True)
    model = create_model("swin_moe", num_experts=golden["experts"], **golden["cfg"], attention=attention).eval()
    fill_by_name(model)
    images = normal(case, (8, 3, 64, 64)).float().chunk(world)
    experts: dict[str, torch.Tensor] = {}
    logits = []
    for rank, image in enumerate(images):
        model.zero_grad()
        out, aux = model(image)
        (out.square().mean() + aux).backward()
        logits.append(out.detach())
        assert aux.item() == pytest.approx(golden["aux"][rank], rel=TOLERANCE)
        expected = golden["grad_norms"][rank]
        norms = {official_name(n): v for n, v in gradient_norms(model).items()}
        dense = [n for n in expected if ".experts." not in n]
        assert {n: norms[n] for n in dense} == pytest.approx({n: expected[n] for n in dense}, rel=TOLERANCE)
        for name, parameter in model.named_parameters():
            if ".experts." in name and parameter.grad is not None:
                experts[official_name(name)] = experts.get(official_name(name), 0) + parameter.grad.double()
    assert relative_error(torch.cat(logits), golden["logits"]) < TOLERANCE
    for rank in range(world):
        for name, expected in golden["grad_norms"][rank].items():
            if ".experts." in name:
                mine = experts[name].chunk(world)[rank]
                assert mine.norm().item() == pytest.approx(expected, rel=TOLERANCE), (rank, name)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("family", "key"), [("swin", "v1"), ("swinv2", "v2"), ("swin_mlp", "mlp")])
def test_small_models_in_float64(family, key, attention):
    golden = NUMBERS[f"{key}_small_img64_w4"]
    model = create_model(family, num_classes=5, **SMALL, attention=attention).double().eval()
    fill_by_rank(model)
    logits = model(_input((2, 3, 64, 64)))
    assert logits.dtype == torch.float64
    weight = torch.cos(torch.arange(5.0, dtype=torch.float64)[None] + torch.arange(2.0, dtype=torch.float64)[:, None])
    loss = (logits * weight).sum()
    loss.backward()
    assert logits.flatten()[:5].tolist() == pytest.approx(golden["logits_first5"], rel=1e-9)
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-9)
    assert sum(v**2 for v in gradient_norms(model).values()) ** 0.5 == pytest.approx(golden["grad_l2"], rel=1e-9)
    assert sum(p.numel() for p in model.parameters()) == golden["n_params"]
    assert model.flops() == golden["flops"]


def test_masked_image_model_in_float64():
    golden = NUMBERS["simmim_v1"]
    with torch.device("meta"):
        config = create_model("swin", num_classes=0, **SMALL).config
    model = MaskedImageModel(SwinTransformer(config, mask_token=True)).double().eval()
    fill_by_rank(model)
    assert sum(p.numel() for p in model.parameters()) == golden["n_params"]
    image = _input((2, 3, 64, 64))
    mask = torch.tensor(golden["mask_2x2_per_img"]).view(2, 2, 2).repeat_interleave(8, 1).repeat_interleave(8, 2)
    reconstruction, aux = model(image, mask)
    assert aux is None
    loss = masked_l1(image, reconstruction, mask, (4, 4))
    loss.backward()
    # Recorded with the mask summed in float32, where the 1e-5 of the divisor is lost.
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-8)
    assert sum(v**2 for v in gradient_norms(model).values()) ** 0.5 == pytest.approx(golden["grad_l2"], rel=1e-8)
    assert model.no_weight_decay() == {"encoder.absolute_pos_embed", "encoder.mask_token"}


def test_normalized_targets_refuse_an_even_window():
    with pytest.raises(ValueError, match="odd, got 46"):
        normalize_targets(torch.zeros(1, 3, 8, 8), 46)


def test_normalized_targets():
    golden = NUMBERS["norm_targets_47"]
    targets = normalize_targets(_input((2, 3, 64, 64)), 47)
    assert targets.flatten()[:5].tolist() == pytest.approx(golden["first5"], rel=1e-9)


# (family, arguments) whose dense names and shapes are those of an official state dict.
NAMES = {
    "swin_tiny_patch4_window7_224": ("swin", {}),
    "swinv2_tiny_patch4_window8_256": ("swinv2", {"img_size": 256, "window_size": 8}),
    "swin_mlp_tiny_c24_patch4_window8_256": DENSE["swin_mlp_tiny_c24_patch4_window8_256"],
    "swin_moe_small_patch4_window12_192_32expert_32gpu_22k": (
        "swin_moe",
        {
            "img_size": 192,
            "window_size": 12,
            "depths": [2, 2, 18, 2],
            "num_classes": 21841,
            "mlp_fc2_bias": False,
            "num_experts": 32,
            "moe_blocks": [[-1], [-1], [1, 3, 5, 7, 9, 11, 13, 15, 17], [1]],
        },
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_state_dict_names_are_the_official_ones(case):
    family, arguments = NAMES[case]
    with torch.device("meta"):
        model = create_model(family, **arguments)
    official = json.loads((GOLDEN / "state_dict_keys.json").read_text())[case]
    official = {n: s for n, s in official.items() if not n.endswith(BUFFERS)}
    ours = {official_name(n): list(t.shape) for n, t in model.state_dict().items()}
    assert set(ours) == set(official)
    for name, shape in official.items():
        if ".experts." not in name:  # the recorded file holds one rank's expert
            assert ours[name] == shape, name


def _input(shape: tuple[int, ...]) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.random.RandomState(12345).standard_normal(shape))
