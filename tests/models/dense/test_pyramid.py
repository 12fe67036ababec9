"""The backbone of dense tasks: the official outputs at odd sizes, every family, positions, frozen stages."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.models import SwinTransformer
from swin_moe.models.dense import FPN, PyramidBackbone
from swin_moe.randomness import RandomContext
from tests.models.dense.golden import error, fill_network, image, load

SMALL = ModelConfig(name="swin", img_size=(64, 64), embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 4))
MOE = MoEConfig(blocks=((-1,), (1,), (1,)), num_experts=4, capacity_factor=0.0)
FAMILIES = {
    "swin": SMALL,
    "swinv2": replace(SMALL, name="swinv2", window_size=4),
    "swin_mlp": replace(SMALL, name="swin_mlp", window_size=4),
    "swin_moe": replace(SMALL, name="swin_moe", window_size=4, moe=MOE),
    "v2_moe": replace(SMALL, name="swinv2", window_size=4, moe=MOE),
}


def official(config: dict[str, Any]) -> PyramidBackbone:
    """Returns the network of an official configuration."""
    given = {key: value for key, value in config.items() if key != "type"}
    nominal = given.pop("pretrain_img_size", 224)
    stages = given.pop("out_indices", (0, 1, 2, 3))
    given |= {key: tuple(given[key]) for key in ("depths", "num_heads")}
    return PyramidBackbone(ModelConfig(name="swin", img_size=(nominal,) * 2, **given), out_indices=stages)


@pytest.mark.parametrize("name", ["backbone_w7", "backbone_ape_indices"])
def test_maps_are_the_official_ones_at_any_size(name):
    golden = load(name)
    network = official(golden["config"]).eval()
    fill_network(network, golden)
    assert sum(p.numel() for p in network.parameters()) == golden["params"]
    for case in golden["cases"]:
        height, width = case["size"]
        maps = network(image((1, 3, height, width), f"{name}/{height}x{width}")).maps
        assert [error(r, m) for r, m in zip(case["outs"], maps, strict=True)] == pytest.approx(
            [0] * len(maps), abs=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_the_classifiers_stages_with_other_norms(family):
    config = FAMILIES[family]
    torch.manual_seed(0)
    network = PyramidBackbone(config).eval()
    network.init_weights(1)
    classifier = SwinTransformer(network.config).eval()
    ours = network.state_dict()
    missing, unexpected = classifier.load_state_dict({k: v for k, v in ours.items()}, strict=False)
    assert set(missing) == {"norm.weight", "norm.bias"} and all(k.startswith("norm") for k in unexpected)
    classifier.norm = torch.nn.Identity()
    x = torch.randn(2, 3, 57, 75)
    want = classifier.encode(x, range(4))
    got = network(x)
    for index, (a, b) in enumerate(zip(got.maps, want.maps, strict=True)):
        norm = network.get_submodule(f"norm{index}")
        torch.testing.assert_close(a, norm(b.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert (got.aux is None) == (want.aux is None) == (not config.moe.has_blocks)
    if got.aux is not None and want.aux is not None:
        torch.testing.assert_close(got.aux, want.aux)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_stay_whole_and_shifted_whatever_the_nominal_size(family):
    config = replace(FAMILIES[family], img_size=(32, 32))
    network = PyramidBackbone(config)
    for stage in network.layers:
        assert [block.mixer.window for block in stage.blocks] == [config.window_size] * 2
        assert [block.shift(nominal=False) for block in stage.blocks] == [0, config.window_size // 2]
    network.eval().init_weights(0)
    whole = PyramidBackbone(replace(config, img_size=(512, 512))).eval()
    if family not in ("swinv2", "v2_moe", "swin_moe"):  # their bias is in units of the window of pre-training
        whole.load_state_dict(network.state_dict())
        x = torch.randn(1, 3, 32, 32)
        for a, b in zip(network(x).maps, whole(x).maps):
            torch.testing.assert_close(a, b)


def test_bias_networks_keep_the_bias_of_the_smaller_windows_they_were_trained_in():
    config = replace(FAMILIES["swinv2"], img_size=(64, 64), window_size=4)  # the last stage has maps of 2 x 2
    classifier, network = SwinTransformer(config), PyramidBackbone(config)
    classifier.init_weights(0)
    network.load_state_dict(classifier.state_dict(), strict=False)
    small, whole = (n.layers[3].blocks[0].attn for n in (classifier, network))
    assert (small.window, whole.window) == (2, 4)
    table = whole.bias_table().view(7, 7, -1)
    torch.testing.assert_close(table[2:5, 2:5], small.bias_table().view(3, 3, -1))


def test_frozen_stages_are_those_that_are_named():
    for frozen, learning in {
        -1: ("patch_embed", "layers.0", "layers.1", "norm0"),
        0: ("layers.0", "layers.1", "norm0"),
        1: ("layers.1", "norm1"),
        2: ("layers.2", "norm2"),
    }.items():
        network = PyramidBackbone(replace(SMALL, drop_path_rate=0.5, ape=True), frozen_stages=frozen).train()
        network.init_weights(0)
        x = torch.randn(2, 3, 40, 40)
        sum(m.sum() for m in network(x).maps).backward()
        got = {name for name, p in network.named_parameters() if p.grad is not None}
        stages = ["patch_embed", "absolute_pos_embed", *(f"layers.{i}" for i in range(4))]
        norms = [f"norm{i}" for i in range(max(frozen, 0), 4)]
        wanted = tuple(
            f"{s}." if s != "absolute_pos_embed" else s for s in stages[2 * (frozen >= 0) + max(frozen, 0) :]
        )
        wanted += tuple(f"{n}." for n in norms)
        assert got == {name for name, _ in network.named_parameters() if name.startswith(wanted)}
        assert any(name.startswith(learning[0]) for name in got)
        if frozen > 0:  # nothing is dropped in what is frozen
            draws = [RandomContext(seed, 0, torch.arange(2)) for seed in (0, 1)]
            first, second = (network(x, draw).maps for draw in draws)
            assert torch.equal(first[frozen - 1], second[frozen - 1])
            assert not torch.equal(first[-1], second[-1])


def test_what_no_map_depends_on_does_not_learn():
    network = PyramidBackbone(SMALL, out_indices=(0, 2))
    network.init_weights(0)
    sum(m.sum() for m in network(torch.randn(1, 3, 33, 65)).maps).backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("options", [{"out_indices": (1, 0)}, {"out_indices": (0, 4)}, {"frozen_stages": 5}])
def test_stages_that_are_not_there_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PyramidBackbone(SMALL, **options)


def test_fpn_adds_the_nearest_pixel_of_the_coarser_map():
    fpn = FPN((2, 3), 4, levels=4)
    assert set(fpn.state_dict()) == {
        f"{part}.{i}.conv.{kind}"
        for part in ("lateral_convs", "fpn_convs")
        for i in (0, 1)
        for kind in ("weight", "bias")
    }
    fine, coarse = torch.randn(1, 2, 5, 7), torch.randn(1, 3, 3, 4)
    out = fpn([fine, coarse])
    assert [tuple(m.shape[2:]) for m in out] == [(5, 7), (3, 4), (2, 2), (1, 1)]
    lateral = fpn.lateral_convs[0](fine)
    above = fpn.lateral_convs[1](coarse)
    for row in range(5):
        for column in range(7):
            lateral[0, :, row, column] += above[0, :, row * 3 // 5, column * 4 // 7]
    torch.testing.assert_close(out[0], fpn.fpn_convs[0](lateral))
    torch.testing.assert_close(out[2], out[1][..., ::2, ::2])
