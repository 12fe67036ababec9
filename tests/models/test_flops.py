"""Parameter and multiply-accumulate counts against the official code and papers, on meta."""

import pytest
import torch

from swin_moe import create_model
from swin_moe.models.flops import count_parameters
from swin_moe.models.heads import MaskedImageModel
from swin_moe.models.swin import SwinTransformer

T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
S = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}
B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
L = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}
H = {"embed_dim": 352, "depths": [2, 2, 18, 2], "num_heads": [11, 22, 44, 88]}
GIANT = {"embed_dim": 448, "depths": [2, 2, 18, 2], "num_heads": [14, 28, 56, 112]}
G = {"embed_dim": 512, "depths": [2, 2, 42, 4], "num_heads": [16, 32, 64, 128]}
NO_HEAD = {"num_classes": 0}
K22 = {"num_classes": 21841}


def size(img: int, window: int) -> dict:
    return {"img_size": img, "window_size": window}


# (family, arguments, parameters, GMACs rounded to 6 digits; None = not recorded). Source: the official classes, run.
DENSE = {
    "swin_t": ("swin", T | size(224, 7), 28_288_354, 4.494405),
    "swin_s": ("swin", S | size(224, 7), 49_606_258, 8.746520),
    "swin_b": ("swin", B | size(224, 7), 87_768_224, 15.438473),
    "swin_b_384": ("swin", B | size(384, 12), 87_903_584, 47.105253),
    "swin_l": ("swin", L | size(224, 7), 196_532_476, 34.487049),
    "swin_l_384": ("swin", L | size(384, 12), 196_735_516, 103.952265),
    "swin_t_backbone": ("swin", T | size(224, 7) | NO_HEAD, 27_519_354, None),
    "swin_s_backbone": ("swin", S | size(224, 7) | NO_HEAD, 48_837_258, None),
    "swin_b_backbone": ("swin", B | size(224, 7) | NO_HEAD, 86_743_224, None),
    "swin_b_384_backbone": ("swin", B | size(384, 12) | NO_HEAD, 86_878_584, None),
    "swin_l_backbone": ("swin", L | size(224, 7) | NO_HEAD, 194_995_476, None),
    "swin_l_384_backbone": ("swin", L | size(384, 12) | NO_HEAD, 195_198_516, None),
    "swin_t_22k": ("swin", T | size(224, 7) | K22, 44_315_083, 4.510411),
    "swin_s_22k": ("swin", S | size(224, 7) | K22, 65_632_987, 8.762526),
    "swin_b_22k": ("swin", B | size(224, 7) | K22, 109_130_249, 15.459814),
    "swin_l_22k": ("swin", L | size(224, 7) | K22, 228_565_093, 34.519061),
    "swin_t_c24": ("swin", T | size(256, 8) | {"num_heads": [4, 8, 16, 32]}, 28_306_432, 5.926042),
    "swinv2_t_w8": ("swinv2", T | size(256, 8), 28_347_154, 5.925698),
    "swinv2_t_w16": ("swinv2", T | size(256, 16), 28_347_154, 6.605175),
    "swinv2_t_backbone": ("swinv2", T | size(256, 8) | NO_HEAD, 27_578_154, None),
    "swinv2_s_w8": ("swinv2", S | size(256, 8), 49_728_418, 11.514870),
    "swinv2_s_w16": ("swinv2", S | size(256, 16), 49_728_418, 12.647332),
    "swinv2_s_backbone": ("swinv2", S | size(256, 8) | NO_HEAD, 48_959_418, None),
    "swinv2_b_w8": ("swinv2", B | size(256, 8), 87_918_816, 20.285661),
    "swinv2_b_w16": ("swinv2", B | size(256, 16), 87_918_816, 21.795611),
    "swinv2_b_w24": ("swinv2", B | size(384, 24), 87_918_816, 54.748340),
    "swinv2_b_backbone": ("swinv2", B | size(256, 8) | NO_HEAD, 86_893_816, None),
    "swinv2_l_w16": ("swinv2", L | size(256, 16), 196_739_932, 47.490920),
    "swinv2_l_w24": ("swinv2", L | size(384, 24), 196_739_932, 115.416895),
    "swinv2_l_backbone": ("swinv2", L | size(256, 16) | NO_HEAD, 195_202_932, None),
    "swinv2_b_22k": ("swinv2", B | size(192, 12) | K22, 109_280_841, 11.782239),
    "swinv2_l_22k": ("swinv2", L | size(192, 12) | K22, 228_772_549, 25.996955),
    "swin_mlp_c24": ("swin_mlp", T | size(256, 8) | {"num_heads": [4, 8, 16, 32]}, 20_386_632, 4.031920),
    "swin_mlp_c12": ("swin_mlp", T | size(256, 8) | {"num_heads": [8, 16, 32, 64]}, 21_152_072, 4.031920),
    "swin_mlp_c6": ("swin_mlp", T | size(256, 8) | {"num_heads": [16, 32, 64, 128]}, 22_682_952, 4.031920),
    "swin_mlp_b": ("swin_mlp", B | size(224, 7), 60_659_416, 10.419613),
    "swin_mlp_b_backbone": ("swin_mlp", B | size(224, 7) | NO_HEAD, 59_634_416, None),
    "swinv2_h": ("swinv2", H | size(192, 12), 658_027_922, None),
    "swinv2_h_backbone": ("swinv2", H | size(192, 12) | NO_HEAD, 655_210_922, None),
    "swinv2_giant": ("swinv2", GIANT | size(192, 12), 1_064_561_996, None),
    "swinv2_giant_backbone": ("swinv2", GIANT | size(192, 12) | NO_HEAD, 1_060_976_996, None),
    "swinv2_G": ("swinv2", G | size(192, 12), 3_001_912_008, None),
    "swinv2_G_backbone": ("swinv2", G | size(192, 12) | NO_HEAD, 2_997_815_008, None),
    "swinv2_G_shallow": ("swinv2", G | size(192, 12) | {"depths": [2, 2, 42, 2]}, 2_599_026_120, None),
    "swinv2_G_extra_norms": ("swinv2", G | size(192, 12) | {"extra_norm_every": 6}, 3_001_940_680, None),
    "swinv2_h_extra_norms": ("swinv2", H | size(192, 12) | {"extra_norm_every": 6}, 658_036_370, None),
}
# GMACs recorded with fewer digits.
ROUNDED = {
    "swinv2_h": (85.752, 3),
    "swinv2_giant": (138.272, 3),
    "swinv2_G": (370.737, 3),
    "swinv2_G_shallow": (356.220, 3),
}

MOE = (
    size(192, 12)
    | K22
    | {
        "mlp_fc2_bias": False,
        "init_std": 0.005,
        "is_gshard_loss": False,
        "moe_drop": 0.1,
        "moe_blocks": [[-1], [-1], [1, 3, 5, 7, 9, 11, 13, 15, 17], [1]],
    }
)
NO_EXPERTS = {"moe_blocks": [[-1]] * 4}
COSINE = {"cosine_router": True}
# (arguments, parameters, GMACs). Source: Tutel paper (arXiv:2206.03382) Table 11 and the official classes with Tutel.
SWIN_MOE = {
    "s_dense": (S | MOE | NO_EXPERTS, 65_757_553, 6.7560),
    "s_8": (S | MOE | {"num_experts": 8}, 173_257_585, 7.1806),
    "s_16": (S | MOE | {"num_experts": 16}, 296_109_937, 7.1806),
    "s_32": (S | MOE | {"num_experts": 32}, 541_814_641, 7.1806),
    "s_32_cosine": (S | MOE | COSINE | {"num_experts": 32}, 542_845_307, 7.1806),
    "s_64": (S | MOE | {"num_experts": 64}, 1_033_224_049, 7.1806),
    "s_128": (S | MOE | {"num_experts": 128}, 2_016_042_865, 7.1806),
    "b_dense": (B | MOE | NO_EXPERTS, 109_284_049, 11.7825),
    "b_8": (B | MOE | {"num_experts": 8}, 300_327_633, 12.5375),
    "b_16": (B | MOE | {"num_experts": 16}, 518_656_721, 12.5375),
    "b_32": (B | MOE | {"num_experts": 32}, 955_314_897, 12.5375),
    "b_32_cosine": (B | MOE | COSINE | {"num_experts": 32}, 956_660_955, 12.5375),
}
# Tutel paper, Table 12: GMACs of Swin-MoE-B by (top-k, capacity factor).
CAPACITIES = {
    (1, 1.25): 12.54,
    (1, 1.0): 11.78,
    (1, 0.625): 10.65,
    (1, 0.5): 10.27,
    (2, 1.25): 16.31,
    (2, 1.0): 14.80,
}


def build(family: str, **arguments) -> SwinTransformer:
    with torch.device("meta"):
        return create_model(family, **arguments)


@pytest.mark.parametrize("case", DENSE)
def test_dense_counts(case):
    family, arguments, parameters, gmacs = DENSE[case]
    model = build(family, **arguments)
    assert count_parameters(model) == parameters
    gmacs, digits = ROUNDED.get(case, (gmacs, 6))
    if gmacs is not None:
        assert round(model.flops() / 1e9, digits) == gmacs
    assert model.active_flops() == model.flops()


@pytest.mark.parametrize("case", SWIN_MOE)
def test_swin_moe_counts(case):
    arguments, parameters, gmacs = SWIN_MOE[case]
    model = build("swin_moe", **arguments)
    assert count_parameters(model) == parameters
    assert round(model.flops() / 1e9, 4) == gmacs


@pytest.mark.parametrize(("top_k", "factor"), CAPACITIES)
def test_capacity_factor_and_top_k_scale_the_experts(top_k, factor):
    model = build("swin_moe", **B, **MOE, num_experts=32, top_value=top_k, capacity_factor=factor)
    assert round(model.flops() / 1e9, 2) == CAPACITIES[top_k, factor]
    # Whatever the capacity, a token is computed by its top-k experts.
    assert round(model.active_flops() / 1e9, 2) == CAPACITIES[top_k, 1.0]


def test_other_routers_cost_what_they_compute():
    moe = {"moe_blocks": [[-1], [-1], [1], [-1]], "num_experts": 4, "top_value": 2, "img_size": 64, "window_size": 4}
    plain = build("swin_moe", **moe)
    one = 2 * 4 * 4 * 384 * 1536  # one pass of the 16 tokens of the third stage through one expert
    active = plain.active_flops()
    shared = build("swin_moe", **moe, shared_experts=3)
    assert shared.active_flops() == active + 3 * one and shared.flops() == plain.flops() + 3 * one
    assert count_parameters(shared) == count_parameters(plain) + 384 * 4608 * 2 + 4608 + 384
    chosen = build("swin_moe", **moe, choice="expert", balance_loss="none", capacity_factor=1.5)
    assert chosen.active_flops() == active + one and chosen.flops() == chosen.active_flops()
    soft = build("swin_moe", **moe | {"top_value": 1}, choice="soft", balance_loss="none", slots=6)
    # 24 slots for 16 tokens, and twice 24 x 16 x 384 to mix; plain has two passes.
    assert soft.active_flops() == pytest.approx(active - 2 * one + one * 24 / 16 + 2 * 24 * 16 * 384, rel=1e-12)
    balanced = build("swin_moe", **moe, scores="sigmoid", balance_loss="none")
    assert count_parameters(balanced) == count_parameters(plain)  # a bias that no gradient moves is not counted


@pytest.mark.parametrize(
    ("family", "window", "parameters", "gmacs"),
    [("swin", 6, 89_874_104, 11.282375), ("swinv2", 12, 90_042_744, 11.759874)],
)
def test_masked_image_model_counts(family, window, parameters, gmacs):
    config = build(family, **B, **NO_HEAD, **size(192, window)).config
    with torch.device("meta"):
        model = MaskedImageModel(SwinTransformer(config, mask_token=True))
    assert count_parameters(model) == parameters
    assert round(model.encoder.flops() / 1e9, 6) == gmacs


def test_v2_g_at_640_pixels():
    assert round(build("swinv2", **G, **size(640, 40)).flops() / 1e9, 1) == 4639.3
