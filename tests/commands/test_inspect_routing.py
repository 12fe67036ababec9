"""What is recorded of a forward's routing and how it is drawn."""

import numpy as np
import pytest
import torch
from torch import Tensor

import swin_moe
from swin_moe import inspect_routing
from swin_moe.inspect_routing import RoutingRecorder, _picture_paths
from swin_moe.run.routing_pictures import ClassLoad, PatchMap, draw_classes, draw_patches, expert_colour, heat

SMALL = dict(
    img_size=(32, 48),
    patch_size=4,
    num_classes=3,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[1, 2],
    window_size=4,
    moe_blocks=[[1], [0]],
    num_experts=4,
)


@pytest.fixture
def recorded():
    """Returns (recorder, router logits per layer) of a forward of 3 images, one of them of another kind."""
    model = swin_moe.create_model("swin_moe", **SMALL).eval()
    logits: dict[str, Tensor] = {}
    recorder = RoutingRecorder(model)
    for name, block, _ in recorder.blocks:
        block.mlp.router.register_forward_hook(lambda *a, name=name: logits.update({name: a[2]}))
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with recorder.recording(), torch.inference_mode():
        model(images)
    return recorder, logits


def test_maps_are_the_router_s_first_choices_in_row_order(recorded):
    recorder, logits = recorded
    for image in range(3):
        maps = recorder.patch_maps(image)
        assert [(m.layer, m.expert.shape) for m in maps] == [
            ("layers.0.blocks.1", (8, 12)),
            ("layers.1.blocks.0", (4, 6)),
        ]
        for found in maps:
            first = logits[found.layer].argmax(dim=1).view(3, *found.expert.shape)[image]
            assert (found.expert == first.numpy()).all()


def test_load_by_class_counts_every_pair_once(recorded):
    recorder, logits = recorded
    target = torch.tensor([2, 0, 2])
    for name, table in recorder.load_by_class(target, 3).items():
        choice = logits[name].argmax(dim=1).view(3, -1)
        for expert in range(4):
            for label in range(3):
                assert table[expert, label] == (choice[target == label] == expert).sum()
    assert all(layer.observer is None for *_, layer in recorder.blocks)


def test_a_patch_has_its_expert_s_colour_and_a_dropped_one_is_crossed_out():
    expert = np.array([[0, 1], [1, 2]])
    kept = np.array([[True, True], [True, False]])
    picture = np.asarray(draw_patches(np.full((8, 8, 3), 128, np.uint8), [PatchMap("layer", expert, kept)], 4, tile=80))
    left, top = 12 + 80 + 12, 12 + 18
    middle = [[tuple(picture[top + 40 * r + 10, left + 40 * c + 20]) for c in range(2)] for r in range(2)]
    assert middle[0][1] == middle[1][0]
    assert len({middle[0][0], middle[0][1], middle[1][1]}) == 3
    area = picture[top : top + 80, left : left + 80]
    patches = [area[40 * r : 40 * (r + 1), 40 * c : 40 * (c + 1)] for r, c in np.ndindex(2, 2)]
    assert [(patch.reshape(-1, 3).sum(axis=1) == 0).any() for patch in patches] == [False, False, False, True]


def test_class_heat_map_shows_shares():
    tokens = np.array([[10, 0, 0], [0, 5, 0]])
    picture = np.asarray(draw_classes([ClassLoad("layer", tokens)], ["a", "b", "c"], width=400))
    cell = (400 - 60) // 3 if (400 - 60) // 3 < 48 else 48
    row = [tuple(picture[12 + 18 + 18 + 5, 60 + cell * k + cell // 2]) for k in range(3)]
    assert row[0] == tuple(heat(np.array(1.0))) and row[1] == (255, 255, 255) and row[2] == (225, 225, 225)


def test_colours_of_experts_differ():
    assert len({expert_colour(e) for e in range(128)}) == 128
    near = np.array([expert_colour(e) for e in range(24)], dtype=float)
    distance = np.abs(near[:, None] - near).sum(axis=2) + 1000 * np.eye(24)
    assert distance.min() > 40


def test_two_files_never_share_a_picture(tmp_path):
    paths = _picture_paths(["a/x.jpg", "b/x.jpg", "classes.jpg"], tmp_path)
    assert [p.name for p in paths] == ["x.png", "x-2.png", "classes-2.png"]


def test_experts_that_choose_are_counted_for_their_patches_only():
    model = swin_moe.create_model("swin_moe", **SMALL, choice="expert", balance_loss="none").eval()
    recorder = RoutingRecorder(model)
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with recorder.recording(), torch.inference_mode():
        model(images)
    for name, table in recorder.load_by_class(torch.tensor([2, 0, 2]), 3).items():
        tokens = recorder.routings[name].expert.shape[0] // 3
        each = int(1.25 * -(-tokens // 4))  # of every expert from every image
        assert table.tolist() == [[each, 0, 2 * each]] * 4
        assert not recorder.routings[name].is_pair.all()  # some patches have fewer experts than others


def test_any_network_with_experts_is_drawn(tmp_path, monkeypatch):
    """Also SwinV2-MoE, which was once told that it has no MoE layer."""

    class Reached(Exception):
        pass

    def build(session):
        raise Reached

    monkeypatch.setattr(inspect_routing, "build_classifier", build)
    words = ["digits_swin_moe", "model.name=swinv2", "data.name=synthetic", f"run.output={tmp_path}"]
    with pytest.raises(Reached):
        inspect_routing.main(words)
    with pytest.raises(ValueError, match="has no MoE layer"):
        inspect_routing.main([*words, "model.moe.blocks=[]"])
