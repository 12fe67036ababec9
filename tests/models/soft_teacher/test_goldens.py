"""Soft Teacher against the outputs of the official code, stage by stage."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from swin_moe.config import ModelConfig
from swin_moe.models.dense import PyramidBackbone
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.targets import LossSums, Targets
from swin_moe.models.soft_teacher.losses import Teaching, box_losses, part_of, proposal_losses
from swin_moe.models.soft_teacher.network import SoftTeacher
from swin_moe.models.soft_teacher.pseudo import Rules, View, found_in, moved
from swin_moe.randomness import RandomContext
from tests.models.dense.golden import fill, image, load
from tests.models.detection.official import spec_of

NAME = "soft_teacher_micro"


def rules_of(given: dict[str, Any]) -> Rules:
    return Rules(
        found=given["pseudo_label_initial_score_thr"],
        proposals=given["rpn_pseudo_threshold"],
        classes=given["cls_pseudo_threshold"],
        spread=given["reg_pseudo_threshold"],
        jitters=given["jitter_times"],
        jitter=given["jitter_scale"],
        weight=1.0,  # the golden's losses are without it
    )


@cache
def opened() -> tuple[dict[str, Any], SoftTeacher, View, Tensor, Tensor]:
    """Returns golden, network, the teacher's view, the student's image and its size."""
    golden = load(NAME)
    given = {key: value for key, value in golden["config"]["backbone"].items() if key not in ("type", "out_indices")}
    given |= {key: tuple(given[key]) for key in ("depths", "num_heads")}
    config, spec = ModelConfig(name="swin", img_size=(224, 224), **given), spec_of(golden["config"])
    teacher = Detector(PyramidBackbone(config), spec)
    network = SoftTeacher(PyramidBackbone(config), teacher, spec, rules_of(golden["train_cfg"]))
    state = {}
    for name, shape in golden["keys"].items():
        if not name.endswith("relative_position_index"):
            state[name.removeprefix("student.")] = fill(name, tuple(shape))
    network.load_state_dict(state, strict=True)
    images = [image((1, 3, *golden[f"{view}_image"]), f"{NAME}/{view}") for view in ("teacher", "student")]
    size = [torch.tensor([golden[f"{view}_img_shape"]]) for view in ("teacher", "student")]
    return golden, network.eval(), View(images[0], size[0], golden["teacher_matrix"][None]), images[1], size[1]


@cache
def taught() -> Teaching:
    golden, network, view, _, size = opened()
    noise = [image(tuple(golden["jitter_shape"]), f"{NAME}/jitter")]
    with torch.no_grad():
        maps, _ = network.teacher.maps(view.image, None, view.size)
        pseudo = found_in(network.teacher, maps, view.size, network.rules, noise)
    across = golden["student_matrix"] @ torch.linalg.inv(view.matrix[0])
    boxes = [moved(pseudo.boxes[0], across, size[0])]
    return Teaching(network.teacher, maps, view, pseudo, across[None], boxes)


def test_the_teacher_finds_what_the_official_one_finds():
    golden, *_ = opened()
    pseudo, reference = taught().pseudo, golden["teacher_boxes"]
    torch.testing.assert_close(pseudo.boxes[0], reference[:, :4], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(pseudo.scores[0], reference[:, 4], rtol=1e-5, atol=1e-6)
    assert torch.equal(pseudo.labels[0], golden["teacher_labels"])
    torch.testing.assert_close(pseudo.spread[0], reference[:, 5:], rtol=1e-5, atol=1e-6)


def test_boxes_come_to_the_students_view_as_officially():
    golden, network, *_ = opened()
    teaching, reference = taught(), golden["pseudo_boxes_in_student"]
    torch.testing.assert_close(teaching.to_student[0].float(), golden["matrix"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(teaching.boxes[0], reference[:, :4], rtol=1e-5, atol=1e-4)
    rules, pseudo = network.rules, teaching.pseudo
    kept = {
        "initial": pseudo.scores[0] > rules.found,
        "rpn": pseudo.scores[0] > rules.proposals,
        "cls": pseudo.scores[0] > rules.classes,
        "reg": pseudo.spread[0].mean(dim=1) < rules.spread,
    }
    assert {key: len(teaching.objects([own]).boxes[0]) for key, own in kept.items()} == golden["pseudo_counts"]


def learn(network: SoftTeacher, images: Tensor, size: Tensor) -> LossSums:
    """Returns what the student learns from the golden's image, which has no labels, and the golden's boxes.

    Anchors round a small box overlap it alike but for the last bit of its coordinates, which decides how many of them
    are its best: from boxes that are another code's to 1e-5, 5 of 3,238 anchors are assigned otherwise.
    """
    golden, random = opened()[0], RandomContext(0, 0, torch.arange(1))
    teaching = taught()._replace(boxes=[golden["pseudo_boxes_in_student"][:, :4]])
    own, bare = part_of([], size, random), part_of([0], size, random)
    maps, _ = network.maps(images, None, size)
    scored = network.rpn_head.scored(maps)
    none = Targets([], [], [])
    losses = proposal_losses(network, scored, own, none, bare, teaching, network.rules)
    found = network.rpn_head.proposals(scored, size, network.spec.proposals.training)
    proposals = [boxes for boxes, _ in found]
    return losses | box_losses(network, maps, proposals, own, none, bare, teaching, network.rules)


def test_losses_and_gradients_are_the_official_ones():
    golden, network, _, images, size = opened()
    network.zero_grad()
    losses = learn(network, images, size)
    means = {key: value / max(losses.counts[key], 1) for key, value in losses.sums.items()}
    assert all(float(value.detach().abs().sum()) == 0 for key, value in means.items() if key.startswith("sup_"))
    for key, reference in golden["unsup_losses"].items():
        if key != "acc":
            torch.testing.assert_close(means[f"unsup_{key}"].detach(), torch.tensor(reference), rtol=1e-5, atol=1e-6)
    total = torch.stack([value.sum() for value in means.values()]).sum()
    assert float(total.detach()) == pytest.approx(golden["total"], rel=1e-5)
    total.backward()
    norms, parameters = golden["grad_norms"], dict(network.named_parameters())
    for key, norm in norms.items():
        got = float(parameters[key].grad.norm())  # type: ignore[union-attr]  # all take part, in any batch
        assert got == pytest.approx(norm, rel=1e-4, abs=1e-8 * max(norms.values())), key
    own = {name for name, p in parameters.items() if p.grad is not None}
    assert own == set(norms) and golden["teacher_grads"] == []  # nothing reaches the teacher
