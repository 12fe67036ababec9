"""Graphs of training with a recorder in place of the device: runs of the trainer equal those without, to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swin_moe.config.io import load_config
from swin_moe.moe import dispatch
from swin_moe.ops import extension
from swin_moe.parallel.groups import single_process_groups
from swin_moe.run import training_graphs
from swin_moe.run.metrics import LOGGER
from swin_moe.run.session import Session
from swin_moe.run.training_graphs import GraphedMicroSteps, check_training
from swin_moe.tasks.classify import Classify
from swin_moe.train import Trainer
from tests.engine.test_waits import AsOnDevice
from tests.tasks import cases
from tests.training.non_finite import Messages
from tests.training.recorder import HostRecorder

DENSE, MOE = "digits_dense", "digits_swin_moe"
SIMMIM, DISTILL, MOBY = "digits_simmim", "digits_distill", "digits_moby"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    """Rows are counted on the device, as there."""
    monkeypatch.setattr(training_graphs, "DeviceRecorder", HostRecorder)
    monkeypatch.setattr(dispatch, "torch", AsOnDevice())


def build(directory: Path, name: str, graphed: bool, *options: str) -> Trainer:
    overrides = [*cases.TINY, *COMMON, f"run.output={directory}", "run.name=run", *options]
    config = load_config(name, [*overrides, f"engine.cuda_graphs={str(graphed).lower()}"])
    trainer = Trainer(Session(config, single_process_groups(), CPU))
    if graphed:
        recorder = recorder_of(trainer)
        recorder.holders = graphs_of(trainer).holders
        recorder.apart = lambda: without_python(trainer)
    return trainer


@contextmanager
def without_python(trainer: Trainer) -> Iterator[None]:
    """Returns a context for what a device replays: it sees no number of the host, and leaves no object."""
    kept = [layer.stats for layer in graphs_of(trainer).layers]
    with trainer.engine.loss_scale.at(float("nan")):
        yield
    for layer, stats in zip(graphs_of(trainer).layers, kept):
        layer.stats = stats


def graphs_of(trainer: Trainer) -> GraphedMicroSteps:
    assert trainer.micro_steps.graphs is not None
    return trainer.micro_steps.graphs


def recorder_of(trainer: Trainer) -> Any:
    return graphs_of(trainer).recorder


def outcome(trainer: Trainer) -> tuple[list[dict], dict[str, torch.Tensor], list[str]]:
    """Returns what a run records, saves and warns of, without times."""
    messages = Messages()
    LOGGER.addHandler(messages)
    try:
        trainer.resume()
        trainer.run()
    finally:
        LOGGER.removeHandler(messages)
    kept = ("train/", "eval/", "moe/")
    rows = [
        {k: v for k, v in row.items() if k.startswith(kept) and "/ms_" not in k}
        for row in cases.records(trainer.session)
    ]
    return rows, {p.name: torch.as_tensor(p.tensor).clone() for p in trainer.engine.pieces()}, messages.texts


def assert_equal(found: tuple, expected: tuple) -> None:
    assert found[0] == expected[0]
    different = [name for name, tensor in expected[1].items() if not torch.equal(found[1][name], tensor)]
    assert not different and found[1].keys() == expected[1].keys()
    assert found[2] == expected[2]


# 50 images: steps of 24, 24 and 2, an evaluation after each epoch.
COMMON = (
    "engine.precision=fp32",
    "data.global_batch=24",
    "optim.epochs=2",
    "optim.ema=0.5",
    "model.drop_path_rate=0.3",
    "model.drop_rate=0.1",
    "optim.lr=0.01",
)
THIRDS, BF16 = "data.micro_batch=8", "engine.precision=bf16"
LONGER = "optim.epochs=3"
PADDED = (*cases.MOE, "model.moe.backend=padded", "model.moe.dropout=0.1", "model.moe.gate_noise=1.0")
BY_COUNT = "by count"
RUNS = {
    "plain": (DENSE, ()),
    "accumulated": (DENSE, (THIRDS,)),
    "copies": (DENSE, (BF16,)),
    "copies, accumulated": (DENSE, (BF16, THIRDS)),
    "mixed": (DENSE, (THIRDS, "task.mixup=0.8", "task.cutmix=1.0")),
    "padded": (DENSE, PADDED),
    "padded, accumulated, copies": (DENSE, (*PADDED, THIRDS, BF16)),
    BY_COUNT: (DENSE, (*cases.MOE, BF16, THIRDS)),
    "soft": (DENSE, (*cases.MOE, "model.moe.choice=soft", "model.moe.balance_loss=none")),
    "balanced by a bias": (
        DENSE,
        (
            *PADDED,
            THIRDS,
            "model.moe.scores=sigmoid",
            "model.moe.bias_rate=0.01",
            "model.moe.balance_loss=none",
            "model.moe.gate_noise=0",
        ),
    ),
    "recomputed": (DENSE, (*PADDED, THIRDS, "parallel.recompute=block")),
    "swinv2": (DENSE, ("model.name=swinv2", THIRDS)),
    "offloaded": (DENSE, ("engine.offload=optimizer", THIRDS)),
    "frozen": (DENSE, ("optim.freeze=backbone", THIRDS)),
    "fp64": (DENSE, ("engine.precision=fp64", THIRDS)),
    "skipped": (DENSE, ("engine.precision=fp16", THIRDS, LONGER)),
    "simmim": (SIMMIM, (THIRDS, BF16)),
    "simmim, padded": (SIMMIM, PADDED),
    "simmim v2, recomputed": (SIMMIM, (*cases.V2, THIRDS, "parallel.recompute=block")),
    "distill": (DISTILL, (*cases.DISTILL, THIRDS, BF16)),
    "distill, padded": (DISTILL, (*cases.DISTILL, *PADDED, "task.teacher_precision=bf16")),
    "moby": (MOBY, (*cases.MOBY, BF16)),
    "moby, padded": (MOBY, (*cases.MOBY, *PADDED, "parallel.recompute=block")),
}

# Only with --full. "moby" keeps copies of weights in one micro-batch as "copies" does; "swinv2" accumulates in fp32 as
# "accumulated" and "fp64" do; "simmim, padded" is "padded" with another task; "padded, accumulated, copies" is "copies,
# accumulated" and experts; what the others put together, "simmim, padded", "swinv2", "recomputed", "moby" and "distill"
# have apart.
SELDOM = (
    "accumulated",
    "copies",
    "copies, accumulated",
    "padded",
    "fp64",
    "simmim v2, recomputed",
    "distill, padded",
    "moby, padded",
)


def run(directory: Path, name: str, *, graphed: bool, source: str = "") -> tuple[tuple, Trainer]:
    setup, options = RUNS[name]
    if setup == DISTILL:
        directory.mkdir()
        cases.write_teacher(directory)
        options = tuple(option.replace("TEACHER", f"{directory}/teacher") for option in options)
    trainer = build(directory, setup, graphed, *options, *((f"checkpoint.load={source}",) if source else ()))
    if name == "skipped":  # steps overflow and are repeated to name what did, some of them from recordings
        trainer.engine.loss_scale.value = 2.0**24
    return outcome(trainer), trainer


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in SELDOM else name for name in RUNS]
)
def test_a_run_equals_the_eager_one_to_the_bit(tmp_path, name):
    expected, _ = run(tmp_path / "eager", name, graphed=False)
    found, trainer = run(tmp_path / "graphed", name, graphed=True)
    assert_equal(found, expected)
    recorder = recorder_of(trainer)
    full_steps = 6 if LONGER in RUNS[name][1] else 4  # the first of them runs as always
    counts = (2, 3 * (full_steps - 1)) if THIRDS in RUNS[name][1] else (1, full_steps - 1)
    assert (recorder.recorded, recorder.replayed) == counts, vars(recorder)
    # A recording on a device must not ask it: products of experts, one operator there, are a loop here, and networks
    # in evaluation keep their last position biases and compare weights (attention.py:_kept_cpb_table) on the CPU alone.
    allowed = {"tolist"} if name == BY_COUNT else {"equal"} if RUNS[name][0] in (DISTILL, MOBY) else set()
    assert all(set(waits) <= allowed for waits in recorder.waits), recorder.waits[0]
    if name == "skipped":
        assert 3 <= len(found[2]) < 9, found[2]  # some of the replayed steps were, and some were not


@pytest.mark.parametrize("graphed", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_run_continues_the_other_way(tmp_path, graphed):
    name, every = "padded, accumulated, copies", "checkpoint.every=1"
    setup, options = RUNS[name][0], (*RUNS[name][1], LONGER)
    whole = build(tmp_path / "whole", setup, not graphed, *options, every)
    expected = outcome(whole)
    source = sorted((tmp_path / "whole" / "run" / "checkpoints").glob("0*"))[3]
    rest = build(tmp_path / "rest", setup, graphed, *options, f"checkpoint.load={source}")
    rows, saved, _ = outcome(rest)
    assert rows == expected[0][-len(rows) :] and len(rows) == 5 + 2
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected[1].items())


def test_weights_that_lie_elsewhere_are_recorded_anew(tmp_path):
    options = (THIRDS, LONGER, "optim.ema=0")  # averages keep the weights by where they lie
    expected = outcome(build(tmp_path / "eager", DENSE, False, *options))
    trainer = build(tmp_path / "graphed", DENSE, True, *options)
    record = trainer._record

    def move(*arguments):
        record(*arguments)
        if trainer.progress.step == 5:  # the second of an epoch: the next is its remainder
            for parameter in trainer.engine.local_model.parameters():
                parameter.data = parameter.data.clone()

    trainer._record = move  # type: ignore[method-assign]  # a stand-in
    assert_equal(outcome(trainer), expected)
    assert recorder_of(trainer).recorded == 4


def test_a_later_micro_batch_adds_to_what_the_first_left(tmp_path):
    """The first of a step runs as always where it comes for the first time; then so do the others."""
    trainer = build(tmp_path, DENSE, True, THIRDS, LONGER)
    recorder, counts = recorder_of(trainer), []
    record = trainer._record

    def count(*arguments):
        record(*arguments)
        counts.append((recorder.ran, recorder.recorded, recorder.replayed))

    trainer._record = count  # type: ignore[method-assign]  # a stand-in
    outcome(trainer)
    assert counts[:3] == [(3, 0, 0), (3, 2, 3), (6, 2, 3)]  # the remainder of an epoch is the third step
    assert counts[3:] == [(6, 2, 6), (6, 2, 9), (9, 2, 9), (9, 2, 12), (9, 2, 15), (12, 2, 15)]


def test_images_of_the_step_are_a_recording_of_their_own(tmp_path):
    found = []
    for graphed in (False, True):
        trainer = build(tmp_path, DENSE, graphed, THIRDS)
        batches, context = next(iter(trainer.loader.batches(0, 1))), trainer._context(0, 24)
        losses = []
        for images in (24, 24, 24, 23, 23, 24):  # fewer where some were broken
            losses.append(trainer.micro_steps.run(batches, replace(context, num_samples=images)))
            trainer.engine.discard_gradients()
        trainer.loader.close()
        found.append(losses)
        assert not graphed or recorder_of(trainer).recorded == 4
    assert all(map(torch.equal, *found)) and not torch.equal(found[0][2], found[0][3])


def test_no_more_recordings_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(training_graphs, "MOST_GRAPHS", 1)
    expected, _ = run(tmp_path / "eager", "accumulated", graphed=False)
    found, trainer = run(tmp_path / "graphed", "accumulated", graphed=True)
    assert_equal(found, expected)
    assert recorder_of(trainer).recorded == 1


def test_what_cannot_be_recorded_is_one_sentence(tmp_path, monkeypatch):
    def waits(recorder, call):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(HostRecorder, "record", waits)
    sentence = r"^engine.cuda_graphs=true: .* shape \(24, 3, 16, 16\) .*\(operation not permitted .*capturing\); use"
    with pytest.raises(ValueError, match=sentence):
        outcome(build(tmp_path, DENSE, True))


class Plain(Classify):
    """A task of another place, whose loss is written in one piece."""

    inputs = loss_of = None  # type: ignore[assignment]


BF16_MOE = ("engine.precision=bf16",)
ELSEWHERE = f"task.name={__name__}:Plain"
REFUSED = [
    (DENSE, (), "cpu", 1, "engine.cuda_graphs=true needs a CUDA device, this run computes on cpu; use"),
    (DENSE, (), "cuda", 2, "engine.cuda_graphs=true trains on one rank, got 2: exchanges between ranks"),
    (DENSE, ("parallel.compile=block",), "cuda", 1, "parallel.compile=none, got block"),
    (DENSE, ("engine.name=deepspeed", "parallel.zero=1"), "cuda", 1, "engine.name=deepspeed does not train with"),
    (DENSE, ("engine.name=fairscale", "parallel.zero=1"), "cuda", 1, "engine.name=fairscale does not train with"),
    (DENSE, (ELSEWHERE,), "cuda", 1, "does not train task.name=.*:Plain, whose loss is not said to be recordable"),
    (MOE, (), "cuda", 1, "needs engine.precision=bf16 and channels in multiples of 8"),
    (MOE, ("model.moe.backend=padded", "model.moe.capacity_factor=0"), "cuda", 1, "moe.capacity_factor > 0, got 0"),
    (MOE, ("model.moe.backend=tutel", *BF16_MOE), "cuda", 1, "model.moe.backend=tutel; use native or padded"),
    (MOE, ("model.moe.choice=expert", "model.moe.balance_loss=none"), "cuda", 1, "model.moe.choice=expert is not for"),
]


@pytest.mark.parametrize(("name", "options", "device", "world", "sentence"), REFUSED)
def test_refused_in_one_sentence(monkeypatch, name, options, device, world, sentence):
    monkeypatch.setattr(extension, "COMPILED", {"cpu", "cuda"})
    with pytest.raises(ValueError, match=sentence):
        check_training(load_config(name, ["engine.cuda_graphs=true", *options]), device, world)
    check_training(load_config(name, options), device, world)


def test_draws_without_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(extension, "COMPILED", {"cpu"})
    with pytest.raises(ValueError, match="needs the compiled kernels: draws would ask the device for the step"):
        check_training(load_config(DENSE, ["engine.cuda_graphs=true"]), "cuda", 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (DENSE, ("engine.precision=fp16", "parallel.recompute=block", "engine.offload=optimizer")),
        (MOE, BF16_MOE),
        (MOE, ("model.moe.backend=padded",)),
        (SIMMIM, ()),
        (MOBY, ()),
    ],
)
def test_what_asks_the_device_for_nothing_may_start(monkeypatch, name, options):
    monkeypatch.setattr(extension, "COMPILED", {"cpu", "cuda"})
    check_training(load_config(name, ["engine.cuda_graphs=true", *options]), "cuda", 1)
