"""Files of official detectors: read and written bit for bit, and loaded to compute with."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.formats import find_format, open_source
from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.engine.common import materialize
from swin_moe.run.session import build_meta_model
from swin_moe.tasks.base import StepContext, build_task
from swin_moe.tasks.detect import Detect
from swin_moe.weights.load import load_weights
from tests.checkpoint_tools.formats.official_files import QUIET, convert, tensors_of
from tests.models.dense.golden import fill, load
from tests.models.detection.official import scene
from tests.tasks.transfer import session_of

NETWORKS = {
    "mask_rcnn_micro": (5, 7),
    "cascade_giou_micro": (5, 7),
    "htc_micro": (5, 7),
}


def save_official(name: str, path: Path, **beside) -> dict[str, torch.Tensor]:
    """Writes the golden's network as mmcv's runner does; returns its parameters and buffers."""
    tensors = {key: fill(key, tuple(shape)) for key, shape in load(name)["keys"].items()}
    torch.save({"meta": {"CLASSES": ("a",), "epoch": 3}, "state_dict": tensors, **beside}, path)
    return tensors


@pytest.mark.parametrize("name", NETWORKS)
def test_official_files_are_read_and_written_bit_for_bit(name, tmp_path):
    tensors = save_official(name, tmp_path / "official.pth")
    assert find_format(tmp_path / "official.pth") == "dense"
    with open_source(tmp_path / "official.pth", Options(**QUIET)) as source:
        classes, window = NETWORKS[name]
        model = source.config["model"]
        assert (model["num_classes"], model["window_size"], model["name"]) == (classes, window, "swin")
    convert(tmp_path / "official.pth", tmp_path / "native")
    parameters = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
    stored = tensors_of(tmp_path / "native")
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[key], value) for key, value in parameters.items())
    convert(tmp_path / "native", tmp_path / "back.pth", "dense")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[key], value) for key, value in tensors.items())
    beyond = back.keys() - tensors.keys()  # what the network computes stands in a strictly loaded file too
    assert beyond and all(key.endswith("relative_position_index") for key in beyond)


def test_what_dense_files_cannot_hold_is_told_or_refused(tmp_path):
    told: list[str] = []
    save_official("mask_rcnn_micro", tmp_path / "a.pth", optimizer={"state": {}, "param_groups": [{}]})
    convert(tmp_path / "a.pth", tmp_path / "native", report=told.append)
    assert any("optimizer" in line for line in told)
    plain = {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "norm.weight": torch.ones(8)}
    torch.save({"model": plain}, tmp_path / "classifier.pth")
    with pytest.raises(CheckpointError, match="no detector or segmentor"):
        convert(tmp_path / "classifier.pth", tmp_path / "x.pth", "dense")
    tensors = {key: fill(key, tuple(shape)) for key, shape in load("mask_rcnn_micro")["keys"].items()}
    torch.save({"state_dict": tensors | {"mystery_head.weight": torch.zeros(1)}}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="mystery_head"):
        convert(tmp_path / "b.pth", tmp_path / "y")


def test_positions_are_maps(tmp_path):
    tensors = {key: fill(key, tuple(shape)) for key, shape in load("mask_rcnn_micro")["keys"].items()}
    tensors["backbone.absolute_pos_embed"] = torch.randn(1, 24, 6, 8)
    torch.save({"state_dict": tensors}, tmp_path / "a.pth")
    with open_source(tmp_path / "a.pth", Options(**QUIET)) as source:
        assert source.config["model"]["ape"] and source.config["model"]["img_size"] == [24, 32]
    convert(tmp_path / "a.pth", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "b.pth", "dense")
    back = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    assert torch.equal(back["backbone.absolute_pos_embed"], tensors["backbone.absolute_pos_embed"])


MICRO = (
    "data.images_per_class=0",
    "model.img_size=224",
    "model.patch_size=4",
    "model.embed_dim=24",
    "model.depths=[2,2,2,2]",
    "model.num_heads=[1,2,4,8]",
    "model.window_size=7",
    "model.num_classes=5",
    "task.detect.channels=32",
    "task.detect.anchor_scale=8",
    "task.detect.finest_scale=56",
    "task.detect.proposals_per_level=[2000,1000]",
    "task.detect.proposals=[1000,1000]",
    "task.detect.box_fc_channels=64",
    "task.detect.mask_convs=4",
    "task.detect.mask_channels=16",
)


def test_an_official_file_finds_what_it_found(tmp_path):
    golden = load("mask_rcnn_micro")
    save_official("mask_rcnn_micro", tmp_path / "official.pth")
    given = (*MICRO, f"checkpoint.load={tmp_path / 'official.pth'}")
    session = session_of(tmp_path, "canvas_mask_rcnn", *given)
    task = build_task(session.config)
    assert isinstance(task, Detect)
    model = materialize(build_meta_model(session, task), session.config, session.device)
    assert "dense" in load_weights(model, session)
    sizes, stored = (torch.tensor(golden[key]) for key in ("img_shapes", "ori_shapes"))
    batch: Any = {"image": scene(golden), "size": sizes, "original_size": stored}
    found = task.look(model.eval(), batch, StepContext(session.config, 0, 1, 0, nullcontext))
    for one, reference in zip(found, golden["detections"], strict=True):
        torch.testing.assert_close(one.boxes, reference["boxes"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(one.scores, reference["scores"], rtol=1e-5, atol=1e-6)
        assert (one.masks.sum(dim=(1, 2)) - reference["mask_area"]).abs().max() <= 2  # type: ignore[union-attr]


SOFT = (
    *(option for option in MICRO if "mask" not in option),
    "model.depths=[1,1,1,1]",
    "task.detect.masks=false",
    "task.detect.low_quality=false",
    "task.soft_teacher.found_score=0.2022",
)


def test_files_of_soft_teacher_hold_both_detectors(tmp_path):
    """Both ways, bit for bit; and what is loaded to compute with is the file's own teacher."""
    tensors = save_official("soft_teacher_micro", tmp_path / "official.pth")
    tensors = {key: value for key, value in tensors.items() if not key.endswith("relative_position_index")}
    assert find_format(tmp_path / "official.pth") == "dense"
    with open_source(tmp_path / "official.pth", Options(**QUIET)) as source:
        model = source.config["model"]
    assert (model["num_classes"], model["embed_dim"], model["depths"]) == (5, 24, [1, 1, 1, 1])
    convert(tmp_path / "official.pth", tmp_path / "native")
    stored = tensors_of(tmp_path / "native")
    assert stored.keys() == {key.removeprefix("student.") for key in tensors}
    convert(tmp_path / "native", tmp_path / "back.pth", "dense")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[key], value) for key, value in tensors.items())
    assert all(key.endswith("relative_position_index") for key in back.keys() - tensors.keys())
    for file in ("official.pth", "back.pth"):
        session = session_of(tmp_path, "canvas_soft_teacher", *SOFT, f"checkpoint.load={tmp_path / file}")
        network = materialize(build_meta_model(session, build_task(session.config)), session.config, session.device)
        load_weights(network, session)
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, tensors[name if name.startswith("teacher.") else f"student.{name}"]), name


def test_a_plain_detector_begins_student_and_teacher(tmp_path):
    tensors = save_official("soft_teacher_micro", tmp_path / "both.pth")
    plain = {key.removeprefix("student."): v for key, v in tensors.items() if key.startswith("student.")}
    torch.save({"meta": {}, "state_dict": plain}, tmp_path / "plain.pth")
    session = session_of(tmp_path, "canvas_soft_teacher", *SOFT, f"checkpoint.load={tmp_path / 'plain.pth'}")
    network = materialize(build_meta_model(session, build_task(session.config)), session.config, session.device)
    load_weights(network, session)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, plain[name.removeprefix("teacher.")]), name
    half = tensors | {"teacher.backbone.norm3.bias": torch.zeros(3)}
    del half["teacher.neck.lateral_convs.0.conv.bias"]
    torch.save({"meta": {}, "state_dict": half}, tmp_path / "half.pth")
    session = session_of(tmp_path, "canvas_soft_teacher", *SOFT, f"checkpoint.load={tmp_path / 'half.pth'}")
    with pytest.raises(ValueError, match=r"teacher\.neck\.lateral_convs\.0\.conv\.bias"):
        load_weights(network, session)


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_one_of_both_detectors_is_written_alone(network, tmp_path):
    tensors = save_official("soft_teacher_micro", tmp_path / "both.pth")
    own = {key.removeprefix(f"{network}."): v for key, v in tensors.items() if key.startswith(f"{network}.")}
    convert(tmp_path / "both.pth", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "one.pth", "dense", extra={"network": network})
    written = torch.load(tmp_path / "one.pth", weights_only=True)["state_dict"]
    assert all(key.endswith("relative_position_index") for key in written.keys() - own.keys())
    for key, value in own.items():
        assert torch.equal(written[key], value), key
    convert(tmp_path / "one.pth", tmp_path / "plain")
    with pytest.raises(CheckpointError, match="holds no student and teacher but one network"):
        convert(tmp_path / "plain", tmp_path / "x.pth", "dense", extra={"network": network})
    with pytest.raises(CheckpointError, match="--set network must be student or teacher, got 'nobody'"):
        convert(tmp_path / "native", tmp_path / "x.pth", "dense", extra={"network": "nobody"})


POINTS = ("data.images_per_class=0", "task.detect.channels=16", "task.detect.corner_channels=8")


@pytest.mark.parametrize("masks", [(), ("task.detect.masks=true", "task.detect.mask_channels=8")])
def test_files_of_reppoints_are_read_and_written_bit_for_bit(tmp_path, masks):
    """Names are the published network's (tests/models/reppoints); what is loaded to compute with is the file."""
    session = session_of(tmp_path, "canvas_reppoints", *POINTS, *masks)
    network = build_meta_model(session, build_task(session.config))
    tensors = {name: fill(name, tuple(p.shape)) for name, p in network.named_parameters()}
    beside = {}
    if masks:
        beside["bbox_head.mask_head.head.sizes_of_interest"] = torch.tensor([64, 128, 256, 512, 1024])
    torch.save({"meta": {"CLASSES": ("a",)}, "state_dict": tensors | beside}, tmp_path / "official.pth")
    with open_source(tmp_path / "official.pth", Options(**QUIET)) as source:
        assert source.config["model"]["num_classes"] == session.config.model.num_classes
    convert(tmp_path / "official.pth", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back.pth", "dense")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[key], value) for key, value in (tensors | beside).items())
    session = session_of(tmp_path, "canvas_reppoints", *POINTS, *masks, f"checkpoint.load={tmp_path / 'official.pth'}")
    model = materialize(build_meta_model(session, build_task(session.config)), session.config, session.device)
    assert "dense" in load_weights(model, session)
    assert all(torch.equal(p.cpu(), tensors[name]) for name, p in model.named_parameters())
