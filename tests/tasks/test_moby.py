"""MoBY by hand: sizes of its heads, batch norm, momentum, queues, the loss; layouts are in test_layouts."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from swin_moe.config import DataConfig
from swin_moe.config.io import load_config
from swin_moe.data.loader import TrainLoader
from swin_moe.data.views import VIEWS, ViewTransform, shift_hue
from swin_moe.engine.limits import check_engine
from swin_moe.models.contrastive import BatchNorm, Head
from swin_moe.parallel.groups import single_process_groups
from swin_moe.randomness import RandomContext
from swin_moe.tasks.base import StepContext, StepDone, build_task
from swin_moe.tasks.moby import enqueue, leave_one_out, momentum_at
from tests.tasks.transfer import TINY, begun, trained, weights

MOBY = ("task.queue=6", "task.hidden_dim=12", "task.num_features=5", "task.momentum=0.99", "data.drop_last=true")


def task_of(*options: str):
    task = build_task(load_config("digits_moby", [*TINY, *MOBY, *options]))
    return task, task.build_network()


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# Sizes.


@pytest.mark.parametrize(("in_dim", "count"), [(768, 4_206_848), (256, 2_109_696)])
def test_heads_have_the_official_sizes(in_dim, count):
    assert sum(p.numel() for p in Head(in_dim, 4096, 256).parameters()) == count


def test_the_published_network():
    task = build_task(load_config("moby_swin_tiny_patch4_window7_224_300ep"))
    with torch.device("meta"):
        model = task.build_network()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert trainable == 27_519_354 + 4_206_848 + 2_109_696
    assert frozen == 27_519_354 + 4_206_848 + 2 * 4096 * 256
    assert {b.drop_path for s in model.momentum_encoder.layers for b in s.blocks} == {0.0}
    assert max(b.drop_path for s in model.encoder.layers for b in s.blocks) == 0.2


# Views.


def test_two_views_need_no_context():
    task, model = task_of()
    model.init_weights(0)
    views = images(3, 0), images(3, 1)
    drawn = RandomContext(1, 2, torch.arange(3))
    with torch.no_grad():
        given, none = model.eval()(*views, random=drawn), model(*views)
        assert all(map(torch.equal, given.logits, none.logits))  # nothing is drawn in evaluation
        assert all(logits.isfinite().all() for logits in model.train()(*views).logits)


# Batch norm.


def test_batch_norm_equals_torch():
    ours, theirs = BatchNorm(7).double(), nn.BatchNorm1d(7).double()
    x = torch.randn(11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(a), theirs(b), rtol=1e-12, atol=1e-12)
    (ours(a) ** 3).sum().backward()
    (theirs(b) ** 3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


# Momentum and queues.


def test_momentum_rises_by_a_cosine():
    assert momentum_at(0.99, 0, 100) == pytest.approx(0.99)
    assert momentum_at(0.99, 50, 100) == pytest.approx(0.995)
    assert momentum_at(0.99, 100, 100) == 1.0


def test_keys_go_round_the_ring():
    ring = torch.zeros(5, 1)
    enqueue(ring, torch.tensor([[1.0], [2], [3]]), first_row=0, size=5, position=0)
    assert ring.flatten().tolist() == [1, 2, 3, 0, 0]
    enqueue(ring, torch.tensor([[4.0], [5], [6]]), first_row=0, size=5, position=3)
    assert ring.flatten().tolist() == [6, 2, 3, 4, 5]
    enqueue(ring, torch.arange(10.0, 17)[:, None], first_row=0, size=5, position=6)  # more than rows: the last stay
    assert ring.flatten().tolist() == [14, 15, 16, 12, 13]


def test_a_part_of_the_ring_gets_its_rows():
    keys = torch.arange(1.0, 5)[:, None]
    whole, parts = torch.zeros(7, 1), [torch.zeros(3, 1), torch.zeros(4, 1)]
    enqueue(whole, keys, first_row=0, size=7, position=5)
    for part, first in zip(parts, (0, 3)):
        enqueue(part, keys, first_row=first, size=7, position=5)
    assert torch.equal(torch.cat(parts), whole) and whole.flatten().tolist() == [3, 4, 0, 0, 0, 1, 2]


def test_a_step_moves_the_momentum_networks_and_fills_the_queues_in_order():
    task, model = task_of()
    model.init_weights(0)
    task.connect(model, single_process_groups())
    for name, other in model.momentum_pairs().items():
        assert torch.equal(model.get_parameter(name), model.get_parameter(other)), "they begin alike"
    keys = F.normalize(images(4, 0)[:, 0, 0, :5], dim=1)
    sample = torch.tensor([2, 0, 3, 1])
    task._keys = (keys, -keys, sample)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    parts = {n: (p.detach(), type("Box", (), {"offset": (0,) * p.ndim})) for n, p in model.named_parameters()}
    task.after_step(parts, StepDone(step=24, total_steps=100, samples_before=4))
    momentum = momentum_at(0.99, 25, 100)
    for name, other in model.momentum_pairs().items():
        expected = momentum * before[name] + (1 - momentum) * before[other]
        torch.testing.assert_close(model.get_parameter(name), expected)
    ordered = keys[sample.argsort()]
    assert torch.equal(model.queue1[[4, 5, 0, 1]], ordered) and torch.equal(model.queue2[[4, 5, 0, 1]], -ordered)
    assert torch.equal(model.queue1[2:4], before["queue1"][2:4])


# The loss.


def test_loss_equals_infonce_by_hand():
    task, model = task_of("model.drop_path_rate=0.0")
    model.init_weights(3)
    task.connect(model, single_process_groups())
    view1, view2 = images(4, 1), images(4, 2)
    with torch.no_grad():  # momentum networks that differ from the online ones
        for parameter in model.momentum_projector.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    def pooled(network, view):
        return network.encode(view).tokens.mean((1, 2))

    expected = 0.0
    for own, other, queue in ((view1, view2, model.queue2), (view2, view1, model.queue1)):
        query = F.normalize(model.predictor(model.projector(pooled(model.encoder, own))), dim=1)
        key = F.normalize(model.momentum_projector(pooled(model.momentum_encoder, other)), dim=1)
        for i in range(4):
            scores = torch.cat([(query[i] @ key[i])[None], queue @ query[i]]) / 0.2
            expected += float((scores.logsumexp(0) - scores[0]).detach()) / 4
    context = StepContext(task.config, 0, 3, 4, nullcontext)
    loss = task.loss(model, {"image": view1, "view": view2, "sample": torch.arange(4)}, context)
    assert loss.task.item() == pytest.approx(expected, rel=1e-5)
    assert loss.total.item() == pytest.approx(3 * expected, rel=1e-5)
    loss.total.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("momentum_", "queue")) for name in moved)


def test_views_draw_differently_and_only_online(monkeypatch):
    task, model = task_of("model.drop_path_rate=0.9")
    model.init_weights(0)
    task.connect(model, single_process_groups())
    seen = {"encoder": [], "momentum_encoder": []}
    for name, found in seen.items():
        network = getattr(model, name)
        encode = network.encode
        monkeypatch.setattr(
            network,
            "encode",
            lambda view, random=None, encode=encode, found=found: (
                found.append(random.seed),
                encode(view, random=random),
            )[1],
        )
    model(images(2, 0), images(2, 0), random=RandomContext(0, 0, torch.arange(2)))
    assert seen["encoder"] == seen["momentum_encoder"] and len(set(seen["encoder"])) == 2


def test_neighbours_leave_the_image_itself_out():
    feature = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.9]])
    assert leave_one_out(feature, torch.tensor([0, 0, 1, 1, 1])) == 80.0
    assert leave_one_out(feature, torch.tensor([0, 0, 1, 1, 1]), at_once=2) == 80.0


# Views.


def test_a_view_is_a_function_of_its_key_and_the_two_differ():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8))
    first, second = (ViewTransform(DataConfig(), (224, 160), view=view) for view in (0, 1))
    assert torch.equal(first(picture, 5), first(picture, 5)) and first(picture, 5).shape == (3, 224, 160)
    assert not torch.equal(first(picture, 5), first(picture, 6))
    assert not torch.equal(first(picture, 5), second(picture, 5))
    assert (VIEWS[0].blur, VIEWS[0].solarize, VIEWS[1].blur, VIEWS[1].solarize) == (1.0, 0.0, 0.1, 0.2)


def test_hues_turn():
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    assert shift_hue(red, 0.0).getpixel((0, 0)) == (255, 0, 0)
    r, g, b = shift_hue(red, 1 / 3).getpixel((0, 0))
    assert g > 250 and r < 10 and b < 10


def test_batches_hold_a_second_view_whatever_the_cut():
    config = DataConfig(global_batch=8, crop_scale=(0.5, 1.0))

    def batch(rank, world, views=True):
        with TrainLoader(
            config, 8, seed=1, rank=rank, world_size=world, micro_batch=8 // world, accumulation=1, views=views
        ) as loader:
            return next(iter(loader.batches(0, 1))).batches[0]

    whole = batch(0, 1)
    assert whole["view"].shape == whole["image"].shape and not torch.equal(whole["view"], whole["image"])
    parts = [batch(rank, 2) for rank in (0, 1)]
    for key in ("image", "view"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    assert "view" not in batch(0, 1, views=False)


# What carries on.


def test_an_encoder_is_probed_and_a_classifier_begins_moby(tmp_path):
    source = trained(tmp_path, "digits_moby", *MOBY)
    probe, report = begun(tmp_path, "digits_dense", source.session.directory, "optim.freeze=backbone")
    for name, value in weights(probe).items():
        if not name.startswith("head."):
            assert torch.equal(value, weights(source)[f"encoder.{name}"]), name
    assert "only for the task it was trained for" in report and "reinitialized 2 (head.weight, head.bias)" in report
    new, _ = begun(tmp_path, "digits_moby", source.session.directory, *MOBY)
    after = weights(new)
    for name, value in weights(source).items():
        if not name.startswith("momentum_"):
            assert torch.equal(after[name], value), name
    for name, other in new.engine.local_model.momentum_pairs().items():
        assert torch.equal(after[name], after[other]), name


def test_momentum_networks_may_have_other_names(tmp_path):
    own = (*MOBY, "task.name=tests.tasks.slow_moby:SlowMoBY")
    source, other = trained(tmp_path / "ours", "digits_moby", *MOBY), trained(tmp_path / "theirs", "digits_moby", *own)
    found = {name.replace("slow.", "momentum_"): value for name, value in weights(other).items()}
    assert found.keys() == weights(source).keys()
    assert all(torch.equal(value, found[name]) for name, value in weights(source).items())
    new, _ = begun(tmp_path / "theirs", "digits_moby", other.session.directory, *own)
    after, moved = weights(new), 0
    for name, online in new.engine.local_model.momentum_pairs().items():
        assert torch.equal(after[name], weights(other)[online]), name
        moved += not torch.equal(after[name], weights(other)[name])
    assert moved, "they had fallen behind"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("data.micro_batch=5",), "data.micro_batch must be all images of a rank at once"),
        (("data.interpolation=random",), "data.interpolation must be bicubic or bilinear"),
        (("task.queue=0",), "task.moby.queue must be >= 1"),
        (("task.momentum=1.5",), r"task.moby.momentum must be in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        load_config("digits_moby", [*TINY, *MOBY, *options]).check(1)


def test_an_engine_that_cuts_elsewhere_is_refused():
    config = load_config("digits_moby", [*TINY, *MOBY, "engine.name=deepspeed", "parallel.zero=1"])
    with pytest.raises(ValueError, match="engine.name=deepspeed does not run task.name=moby: it cuts the momentum"):
        check_engine(config, 1)
