"""Every shipped config: loads, builds, and has the published size where a table has a row.

Parameters and multiply-accumulates are those of the official code, run once (facts, not estimates).
"""

import pytest
import torch

from swin_moe.config.io import config_files, load_config
from swin_moe.models.build import build_model

NAMES = sorted(p.stem for p in config_files() if not p.stem.startswith("base_"))
ONE_K = ("model.num_classes=1000", "model.extra_norm_every=0")

# name: (parameters with head, 1e9 multiply-accumulates or None)
PUBLISHED = {
    "swin_tiny_patch4_window7_224": (28_288_354, 4.494405),
    "swin_small_patch4_window7_224": (49_606_258, 8.746520),
    "swin_base_patch4_window7_224": (87_768_224, 15.438473),
    "swin_base_patch4_window12_384_finetune": (87_903_584, 47.105253),
    "swin_base_patch4_window12_384_22kto1k_finetune": (87_903_584, 47.105253),
    "swin_large_patch4_window7_224_22kto1k_finetune": (196_532_476, 34.487049),
    "swin_large_patch4_window12_384_22kto1k_finetune": (196_735_516, 103.952265),
    "swin_tiny_patch4_window7_224_22k": (44_315_083, 4.510411),
    "swin_small_patch4_window7_224_22k": (65_632_987, 8.762526),
    "swin_base_patch4_window7_224_22k": (109_130_249, 15.459814),
    "swin_large_patch4_window7_224_22k": (228_565_093, 34.519061),
    "swin_tiny_c24_patch4_window8_256": (28_306_432, 5.926042),
    "swinv2_tiny_patch4_window8_256": (28_347_154, 5.925698),
    "swinv2_tiny_patch4_window16_256": (28_347_154, 6.605175),
    "swinv2_small_patch4_window8_256": (49_728_418, 11.514870),
    "swinv2_small_patch4_window16_256": (49_728_418, 12.647332),
    "swinv2_base_patch4_window8_256": (87_918_816, 20.285661),
    "swinv2_base_patch4_window16_256": (87_918_816, 21.795611),
    "swinv2_base_patch4_window12to16_192to256_22kto1k_ft": (87_918_816, 21.795611),
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft": (87_918_816, 54.748340),
    "swinv2_large_patch4_window12to16_192to256_22kto1k_ft": (196_739_932, 47.490920),
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft": (196_739_932, 115.416895),
    "swinv2_base_patch4_window12_192_22k": (109_280_841, 11.782239),
    "swinv2_large_patch4_window12_192_22k": (228_772_549, 25.996955),
    "swin_mlp_tiny_c24_patch4_window8_256": (20_386_632, 4.031920),
    "swin_mlp_tiny_c12_patch4_window8_256": (21_152_072, 4.031920),
    "swin_mlp_tiny_c6_patch4_window8_256": (22_682_952, 4.031920),
    "swin_mlp_base_patch4_window7_224": (60_659_416, 10.419613),
    "simmim_pretrain__swin_base__img192_window6__800ep": (86_725_304 - 128, None),  # encoder, less the mask token
    "simmim_pretrain__swinv2_base__img192_window12__800ep": (86_893_944 - 128, None),
    "swin_moe_small_patch4_window12_192_densebaseline_22k": (65_757_553, 6.7560),
    "swin_moe_small_patch4_window12_192_8expert_32gpu_22k": (173_257_585, 7.1806),
    "swin_moe_small_patch4_window12_192_16expert_32gpu_22k": (296_109_937, 7.1806),
    "swin_moe_small_patch4_window12_192_32expert_32gpu_22k": (541_814_641, 7.1806),
    "swin_moe_small_patch4_window12_192_cosine_router_32expert_32gpu_22k": (542_845_307, 7.1806),
    "swin_moe_small_patch4_window12_192_64expert_64gpu_22k": (1_033_224_049, 7.1806),
    "swin_moe_small_patch4_window12_192_128expert_22k": (2_016_042_865, 7.1806),
    "swin_moe_base_patch4_window12_192_densebaseline_22k": (109_284_049, 11.7825),
    "swin_moe_base_patch4_window12_192_8expert_32gpu_22k": (300_327_633, 12.5375),
    "swin_moe_base_patch4_window12_192_16expert_32gpu_22k": (518_656_721, 12.5375),
    "swin_moe_base_patch4_window12_192_32expert_32gpu_22k": (955_314_897, 12.5375),
    "swin_moe_base_patch4_window12_192_cosine_router_32expert_32gpu_22k": (956_660_955, 12.5375),
    "swin_moe_base_patch4_window12_192_32expert_top2_22k": (955_314_897, 14.80),
}
# The same with 1000 classes and the extra norms off, and what the extra norms add.
SCALE = {
    "swinv2_huge_patch4_window12_192": (658_027_922, 85.752, 8_448),
    "swinv2_giant_1b_patch4_window12_192": (1_064_561_996, 138.272, 10_752),
    "swinv2_giant_3b_patch4_window12_192_22k": (3_001_912_008, 370.737, 28_672),
}


def build(name: str, *overrides: str):
    """Returns the model on meta."""
    with torch.device("meta"):
        return build_model(load_config(name, overrides).model)


def count(model) -> int:
    """Returns the trained parameters, as the official log counts them: without the frozen fc2 biases of experts."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_names_are_unique_and_runs_are_named_after_them():
    assert len(set(NAMES)) == len(NAMES)
    assert [load_config(name).run.name for name in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_at_its_published_size(name):
    model = build(name)
    parameters, macs = PUBLISHED.get(name, (0, None))
    if parameters:
        assert count(model) == parameters
    if macs:
        assert model.flops() / 1e9 == pytest.approx(macs, abs=0.51 * 10 ** -len(f"{macs:.10g}".partition(".")[2]))


@pytest.mark.parametrize("name", SCALE)
def test_never_released_sizes(name):
    parameters, macs, extra = SCALE[name]
    plain = build(name, *ONE_K)
    assert count(plain) == parameters
    assert plain.flops() / 1e9 == pytest.approx(macs, abs=5.1e-4)
    assert count(build(name, ONE_K[0])) == parameters + extra


def test_every_table_row_has_its_config():
    assert set(PUBLISHED) | set(SCALE) <= set(NAMES)


@pytest.mark.parametrize("path", config_files(), ids=lambda p: p.stem)
def test_every_file_tells_where_it_comes_from(path):
    text = path.read_text(encoding="ascii")
    assert text.startswith("# ")
    assert max(map(len, text.splitlines())) <= 120
