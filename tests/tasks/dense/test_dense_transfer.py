"""Backbones of any task begin dense ones, and theirs begin any other; heads and output norms stay each one's own."""

import pytest
import torch

from swin_moe.checkpoint.errors import CheckpointError
from tests.tasks.transfer import MOE, begun, trained, untouched, weights

DENSE = (
    "model.name=swin_moe",  # that of the digits' configs
    "data.images_per_class=0",
    "data.dense.canvases=10",
    "data.dense.val_canvases=3",
    "data.dense.canvas_size=[16,20]",
    "data.dense.digit_size=[8,12]",
    "data.dense.divisor=4",
    "task.segment.channels=6",
    "task.segment.auxiliary_channels=4",
    "task.segment.auxiliary_index=1",
    "task.segment.pool_scales=[1,2]",
    "task.segment.pictures=0",
)
THIRTEEN = ("model.num_classes=13", "task.segment.class_weights=[]")
FAMILIES = {"swin": ("model.name=swin",), "swinv2": ("model.name=swinv2",), "moe": MOE}


def same_backbone(new: dict, old: dict, prefix: str) -> set[str]:
    """Returns the names in a dense network's backbone that another network's tensors were taken for."""
    found = set()
    for name, value in new.items():
        inner = prefix + name.removeprefix("backbone.")
        if name.startswith("backbone.") and inner in old and torch.equal(value, old[inner]):
            found.add(name)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("task", "prefix"), [("digits_dense", ""), ("digits_simmim", "encoder.")])
def test_a_backbone_begins_segmentation(tmp_path, task, prefix, family):
    options = FAMILIES[family]
    source = trained(tmp_path, task, *options)
    new, report = begun(tmp_path, "canvas_upernet", source.session.directory, *DENSE, *options)
    after, fresh, old = weights(new), untouched(new), weights(source)
    taken = same_backbone(after, old, prefix)
    own = {n for n in after if not n.startswith("backbone.") or n.startswith(("backbone.norm0", "backbone.norm1"))}
    assert taken == after.keys() - own
    for name in own:
        assert torch.equal(after[name], fresh[name]), name
    assert "a norm of outputs that the network does not give" in report and "begins from the seed" in report


def test_moby_begins_segmentation(tmp_path):
    source = trained(tmp_path, "digits_moby", "task.queue=20")
    new, _ = begun(tmp_path, "canvas_upernet", source.session.directory, *DENSE)
    taken = same_backbone(weights(new), weights(source), "encoder.")
    assert {name.split(".")[1] for name in taken} == {"patch_embed", "layers"}


def test_a_segmentors_backbone_begins_a_classifier_and_another_segmentor(tmp_path):
    source = trained(tmp_path, "canvas_upernet", *DENSE)
    old = weights(source)
    new, report = begun(tmp_path, "digits_dense", source.session.directory)
    after, fresh = weights(new), untouched(new)
    for name, value in after.items():
        own = name.startswith(("norm.", "head."))
        assert torch.equal(value, fresh[name] if own else old[f"backbone.{name}"]), name
    assert "a norm of outputs that the network does not give" in report
    again, report = begun(tmp_path, "canvas_upernet", source.session.directory, *DENSE)
    assert all(torch.equal(value, old[name]) for name, value in weights(again).items())
    assert "dropped" not in report


def test_positions_follow_into_a_dense_backbone_and_back(tmp_path):
    ape = ("model.ape=true", "model.name=swin")
    source = trained(tmp_path, "digits_dense", *ape)
    new, _ = begun(tmp_path, "canvas_upernet", source.session.directory, *DENSE, *ape)
    there = weights(source)["absolute_pos_embed"]
    here = weights(new)["backbone.absolute_pos_embed"]
    assert here.shape == (1, 8, 8, 8)
    assert torch.equal(here.flatten(2).transpose(1, 2), there)
    larger, report = begun(
        tmp_path, "canvas_upernet", source.session.directory, *DENSE, *ape, "model.img_size=24", "run.name=larger"
    )
    assert weights(larger)["backbone.absolute_pos_embed"].shape == (1, 8, 12, 12)
    assert "bicubic, 8 x 8 to 12 x 12 tokens" in report
    dense = trained(tmp_path, "canvas_upernet", *DENSE, *ape, "run.name=dense")
    back, _ = begun(tmp_path, "digits_dense", dense.session.directory, *ape)
    stored = weights(dense)["backbone.absolute_pos_embed"]
    assert torch.equal(weights(back)["absolute_pos_embed"], stored.flatten(2).transpose(1, 2))


def test_a_segmentor_of_other_classes_begins_all_but_its_class_layers(tmp_path):
    source = trained(tmp_path, "canvas_upernet", *DENSE)
    new, report = begun(tmp_path, "canvas_upernet", source.session.directory, *DENSE, *THIRTEEN)
    after, fresh, old = weights(new), untouched(new), weights(source)
    own = {name for name in after if ".conv_seg." in name}
    assert len(own) == 4 and all(torch.equal(after[name], fresh[name]) for name in own)
    assert all(torch.equal(after[name], old[name]) for name in after.keys() - own)
    (line,) = [line for line in report.splitlines() if "begins from the seed" in line]
    assert line.startswith("reinitialized 4 (") and "other classes" in line
    with pytest.raises(CheckpointError, match=r"decode_head.bottleneck.conv.weight: shape"):  # not of classes alone
        begun(tmp_path, "canvas_upernet", source.session.directory, *DENSE, "task.segment.channels=8")
