"""Segmentation by hand: what the loss is a mean of, running statistics, evaluation; layouts are in test_layouts.

Defects of the official code that are not here: backward that current torch refuses (its number 1, also in
tests/models/dense/test_upernet.py), losses that depend on how images are spread, or that pixels without a label dilute
(9), stages frozen off by one, with norms that learn (14, also in tests/models/dense/test_pyramid.py).
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from swin_moe.config.io import load_config
from swin_moe.layout import Chunk
from swin_moe.models.dense.upernet import resized
from swin_moe.models.flops import count_parameters
from swin_moe.optim import build_schedule, frozen_parameters
from swin_moe.parallel.groups import single_process_groups
from swin_moe.planner.workload import task_to_count
from swin_moe.tasks.base import StepContext, StepDone, build_task
from swin_moe.tasks.measures.confusion import Confusion
from swin_moe.tasks.segment import groups_of
from tests.gathered import NETWORK
from tests.models.dense.golden import load

SMALL = (
    *NETWORK,
    "model.num_classes=5",
    "task.segment.class_weights=[]",
    "task.segment.channels=6",
    "task.segment.auxiliary_channels=4",
    "task.segment.auxiliary_index=1",
    "task.segment.pool_scales=[1,2]",
)


def task_of(*options: str):
    task = build_task(load_config("canvas_upernet", [*SMALL, *options]))
    model = task.build_network()
    model.init_weights(0)
    task.connect(model, single_process_groups())
    return task, model.double().train()


def batch_of(count: int = 3, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 5, (count, 12, 20), generator=generator)
    label[:, :, 15:] = 255
    label[:1] = 255  # an image without a label
    size = torch.tensor([[12, 20]]).expand(count, 2)
    return {
        "image": torch.randn(count, 3, 12, 20, dtype=torch.float64, generator=generator),
        "label_map": label,
        "sample": torch.arange(count),
        "size": size,
        "original_size": size,
    }


def context_of(task, weight=None, world=1, num_samples=3):
    return StepContext(task.config, 0, world, num_samples, nullcontext, weight=weight)


def test_the_loss_is_a_mean_over_labelled_pixels():
    task, model = task_of("task.segment.auxiliary_weight=0.3")
    batch = batch_of()
    valid = int((batch["label_map"] != 255).sum())
    assert task.weigh(batch) == valid == 2 * 12 * 15
    loss = task.loss(model, batch, context_of(task, weight=valid))
    out = model(batch["image"])
    label = batch["label_map"]
    want = sum(
        weight * F.cross_entropy(resized(x, label.shape[1:]), label, ignore_index=255)
        for weight, x in ((1, out.logits), (0.3, out.auxiliary))
    )
    torch.testing.assert_close(loss.task, want.detach())
    torch.testing.assert_close(loss.total.detach(), want.detach())
    # The same pixels as half of a step of two ranks, whose gradients are averaged.
    half = task.loss(model, batch, context_of(task, weight=2 * valid, world=2, num_samples=6))
    torch.testing.assert_close(half.total, loss.total)
    torch.testing.assert_close(half.task, loss.task / 2)


def test_pixels_without_a_label_dilute_the_official_loss_only():
    task, model = task_of("compat.official=true")
    batch = batch_of()
    official = task.loss(model, batch, context_of(task, weight=1.0)).task
    ours, _ = task_of()
    loss = ours.loss(model, batch, context_of(ours, weight=ours.weigh(batch))).task
    torch.testing.assert_close(official, loss * (2 * 12 * 15) / (3 * 12 * 20))
    wider = {**batch, "label_map": F.pad(batch["label_map"], (0, 0, 0, 12), value=255)}
    wider["image"] = F.pad(batch["image"], (0, 0, 0, 12))
    assert ours.weigh(wider) == ours.weigh(batch)


def test_class_weights_multiply_the_pixels_losses():
    batch = batch_of()
    task, model = task_of("task.segment.class_weights=[2,2,2,2,2]", "task.segment.auxiliary_channels=0")
    plain, _ = task_of("task.segment.auxiliary_channels=0")
    double, single = (t.loss(model, batch, context_of(t, weight=t.weigh(batch))).task for t in (task, plain))
    torch.testing.assert_close(double, 2 * single)


def test_a_rank_without_an_image_takes_part():
    task, model = task_of()
    batch = {key: value[:0] for key, value in batch_of().items()}
    loss = task.loss(model, batch, context_of(task, weight=10.0, world=2))
    loss.total.backward()
    assert float(loss.task) == 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_running_statistics_move_once_a_step():
    task, model = task_of()
    batch = batch_of()
    name = "decode_head.bottleneck.bn"
    norm = model.get_submodule(name)
    before = norm.running_mean.detach().clone()
    task.loss(model, batch, context_of(task))
    seen = norm.seen[0]
    assert torch.equal(norm.running_mean, before)
    parts = {n: (p.detach(), Chunk((0,) * p.ndim, tuple(p.shape))) for n, p in model.named_parameters()}
    task.after_step(parts, StepDone(0, 1, 0))
    torch.testing.assert_close(norm.running_mean.detach(), 0.9 * before + 0.1 * seen)
    frozen, model = task_of("task.segment.norm=frozen")
    assert not frozen.changes_weights and task.changes_weights
    frozen.loss(model, batch, context_of(frozen))
    assert all(m.seen is None for m in model.modules() if hasattr(m, "running_mean"))


def test_evaluation_is_of_every_image_without_its_padding():
    task, model = task_of()
    model.eval()
    images = [torch.randn(1, 3, h, w, dtype=torch.float64) for h, w in ((9, 13), (12, 16), (9, 13))]
    originals = [(18, 26), (12, 16), (18, 26)]
    labels = [torch.randint(0, 5, size) for size in originals]
    padded = {
        "image": torch.cat([F.pad(x, (0, 16 - x.shape[3], 0, 12 - x.shape[2]), value=3.0) for x in images]),
        "label_map": torch.stack([F.pad(x, (0, 26 - x.shape[1], 0, 18 - x.shape[0]), value=255) for x in labels]),
        "size": torch.tensor([x.shape[2:] for x in images]),
        "original_size": torch.tensor(originals),
        "sample": torch.arange(3),
    }
    assert [rows for rows, *_ in groups_of(padded)] == [[0, 2], [1]]
    empty = {key: value[:0] for key, value in padded.items()}
    result = task.evaluate(model, iter([padded, empty]), context_of(task))
    table = torch.zeros(5, 5)
    with torch.no_grad():
        for x, label in zip(images, labels):
            logits = resized(model(x).logits, x.shape[2:])
            predicted = resized(logits, label.shape).argmax(1)[0]
            for p, t in zip(predicted.flatten().tolist(), label.flatten().tolist()):
                table[t, p] += 1
    agreed = table.diag()
    iou = agreed / (table.sum(0) + table.sum(1) - agreed)
    assert result["mIoU"] == pytest.approx(100 * float(iou.nanmean()))
    assert result["mAcc"] == pytest.approx(100 * float((agreed / table.sum(1)).nanmean()))
    assert result["aAcc"] == pytest.approx(100 * float(agreed.sum() / table.sum()))
    assert result["samples"] == 3
    assert sorted(task.pictures()) == ["validation_0", "validation_1", "validation_2"]


def test_confusion_is_the_official_one():
    golden = load("upernet_micro")
    confusion = Confusion(7, torch.device("cpu"))
    for predicted, label in zip(golden["slide_pred"].long(), golden["eval_labels"].long()):
        confusion.add(predicted, label)
    agreed, predicted, labelled = confusion.everywhere(1).double()
    torch.testing.assert_close(agreed / (predicted + labelled - agreed), golden["miou"]["iou"], rtol=0, atol=5e-5)
    torch.testing.assert_close(agreed / labelled, golden["miou"]["acc"], rtol=0, atol=5e-5)
    assert confusion.result()["aAcc"] / 100 == pytest.approx(golden["miou"]["aAcc"], abs=5e-5)


def test_a_class_that_occurs_nowhere_is_in_no_mean():
    confusion = Confusion(4, torch.device("cpu"))
    confusion.add(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 255]]))
    assert confusion.result() == {"mIoU": 100.0, "mAcc": 100.0, "aAcc": 100.0}
    with pytest.raises(ValueError, match="class 4; allowed: 0 to 3"):
        confusion.add(torch.tensor([[0]]), torch.tensor([[4]]))


def test_frozen_stages_learn_nothing_and_the_rest_does():
    task, model = task_of("task.segment.frozen_stages=1")
    task.loss(model, batch_of(), context_of(task)).total.backward()
    learning = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert learning == {n for n, _ in model.backbone.named_parameters() if n.startswith(("layers.1.", "norm1."))}


# Parameters that learn; the sizes of the published table.
PUBLISHED = {
    "upernet_swin_tiny_patch4_window7_512x512_160k_ade20k": 59_941_862,
    "upernet_swin_small_patch4_window7_512x512_160k_ade20k": 81_259_766,
    "upernet_swin_base_patch4_window7_512x512_160k_ade20k": 121_279_716,
    "upernet_swin_base_patch4_window7_640x640_160k_ade20k": 121_279_716,
    "upernet_swin_large_patch4_window7_640x640_160k_ade20k": 233_759_936,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_the_published_networks_and_recipe(name):
    config = load_config(name)
    config.check(8)
    with torch.device("meta"):
        network = build_task(config).build_network()
    assert count_parameters(network) == PUBLISHED[name]
    assert network.image_size == config.data.dense.crop and config.accumulation(8) == (2, 1)
    schedule = build_schedule(config.optim, steps_per_epoch=20_210 // 16, global_batch=16)
    assert (schedule.total, schedule.warmup) == (160_000, 1_500)


@pytest.mark.parametrize("freeze", ["none", "experts", "moe"])
def test_moe_backbones_and_what_of_them_learns(freeze):
    config = load_config(
        "upernet_swin_moe_small_patch4_window12_32expert_512x512_160k_ade20k", [f"optim.freeze={freeze}"]
    )
    config.check(8)
    with torch.device("meta"):
        network = build_task(config).build_network()
    frozen = frozen_parameters(network, freeze)
    experts = {name for name, _ in network.named_parameters() if ".experts." in name}
    routers = {name for name, _ in network.named_parameters() if ".router." in name}
    assert experts and routers
    assert frozen == {"none": set(), "experts": experts, "moe": experts | routers}[freeze]


def test_swinv2_reads_its_bias_in_the_windows_it_was_trained_in():
    with torch.device("meta"):
        config = load_config("upernet_swinv2_tiny_patch4_window16_512x512_160k_ade20k")
        network = build_task(config).build_network()
    attention = [stage.blocks[0].attn for stage in network.backbone.layers]
    assert [a.window for a in attention] == [16] * 4 and [a.pretrained_window for a in attention] == [16, 16, 16, 8]


def test_the_planner_says_that_it_does_not_count_it():
    with pytest.raises(ValueError, match="task.name=segment: the planner counts"):
        task_to_count(load_config("canvas_upernet"))


def test_options_that_do_not_fit_are_refused():
    for options, words in (
        (("data.micro_batch=2",), "data.micro_batch must be all.*task.segment.norm=frozen, got 2"),
        (("task.segment.class_weights=[1,2]",), "one for each of 5 classes"),
        (("task.segment.auxiliary_index=2",), "auxiliary_index must be below the 2 stages"),
        (("model.num_classes=0",), "model.num_classes must be >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            load_config("canvas_upernet", [*SMALL, *options]).check(1)
    load_config("canvas_upernet", [*SMALL, "data.micro_batch=2", "task.segment.norm=frozen"]).check(1)
