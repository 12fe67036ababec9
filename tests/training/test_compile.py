"""parallel.compile in the trainer: losses of the eager run, graphs only in the first two steps, names as ever."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from swin_moe.config.io import load_config
from swin_moe.engine.limits import check_engine
from swin_moe.parallel.groups import single_process_groups
from swin_moe.run.session import Session
from swin_moe.train import Trainer
from tests.ranks import run_ranks
from tests.training.cases import TINY, losses, open_tiny

CPU = torch.device("cpu")
DENSE = ("model.moe.blocks=[[-1],[-1]]",)
CASES = {
    "block": ("block",),
    "model": ("model",),
    "block, dense, recomputed": ("block", *DENSE, "parallel.recompute=block"),
    "block, padded, dropout, bf16": (
        "block",
        "model.moe.backend=padded",
        "model.moe.dropout=0.1",
        "engine.precision=bf16",
    ),
    "model, accumulated": ("model", "data.micro_batch=8"),
    "block, recomputed": ("block", "parallel.recompute=block"),
    "block, experts choose": (  # their layers stay outside of graphs
        "block",
        "model.moe.choice=expert",
        "model.moe.balance_loss=none",
    ),
}


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def use(monkeypatch, backend: str) -> CompileCounterWithBackend:
    """Makes torch.compile trace and differentiate, but generate no code; returns what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def after_steps(trainer: Trainer, call: Callable[[], object]) -> None:
    """Makes every step end with a call."""
    original = trainer._record

    def record(*arguments) -> None:
        original(*arguments)
        call()

    trainer._record = record  # type: ignore[method-assign, assignment]  # a stand-in


def run(directory, options: tuple[str, ...], on_step=None) -> Trainer:
    config = load_config("digits_swin_moe", [*TINY, f"run.output={directory}", "run.name=run", *options])
    check_engine(config, 1)
    trainer = Trainer(Session(config, single_process_groups(), CPU))
    if on_step is not None:
        after_steps(trainer, on_step)
    trainer.run()
    return trainer


def assert_close(actual: Trainer, expected: Trainer) -> None:
    bf16 = expected.config.engine.precision == "bf16"
    rtol, atol = (1e-2, 1e-3) if bf16 else (1e-5, 1e-6)
    found, wanted = (torch.tensor(losses(trainer.session)) for trainer in (actual, expected))
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


# In others, together with more: micro-batches of a whole model, recomputed blocks with experts, blocks on two ranks.
MORE = ("model", "block", "block, dense, recomputed")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.full] * (c in MORE)) for c in CASES])
def test_trains_as_eager_does_and_the_log_says_what_it_took(case, tmp_path, monkeypatch, caplog):
    what, *options = CASES[case]
    eager = run(tmp_path / "eager", tuple(options))
    counter, graphs = use(monkeypatch, "aot_eager"), []
    with caplog.at_level("INFO", logger="swin_moe"):
        compiled = run(
            tmp_path / "compiled", (f"parallel.compile={what}", *options), lambda: graphs.append(counter.frame_count)
        )
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("compiled ")]
    assert len(lines) == 1 and lines[0].startswith("compiled ") and "in the first two steps" in lines[0], lines
    assert what == "block" or f"compiled {counter.frame_count} graphs" in lines[0]
    assert graphs[0] >= 1 and len(graphs) >= 5 and len(set(graphs[1:])) == 1, f"graphs after every step: {graphs}"
    assert what == "block" or graphs[-1] <= 2
    assert_close(compiled, eager)
    assert [p.name for p in compiled.engine.pieces()] == [p.name for p in eager.engine.pieces()]


def test_a_skipped_step_is_explained(tmp_path, monkeypatch, caplog):
    use(monkeypatch, "aot_eager")
    config = load_config("digits_swin_moe", [*TINY, f"run.output={tmp_path}", "parallel.compile=block"])
    trainer = Trainer(Session(config, single_process_groups(), CPU))
    spoiled = trainer.engine.local_model.layers[0].blocks[0].attn.qkv.weight
    spoiled.register_hook(lambda g: g * float("nan") if trainer.progress.step == 1 else g)
    with caplog.at_level("WARNING", logger="swin_moe"):
        trainer.run()
    messages = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(messages) == 1 and messages[0].endswith("layers.0.blocks.0.attn.qkv.weight on rank 0"), messages


@pytest.mark.full
@pytest.mark.parametrize("what", ["block", "model"])
def test_with_generated_code(what, tmp_path):
    options = ("model.moe.dropout=0.1",)
    assert_close(run(tmp_path / "compiled", (f"parallel.compile={what}", *options)), run(tmp_path / "eager", options))


RANKS = {
    "experts on both": ("block", "parallel.expert=2"),
    "ZeRO-3": ("block", "parallel.zero=3", "parallel.expert=2"),
}
# Stage 2 is the class of stage 3; a whole model holds no exchange, so ranks add to one rank's graphs only replicas.
MORE_RANKS = {
    "ZeRO-2, experts cut": ("block", "parallel.zero=2", "parallel.expert=1", "parallel.expert_shard=1"),
    "model": ("model", "parallel.expert=1", "parallel.expert_shard=1"),
}


def note_graphs(trainer: Trainer, counter: CompileCounterWithBackend, graphs: list[int]) -> None:
    """Notes after every step how many graphs there are."""
    after_steps(trainer, lambda: graphs.append(counter.frame_count))


def run_on_ranks(root: str, cases: dict[str, tuple[str, ...]]) -> dict[str, list]:
    """Returns case -> losses of (eager, compiled) and graphs after every step."""
    results, original = {}, torch.compile
    for case, (what, *options) in cases.items():
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        torch.compile = functools.partial(original, backend=counter)
        found: list[list[tuple[float, float, float]]] = []
        graphs: list[int] = []
        for how in ("none", what):
            session = open_tiny(Path(root) / f"{case}-{how}".replace(" ", "-"), f"parallel.compile={how}", *options)
            check_engine(session.config, session.world_size)
            trainer = Trainer(session)
            note_graphs(trainer, counter, graphs)
            trainer.run()
            found.append(losses(session))
        results[case] = [*found, graphs[len(graphs) // 2 :]]
    torch.compile = original
    return json.loads(json.dumps(results))


@pytest.mark.mpi
@pytest.mark.parametrize("cases", [RANKS, pytest.param(MORE_RANKS, marks=pytest.mark.full)], ids=["few", "more"])
def test_ranks_train_as_eager_ones_do(cases, tmp_path):
    for eager, compiled, graphs in run_ranks(run_on_ranks, 2, tmp_path, str(tmp_path), cases, timeout=900)[0].values():
        torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=1e-5, atol=1e-6)
        assert graphs[0] >= 1 and len(set(graphs[1:])) == 1, graphs


@pytest.mark.parametrize(
    ("options", "world", "sentence"),
    [
        (
            ["engine.name=deepspeed", "parallel.zero=1"],
            2,
            "engine.name=deepspeed does not run parallel.compile=model: its",
        ),
        (["engine.name=fairscale", "parallel.zero=1"], 2, "engine.name=fairscale does not run parallel.compile=model"),
        (["model.moe.backend=tutel"], 1, "parallel.compile=model does not run model.moe.backend=tutel"),
        (["task.name=simmim"], 1, "parallel.compile=model is for task.name=classify, got simmim"),
        (["parallel.zero=3"], 2, "parallel.compile=model does not run parallel.zero=3, .*allowed: none, block"),
        (["parallel.expert=2"], 2, "parallel.compile=model cannot hold MoE layers whose ranks exchange rows"),
        (["model.moe.backend=padded", "model.moe.capacity_factor=0"], 1, "capacity_factor > 0, got 0"),
    ],
)
def test_what_no_graph_holds_is_refused(options, world, sentence):
    config = load_config("digits_swin_moe", ["model.moe.num_experts=4", "parallel.compile=model", *options])
    with pytest.raises(ValueError, match=sentence):
        check_engine(config, world)
