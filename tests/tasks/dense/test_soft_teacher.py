"""The task `soft_teacher`: what equals a detector's, what moves the teacher, the defects of the original, and what is
refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from swin_moe.checkpoint import list_checkpoints
from swin_moe.config.io import load_config
from swin_moe.data.batch import to_device
from swin_moe.layout import Chunk
from swin_moe.models.soft_teacher.losses import Teaching, background_scores, part_of
from swin_moe.models.soft_teacher.network import SoftTeacher
from swin_moe.models.soft_teacher.pseudo import Pseudo, View, drawn, found_in, judged, spread_of
from swin_moe.planner.workload import task_to_count
from swin_moe.randomness import RandomContext
from swin_moe.run.session import check_layout
from swin_moe.tasks.base import StepDone
from swin_moe.tasks.detect import Detect
from swin_moe.tasks.soft_teacher import SemiSupervised, momentum_at
from swin_moe.train import Trainer
from swin_moe.weights.load import load_weights
from tests.gathered import NETWORK, gathered
from tests.ranks import run_ranks
from tests.tasks import cases
from tests.tasks.cases import MOE, SOFT
from tests.tasks.dense.test_detect import batch_of, context_of
from tests.tasks.transfer import begun, session_of, trained, weights

NORM = (
    "task.detect.box_convs=1",
    "task.detect.box_conv_channels=4",
    "task.detect.box_fcs=1",
    "task.detect.box_norm=true",
)


def configured(*options: str) -> Any:
    return load_config("canvas_soft_teacher", [*NETWORK, *SOFT, *options])


def made(*options: str) -> tuple[SemiSupervised, SoftTeacher]:
    task = SemiSupervised(configured(*options))
    network = task.build_network()
    network.init_weights(0)
    assert isinstance(network, SoftTeacher)
    return task, network.double()


def mixed_batch(labelled: list[bool]) -> Any:
    """Returns images of which some have labels; the teacher sees those without mirrored."""
    batch: Any = batch_of(len(labelled))
    bare = ~torch.tensor(labelled, dtype=torch.bool)
    count, width = int(bare.sum()), batch["image"].shape[3]
    mirror = torch.tensor([[-1.0, 0.0, width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return batch | {
        "labelled": ~bare,
        "matrix": torch.eye(3, dtype=torch.float64).expand(len(labelled), 3, 3),
        "view": batch["image"][bare].flip(3),
        "view_size": batch["size"][bare],
        "view_matrix": mirror.expand(count, 3, 3),
    }


def test_images_with_labels_alone_teach_what_they_teach_a_detector():
    task, network = made()
    batch = mixed_batch([True] * 5)
    got = task.loss(network, batch, context_of(task, 5)).total
    detector = Detect(load_config("canvas_mask_rcnn", [*NETWORK, *SOFT[: len(cases.DETECT)]]))
    plain: Any = detector.build_network()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("teacher.")})
    torch.testing.assert_close(got, detector.loss(plain.double(), batch_of(5), context_of(task, 5)).total)


@pytest.mark.parametrize("labelled", [[], [True], [False], [True, False, False]], ids=str)
@pytest.mark.parametrize("options", [(), NORM, MOE], ids=["plain", "norm", "moe"])
def test_every_parameter_of_the_student_takes_part_whatever_a_batch_holds(labelled, options):
    """A batch of one image of either kind is legal, which there could not work (defect 12)."""
    task, network = made(*options)
    loss = task.loss(network.train(), mixed_batch(labelled), context_of(task, max(1, len(labelled))))
    loss.total.backward()
    for name, parameter in network.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None and not parameter.requires_grad
        elif parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert (float(loss.total.detach()) > 0) == bool(labelled)


def test_losses_and_boxes_are_in_single_precision_under_autocast():
    task, network = made()
    network.float().train()
    batch = mixed_batch([True, False, False])
    batch |= {key: batch[key].float() for key in ("image", "view")}
    batch["boxes"] = [boxes.float() for boxes in batch["boxes"]]
    context = replace(context_of(task, 3), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    loss = task.loss(network, batch, context).total
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_official_losses_are_divided_by_what_a_rank_counts():
    task, network = made("compat.official=true")
    loss = task.loss(network, mixed_batch([True, False, False]), context_of(task, 6)).total
    alone = task.loss(network, mixed_batch([True, False, False]), context_of(task, 3)).total
    torch.testing.assert_close(loss, alone / 2)


def test_what_the_teacher_finds_is_learned():
    """Of images without labels: nothing where it is not believed, and what it is believed in changes each loss."""
    task, network = made("task.detect.masks=false")
    batch = mixed_batch([False] * 6)
    random = RandomContext(0, 3, batch["sample"])
    view = View(batch["view"], batch["view_size"], batch["view_matrix"])

    def sums(**changes: float) -> dict[str, Tensor]:
        before, network.rules = network.rules, network.rules.__class__(**vars(network.rules) | changes)
        given = {"labelled": batch["labelled"], "matrix": batch["matrix"], "view": view}
        learned: Any = network(batch["image"], batch["size"], task.targets_of(batch), random=random, **given)
        network.rules = before
        return {name: value.detach().sum() for name, value in learned.losses.sums.items()}

    believing, doubting = sums(), sums(proposals=1.0, classes=1.0, spread=0.0)
    for name in ("unsup_loss_rpn_bbox", "unsup_loss_bbox"):
        assert believing[name] > 0 and doubting[name] == 0
    assert all(believing[name] != doubting[name] for name in ("unsup_loss_rpn_cls", "unsup_loss_cls"))
    assert all(float(value) == 0 for name, value in believing.items() if name.startswith("sup_"))
    doubled = sums(weight=2 * network.rules.weight)
    torch.testing.assert_close(doubled["unsup_loss_cls"], 2 * believing["unsup_loss_cls"])


def test_background_counts_as_far_as_the_teacher_says_so():
    """One box after the other, carried back by hand, as one after the other is looked at in the teacher's view."""
    task, network = made()
    batch = mixed_batch([False, True, False])
    view = View(batch["view"], batch["view_size"], batch["view_matrix"])
    bare = part_of([0, 2], batch["size"], RandomContext(0, 0, batch["sample"]))
    with torch.no_grad():
        maps, _ = network.teacher.maps(view.image, None, view.size)
        across = torch.linalg.inv(view.matrix)
        teaching = Teaching(network.teacher, maps, view, Pseudo([], [], [], []), across, [])
        rois = torch.tensor([[0.0, 1, 2, 9, 8], [0, 3, 3, 20, 19], [2, 1, 2, 9, 8]], dtype=torch.float64)
        got = background_scores(rois, bare, teaching)
        for row, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
            place = 0 if image == 0 else 1
            mirrored = torch.tensor([[0.0, 24 - x2, y1, 24 - x1, y2]], dtype=torch.float64)
            alone, _ = judged(network.teacher, [x[place : place + 1] for x in maps], mirrored)
            assert float(got[row]) == pytest.approx(float(alone[0, -1]), rel=1e-12)
    assert got[0] != got[2]


def test_spread_is_that_of_the_answers_to_jittered_boxes():
    task, network = made("task.detect.masks=false", "task.soft_teacher.jitters=4")
    batch = mixed_batch([False, False])
    teacher, rules, size = network.teacher, network.rules, batch["view_size"]
    random = RandomContext(7, 3, batch["sample"])
    (head,) = teacher.roi_head.box_heads
    with torch.no_grad():
        maps, _ = teacher.maps(batch["view"], None, size)
        found = found_in(teacher, maps, size, rules, random)
        assert [len(boxes) > 1 for boxes in found.boxes] == [True, True]
        for image, (boxes, labels) in enumerate(zip(found.boxes, found.labels)):
            noise = drawn(random, image, 4, len(boxes))
            for number, (box, label) in enumerate(zip(boxes, labels)):
                side = (box[2:] - box[:2]).clamp(min=1).repeat(2)
                answers = []
                for turn in range(4):
                    roi = torch.cat([box.new_tensor([image]), box + 0.06 * side * noise[turn, number]])[None]
                    _, codes = judged(teacher, maps, roi)
                    answers.append(head.decoded(roi[:, 1:], codes, size[image]).view(-1, 4)[label])
                own = torch.stack(answers)
                sides = (own.mean(0)[2:] - own.mean(0)[:2]).clamp(min=1).repeat(2)
                torch.testing.assert_close(found.spread[image][number], own.std(0) / sides)
        other = [drawn(RandomContext(7, 4, batch["sample"]), i, 4, len(b)) for i, b in enumerate(found.boxes)]
        again = spread_of(teacher, maps, found.boxes, found.labels, size, rules, other)
    assert not torch.equal(again[0], found.spread[0])  # another step, other draws


def test_draws_belong_to_an_image_whatever_stands_beside_it():
    size, random = torch.arange(8).view(4, 2), RandomContext(0, 0, torch.tensor([5, 6, 7, 8]))
    part = part_of([1, 3], size, random)
    assert part.random.sample.tolist() == [6, 8] and part.size.tolist() == [[2, 3], [6, 7]]
    assert part_of([], size, random).size.shape == (0, 2)


def test_the_teacher_begins_where_the_student_does():
    _, network = made(*MOE)
    parameters = dict(network.named_parameters())
    for name, student in network.momentum_pairs().items():
        assert torch.equal(parameters[name], parameters[student]), name


def test_the_momentum_begins_at_nothing():
    assert [momentum_at(0.999, step) for step in (0, 1, 3)] == [0.0, 0.5, 0.75] and momentum_at(0.999, 10**6) == 0.999


def test_the_teacher_stays_in_evaluation_and_follows_all_of_the_student():
    """Defect 11: there train() put the teacher into training mode, and its batch norms' statistics stayed behind."""
    task, network = made(*NORM, "model.drop_path_rate=0.5")
    network.train()
    assert network.training and network.roi_head.training
    assert not any(module.training for module in network.teacher.modules())
    names = {name.removeprefix("teacher.") for name in network.momentum_pairs()}
    assert names == {name for name, _ in network.named_parameters() if not name.startswith("teacher.")}
    assert any(name.endswith("running_var") for name in names)
    task.connect(network, session_of(Path("unused"), "digits_dense").groups)
    view = mixed_batch([False] * 3)
    looked = [network.teacher(view["view"], view["view_size"]) for _ in range(2)]
    for one, other in zip(*looked):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    task.loss(network, mixed_batch([True, False, False]), context_of(task, 3))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("teacher.") and parameter.requires_grad:
                parameter.add_(1.0)
    parts = {name: (p.detach(), Chunk.whole(tuple(p.shape))) for name, p in network.named_parameters()}
    task.after_step(parts, StepDone(1, 10, 3))
    moved_statistics = 0
    for name, parameter in network.named_parameters():
        if name.startswith("teacher."):
            student = network.get_parameter(name.removeprefix("teacher."))
            wanted = before[name] * (2 / 3) + student.detach() / 3
            torch.testing.assert_close(parameter.detach(), wanted)
            moved_statistics += name.endswith(("running_mean", "running_var")) and not torch.equal(wanted, before[name])
    assert moved_statistics == 2


def own_classes(root: Path, *, images: int = 8) -> Path:
    """Writes a COCO json whose category ids are nobody's, with a square of each image's class."""
    names = {907: "bolt", 44: "nut"}
    categories = [{"id": number, "name": name} for number, name in names.items()]
    tree: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
    (root / "train").mkdir(parents=True)
    for number in range(images):
        pixels = np.full((24, 24, 3), 30, dtype=np.uint8)
        pixels[5:17, 6:18] = 200 if number % 2 else 120
        Image.fromarray(pixels).save(root / "train" / f"{number}.png")
        tree["images"].append({"id": number + 1, "file_name": f"{number}.png", "height": 24, "width": 24})
        box = {"bbox": [6, 5, 12, 12], "area": 144, "iscrowd": 0, "category_id": 907 if number % 2 else 44}
        tree["annotations"].append({"id": number + 1, "image_id": number + 1, **box})
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(tree))
    return root


def test_own_classes_are_learned(tmp_path):
    """Defect 13: there a detector of other classes than COCO's trained on nothing, silently."""
    pytest.importorskip("pycocotools")
    options = ("data.name=coco", f"data.path={own_classes(tmp_path)}", "data.dense.val_images=train")
    few = ("model.num_classes=2", "data.global_batch=4", "data.dense.labelled=0.5", "data.dense.sample_ratio=[1,1]")
    session = session_of(tmp_path, "canvas_soft_teacher", *SOFT, *options, *few, "task.detect.masks=false")
    trainer = Trainer(session)
    assert trainer.loader.dataset.classes == ("nut", "bolt")
    batches = next(trainer.loader.batches(0, 1))
    (batch,) = (to_device(one, session.device, "fp32") for one in batches)
    assert sorted(int(label) for labels in batch["labels"] for label in labels) and sum(map(len, batch["boxes"])) == 2
    random = RandomContext(0, 0, batch["sample"])
    network: Any = trainer.engine.local_model
    view = View(batch["view"], batch["view_size"], batch["view_matrix"])
    given = {"labelled": batch["labelled"], "matrix": batch["matrix"], "view": view}
    task: Any = trainer.task
    sums = network(batch["image"], batch["size"], task.targets_of(batch), random=random, **given).losses.sums
    assert sums["sup_loss_bbox"].sum() > 0 and sums["sup_loss_rpn_bbox"].sum() > 0
    assert trainer.loader.num_classes == 2


# Batch norm holds the boxes of all ranks; with [9,1] two of 4 ranks have no image without labels.
LAYOUTS = {
    "norm": ("data.dense.sample_ratio=[9,1]", *NORM),
    "moe": ("data.dense.sample_ratio=[1,2]", *MOE, "parallel.recompute=block"),
    "moe zero": ("data.dense.sample_ratio=[1,2]", *MOE, "parallel.zero=3"),
    "norm zero": ("data.dense.sample_ratio=[9,1]", *NORM, "parallel.zero=3"),
}


@pytest.mark.full
@pytest.mark.mpi
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_change_nothing(name, tmp_path):
    """Beside the row of test_layouts.py: heads with batch norm, experts, ZeRO; losses and gradients to 1e-10."""

    def run(world: int, options: tuple[str, ...]) -> list[dict]:
        root = str(tmp_path / f"{world}{len(options)}")
        return run_ranks(cases.tune, world, tmp_path, root, "canvas_soft_teacher", *SOFT, *options, timeout=900)

    plain = tuple(option for option in LAYOUTS[name] if not option.startswith("parallel."))
    (alone,) = run(1, plain)
    expected = gathered((key, *held) for key, held in alone["weights"].items())
    for world in (2, 4):
        results = run(world, LAYOUTS[name])
        assert len(results[0]["losses"]) == 3
        torch.testing.assert_close(
            torch.tensor(results[0]["losses"]), torch.tensor(alone["losses"]), rtol=1e-10, atol=1e-12
        )
        for key, value in alone["evaluation"].items():
            assert results[0]["evaluation"][key] == pytest.approx(value, rel=1e-7), key
        for key, value in gathered((k, *held) for one in results for k, held in one["weights"].items()).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


RUN = (
    *SOFT,
    "data.global_batch=10",
    "data.dense.canvases=30",
    "data.dense.val_canvases=2",
    "checkpoint.every=1",
    "checkpoint.keep=0",
)


def test_a_continued_run_is_one_that_was_never_stopped(tmp_path):
    started = trained(tmp_path, "canvas_soft_teacher", *RUN)
    expected = weights(started)
    shutil.rmtree(list_checkpoints(started.session.directory / "checkpoints")[0])
    continued = Trainer(started.session)
    continued.resume()
    assert 0 < continued.progress.step < continued.schedule.total
    continued.run()
    assert any(not torch.equal(expected[n], expected[n.removeprefix("teacher.")]) for n in expected if "teacher." in n)
    for name, value in weights(continued).items():
        assert torch.equal(value, expected[name]), name


def test_what_begins_a_detector_begins_student_and_teacher(tmp_path):
    detector = trained(tmp_path, "canvas_mask_rcnn", *cases.DETECT, "data.global_batch=20", "run.name=plain")
    trainer, report = begun(tmp_path, "canvas_soft_teacher", detector.session.directory, *SOFT)
    found, plain = weights(trainer), weights(detector)
    for name, value in found.items():
        assert torch.equal(value, plain[name.removeprefix("teacher.")]), name
    assert "missing" not in report
    network: Any = trainer.engine.local_model
    session = session_of(tmp_path, "canvas_soft_teacher", *SOFT, f"checkpoint.load={detector.session.directory}")
    with pytest.raises(ValueError, match=r"holds no teacher, as task detect trains none; use task\.name=detect"):
        load_weights(network, session)


@pytest.mark.parametrize(
    "options, words",
    [
        (("data.dense.unlabelled=drop",), "data.dense.unlabelled must be keep with task.name=soft_teacher"),
        (("data.dense.labelled=1.0",), "data.dense.labelled must be below 1 with task.name=soft_teacher"),
        (("data.dense.sample_ratio=[0,4]",), "data.dense.sample_ratio must be >= 1"),
        (("data.dense.sample_ratio=[1,0]",), "data.dense.sample_ratio must be >= 1"),
        (("data.dense.group_shapes=true",), "data.dense.group_shapes must be false"),
        (("data.dense.crop=[16,16]",), "data.dense.crop must be 0"),
        (("data.dense.erase=[3,1]",), "data.dense.erase must be two numbers, the smaller first"),
        (("task.soft_teacher.jitters=1",), "task.soft_teacher.jitters must be >= 2"),
        (("task.soft_teacher.class_score=1.5",), "task.soft_teacher.class_score"),
        (("task.soft_teacher.momentum=-0.1",), "task.soft_teacher.momentum"),
        ((*cases.CASCADE,), "task.detect.stage_overlaps must be one number with task.name=soft_teacher"),
        (("task.detect.semantic_classes=11",), "task.detect.semantic_classes must be 0"),
        (("engine.name=deepspeed",), "does not run task.name=soft_teacher: it cuts the momentum networks"),
        (("model.num_classes=0",), "model.num_classes must be >= 1 with task.name=soft_teacher"),
        (("data.micro_batch=2",), "data.micro_batch must be all images of a rank at once"),
        (("task.name=detect",), "data.dense.unlabelled must be drop with task.name=detect"),
    ],
    ids=lambda value: value[0][-40:] if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused_with_its_option(options, words):
    with pytest.raises(ValueError) as refused:
        check_layout(configured("data.global_batch=4", *options), 1)
    assert words in str(refused.value)


def test_the_planner_refuses_it_in_a_sentence():
    with pytest.raises(ValueError, match=r"task\.name=soft_teacher: the planner counts networks .* none with boxes"):
        task_to_count(load_config("canvas_soft_teacher"))
