"""Feature distillation: targets, loss, and teachers from checkpoints, official files and timm."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from swin_moe.checkpoint import CheckpointError
from swin_moe.config.io import load_config
from swin_moe.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from swin_moe.parallel.groups import single_process_groups
from swin_moe.run.session import Session
from swin_moe.tasks.base import StepContext, build_task
from swin_moe.weights.teacher import load_teacher
from tests.tasks import cases
from tests.tasks.transfer import TINY, trained, weights

CPU = torch.device("cpu")


def session_of(root: Path, *options: str) -> Session:
    config = load_config("digits_distill", [*TINY, f"run.output={root}", "run.name=student", *options])
    config.check(1)
    return Session(config, single_process_groups(), CPU)


@pytest.fixture
def official(tmp_path) -> tuple[str, str]:
    """The options that name write_teacher's files."""
    cases.write_teacher(tmp_path)
    return f"task.teacher={tmp_path / 'teacher.pth'}", f"task.teacher_model={tmp_path / 'teacher.yaml'}"


def images(count: int, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def task_with_teacher(session: Session):
    task = build_task(session.config)
    task.teacher = load_teacher(session)
    return task


def test_targets_are_whitened_features_of_the_teacher(tmp_path, official):
    task = task_with_teacher(session_of(tmp_path, *official))
    image = images(2, 24)  # the teacher's own size: nothing is resized, and 6 x 6 tokens stay 6 x 6
    target = task.targets(image, (6, 6))
    assert target.shape == (2, 6, 6, 24)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 6, 6), atol=1e-6, rtol=0)
    torch.testing.assert_close(target.var(-1, correction=0), torch.ones(2, 6, 6), atol=1e-3, rtol=0)
    tokens = task.teacher.network.encoder.encode(image).tokens
    torch.testing.assert_close(target, F.layer_norm(tokens, (24,)))
    pooled = task.targets(image, (3, 3))
    mean = tokens.unflatten(1, (3, 2)).unflatten(3, (3, 2)).mean((2, 4))
    torch.testing.assert_close(pooled, F.layer_norm(mean, (24,)))


def test_loss_is_the_mean_smooth_l1_however_the_batch_is_cut(tmp_path, official):
    session = session_of(tmp_path, *official, "task.smooth_l1_beta=0.5", "model.drop_path_rate=0.0")
    task = task_with_teacher(session)
    model = task.build_network()
    model.init_weights(0)
    image = images(5)
    expected = F.smooth_l1_loss(model(image)[0], task.targets(image, (4, 4)), beta=0.5).item()
    context = StepContext(session.config, 0, 2, 5, nullcontext)
    for parts in ([slice(0, 5)], [slice(0, 2), slice(2, 5), slice(5, 5)]):
        batches = [{"image": image[p], "sample": torch.arange(5)[p]} for p in parts]
        losses = [task.loss(model, batch, context) for batch in batches]
        assert sum(loss.task.item() for loss in losses) == pytest.approx(expected, rel=1e-5)
        assert sum(loss.total.item() for loss in losses) == pytest.approx(2 * expected, rel=1e-5)
    with torch.no_grad():
        model.projector.weight.zero_()
        model.projector.bias.zero_()
    result = task.evaluate(model, batches, replace(context, world_size=1))
    assert result["loss"] == result["mean_loss"] > 0 and result["samples"] == 5


def test_only_the_student_drops_paths_and_learns(tmp_path, official):
    session = session_of(tmp_path, *official, "model.drop_path_rate=0.5")
    task = task_with_teacher(session)
    assert not task.teacher.network.training
    assert not any(p.requires_grad for p in task.teacher.network.parameters())
    assert torch.equal(task.targets(images(3), (4, 4)), task.targets(images(3), (4, 4)))
    model = task.build_network()
    model.init_weights(0)
    # V2 blocks begin as identities, so that a dropped path would not show; the losses of two steps are equal then.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
    batch = {"image": images(3), "sample": torch.arange(3)}
    first, second = (
        task.loss(model, batch, StepContext(session.config, step, 1, 3, nullcontext)).task.item() for step in (0, 1)
    )
    assert first != second


def test_a_checkpoint_of_any_task_teaches(tmp_path):
    source = trained(tmp_path, "digits_simmim", "model.name=swinv2")
    teacher = load_teacher(session_of(tmp_path, f"task.teacher={source.session.directory}"))
    assert teacher.num_features == 16
    for name, value in teacher.network.named_parameters():
        assert torch.equal(value, weights(source)[name]), name
    classifier = trained(
        tmp_path, "digits_dense", "model.moe.blocks=[[-1],[1]]", "model.moe.num_experts=4", "model.moe.group_images=1"
    )
    teacher = load_teacher(session_of(tmp_path, f"task.teacher={classifier.session.directory}"))
    model = classifier.engine.local_model.eval()
    torch.testing.assert_close(teacher(images(3)), model.encode(images(3)).tokens)


def test_low_precision_halves_the_teacher_and_widens_its_features(tmp_path, official):
    full = load_teacher(session_of(tmp_path, *official))
    half = load_teacher(session_of(tmp_path, *official, "task.teacher_precision=bf16"))
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    expected, found = full(images(4)), half(images(4))
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_networks_of_timm_teach(tmp_path, name):
    from swin_moe.data.torchvision_compat import import_torchvision

    import_torchvision()
    timm = pytest.importorskip("timm")
    network = timm.create_model(name).eval()
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    options = (f"task.teacher={tmp_path / 'timm.pth'}", f"task.teacher_model=timm:{name}")
    teacher = load_teacher(session_of(tmp_path, *options))
    size = teacher.size[0]
    image = images(2, size)
    feature = teacher(image)
    assert feature.shape[0] == 2 and feature.shape[-1] == teacher.num_features == network.num_features
    # What the network makes of the same pixels, normalized as it wants them.
    settings = network.pretrained_cfg
    values = (IMAGENET_MEAN, IMAGENET_STD, settings["mean"], settings["std"])
    our_mean, our_std, mean, std = (torch.tensor(v).view(3, 1, 1) for v in values)
    seen = (image * our_std + our_mean - mean) / std
    raw = network.forward_features(seen)
    if raw.ndim == 3:
        raw = raw[:, network.num_prefix_tokens :]
        torch.testing.assert_close(feature.flatten(1, 2), raw, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(feature.permute(0, 3, 1, 2), raw, rtol=1e-4, atol=1e-4)
    # A student of another size gets its own number of tokens.
    task = task_with_teacher(session_of(tmp_path, *options))
    assert task.targets(images(2, 64), (4, 4)).shape == (2, 4, 4, teacher.num_features)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "task.distill.teacher must be set with task.name=distill"),
        (("task.teacher=a.pth",), "task.distill.teacher_model must be a config or timm:NAME"),
        (
            ("task.teacher=a.pth", "task.teacher_model=timm:x", "task.teacher_shard=true"),
            "task.distill.teacher_shard must be",
        ),
        (("task.teacher=a", "task.smooth_l1_beta=0"), "task.distill.smooth_l1_beta must be > 0"),
        (("task.teacher=a", "task.teacher_precision=int8"), "task.distill.teacher_precision must be one of"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        session_of(tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("task.teacher=nowhere",), "task.distill.teacher=nowhere: does not exist"),
        (("task.teacher=gone.pth", "task.teacher_model=digits_dense"), "task.distill.teacher=gone.pth: does not exist"),
        (("task.teacher=gone.pth", "task.teacher_model=timm:test_vit"), "task.distill.teacher=gone.pth: no such file"),
        (
            ("task.teacher=pretrained", "task.distill.teacher_model=timm:no_such_net"),
            "task.distill.teacher_model=timm:no_such_net",
        ),
        (("task.teacher=bad.pth", "task.teacher_model=timm:test_vit"), "task.distill.teacher=bad.pth: "),
        (("task.teacher=other.pth", "task.teacher_model=timm:test_vit"), "other.pth: .*: (Missing|Unexpected) key"),
    ],
)
def test_a_teacher_that_is_not_there_is_named(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    Path("bad.pth").write_bytes(b"not a file of torch's")
    torch.save({"a": torch.ones(3)}, "other.pth")
    with pytest.raises(CheckpointError, match=said):
        load_teacher(session_of(tmp_path, *options))


def test_a_teacher_that_does_not_fit_is_refused(tmp_path, official):
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_teacher(session_of(tmp_path, official[0], "task.teacher_model=swin_tiny_patch4_window7_224"))
