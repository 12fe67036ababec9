"""What the planner says of memory against real engines and steps on 1 and 2 ranks, and against slower ways."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from swin_moe.config.io import load_config
from swin_moe.ops import extension
from swin_moe.parallel.sharding import Degrees
from swin_moe.planner import memory
from swin_moe.planner.layouts import Layout
from swin_moe.planner.micro_step import trace_exactly, trace_micro_step
from swin_moe.planner.plan import Traces
from swin_moe.planner.trace import LiveBytes, over_time
from swin_moe.planner.workload import build_workload
from tests.ranks import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "planner"))

ALONE = Degrees(1, 1, 1)
TINY = (
    "data.global_batch=8 model.moe.blocks=[] model.img_size=32 model.embed_dim=16 model.depths=[2,4] "
    "model.num_heads=[1,2] model.window_size=4"
)
CASES = {
    1: ("swin bf16, copies of weights", "swin_moe"),
    2: (
        "swin FairScale OSS",
        "swinv2 ZeRO-3, recomputed",
        "swin_moe ZeRO-1, expert 2, payload bf16",
        "swin_moe bf16, expert 2, 2 micro-batches",
    ),
}


MORE = {  # with --full
    1: (),
    2: (
        "swinv2 bf16",
        "swin_moe DeepSpeed ZeRO-2, expert 2",
        "swin DeepSpeed ZeRO-1, 2 micro-batches",
        "swin DeepSpeed ZeRO-2, 2 micro-batches",
    ),
}


def tiny(*options):
    return load_config("digits_swin_moe", [*TINY.split(), *options])


def compared(names):
    """Returns case -> class -> (predicted, measured), on every rank."""
    import planner_memory
    import torch.distributed as dist

    world = dist.get_world_size()
    chosen = [case for case in planner_memory.CASES if case.ranks == world and case.name in names]
    assert len(chosen) == len(names)
    return {case.name: planner_memory.compare(case, world) for case in chosen}


@pytest.mark.mpi
@pytest.mark.parametrize("world", CASES)
def test_real_ranks_hold_what_was_said(request, tmp_path, world):
    names = CASES[world] + (MORE[world] if request.config.getoption("--full") else ())
    for name, found in run_ranks(compared, world, tmp_path, names, timeout=600)[0].items():
        for exact in ("parameters", "gradients", "optimizer", "averages"):
            assert found[exact][0] == found[exact][1], (name, exact)
        said, seen = found["activations"]
        assert abs(said / seen - 1) < 0.03, (name, said, seen)
        said, seen = found["even load"]
        assert abs(said / seen - 1) < 0.05, (name, said, seen)


@pytest.mark.parametrize(
    "options",
    [
        ("model.name=swinv2", "model.extra_norm_every=2"),
        ("model.name=swin", "parallel.recompute=block", "engine.precision=bf16"),
        ("model.name=swin_mlp",),
        ("model.name=swin_moe", "model.moe.blocks=[[1],[1,3]]", "model.moe.num_experts=4", "model.moe.top_k=2"),
        ("model.name=swin", "task.name=simmim", "task.simmim.mask_patch_size=8", "model.num_classes=0"),
    ],
    ids=lambda options: " ".join(options),
)
def test_repeated_blocks_and_other_micro_batches_are_those_of_a_whole_trace(options):
    config = tiny(*options)
    degrees = Degrees(1, 1, 8)  # many ranks: weights are cast in every forward
    fast, slow = trace_micro_step(config, degrees).at(8), trace_exactly(config, degrees, 8)
    for quick, exact in zip(over_time(fast), over_time(slow)):
        assert quick.max() == pytest.approx(exact.max(), rel=2e-3)
        assert quick[-1] == pytest.approx(exact[-1], rel=2e-2, abs=4096)
    for field in ("launches", "moved", "moved_by_products"):
        total = sum(getattr(s, field) for s in slow)
        assert sum(getattr(s, field) for s in fast) == pytest.approx(total, rel=2e-3), field


def test_experts_of_any_layout_are_those_of_a_whole_trace():
    """Of one layout all blocks are traced, of others those with experts, and what lies between two is on a line."""
    config = tiny(
        "model.name=swinv2",
        "model.depths=[2,6]",
        "model.moe.blocks=[[-1],[3,5]]",
        "model.moe.num_experts=8",
        "model.extra_norm_every=4",
        "model.moe.capacity_factor=0",
        "model.moe.capacity_scope=rank",
    )
    traces = Traces(config)
    for expert, shard in ((8, 1), (1, 1), (4, 1), (8, 4)):  # the last but one between 2 and 4, but at an end here
        checked(traces, config, Degrees(expert, shard, 32 // (expert * shard)))
    wide = replace(config, model=replace(config.model, moe=replace(config.model.moe, num_experts=16)))
    traces = Traces(wide)
    for expert, shard in ((4, 1), (16, 4)):  # between 2 and 8 ranks; between cuts in 2 and in 8
        checked(traces, wide, Degrees(expert, shard, 128 // (expert * shard)))


def checked(traces, config, degrees):
    layout = Layout(
        degrees.world_size,
        degrees.expert,
        degrees.expert_shard,
        degrees.expert_data,
        "torch",
        0,
        "none",
        0,
        4,
        1,
        1,
        "linear",
        "none",
        "none",
    )
    fast, slow = traces.of(layout), trace_exactly(config, degrees, 4)
    for quick, exact in zip(over_time(fast), over_time(slow)):
        assert quick.max() == pytest.approx(exact.max(), rel=1e-3), degrees
        assert quick[-1] == pytest.approx(exact[-1], rel=2e-2, abs=4096), degrees
    for field in ("launches", "moved", "moved_by_products"):
        total = sum(getattr(s, field) for s in slow)
        assert sum(getattr(s, field) for s in fast) == pytest.approx(total, rel=1e-3), (degrees, field)


def test_attention_in_turns_is_traced_at_its_size():
    config = tiny("model.name=swinv2", "model.attention_chunk=4")
    fast = trace_micro_step(config, Degrees(1, 1, 8), images=8).at(8)
    slow = trace_exactly(config, Degrees(1, 1, 8), 8)
    assert over_time(fast)[0].max() == pytest.approx(over_time(slow)[0].max(), rel=1e-3)


def test_recomputation_holds_less_and_experts_elsewhere_need_buffers():
    config = tiny("model.name=swin")
    again = replace(config, parallel=replace(config.parallel, recompute="block"))
    whole, less = (over_time(trace_micro_step(c, ALONE).at(8))[0].max() for c in (config, again))
    assert less < 0.7 * whole
    moe = tiny("model.name=swin_moe", "model.moe.blocks=[[1],[1,3]]", "model.moe.num_experts=4")
    here, there = (over_time(trace_micro_step(moe, d).at(8))[1][-1] for d in (ALONE, Degrees(4, 1, 1)))
    assert there < here  # gradients of a quarter of the experts


@pytest.mark.parametrize(
    "zero, accumulation, gradients, buffers",
    [
        # Whole at the end of the backward, beside the bucket; then the own part (9) is larger than the bucket (8).
        (1, 1, [0, 0, 6, 9, 18, 18], [0, 8, 8, 8, 8, 9]),
        # 3 finds no room beside 6, which is copied to be sent; then the own part is there. So with 9, and at the end.
        (2, 1, [0, 0, 9, 9, 9, 9], [0, 8, 8, 8 + 3, 8, 8 + 9]),
        # Whole from the start, and no bucket until the backward is over.
        (1, 2, [18, 18, 18, 18, 18, 18], [0, 0, 0, 0, 0, 9]),
        (2, 2, [18, 18, 18, 18, 18, 18], [0, 0, 0, 0, 0, 9]),
    ],
)
def test_gradients_under_deepspeed_lie_in_one_place_at_a_time(monkeypatch, zero, accumulation, gradients, buffers):
    """Gradients of 6, 3 and 9 bytes, a bucket of 8, 2 ranks. Once gradients, bucket and activations were added up."""
    monkeypatch.setattr(memory, "_BUCKET", 8)
    layout = Layout(2, 1, 1, 2, "deepspeed", zero, "none", 0, 4, accumulation, 1, "linear", "none", "none")
    states = memory.Memory(18, 9, 27, 0, 0, 0, 0)
    kept, beside = memory._reduced_by_deepspeed(layout, states, np.array([0.0, 0.0, 6.0, 9.0, 18.0]))
    assert (kept.tolist(), beside.tolist()) == (gradients, buffers)


def test_live_bytes_of_a_known_program():
    """Two products of 4 KiB: what is kept for backward lives, what was there before does not count."""
    weight = torch.zeros(32, 32, requires_grad=True)
    with LiveBytes([weight]) as seen:
        x = torch.ones(32, 32)
        y = x @ weight
        assert seen.live == 2 * 4096
        del x  # kept for the gradient of the weight
        assert seen.live == 2 * 4096
        y.sum().backward()
        assert weight.grad is not None
        seen.is_gradient(weight.grad)
        assert seen.gradients == 4096
        del y
        assert seen.live == 0
        seen.end()
    (segment,) = seen.segments
    assert segment.live[-1] == 0 and segment.gradients[-1] == 4096 and segment.live.max() >= 3 * 4096
    assert isinstance(segment.live, np.ndarray) and segment.launches > 2


def test_a_plan_of_gpus_needs_no_compiled_kernels_here(monkeypatch):
    """A laptop without them once planned attention's scores for them as well."""
    config = tiny("model.name=swinv2", "model.depths=[1,1]")
    here = trace_exactly(config, ALONE, 2, kernels=True)
    monkeypatch.setattr(extension, "COMPILED", frozenset())
    without, kept = trace_exactly(config, ALONE, 2, kernels=True), trace_exactly(config, ALONE, 2)
    assert [s.operators for s in without] == [s.operators for s in here]
    assert over_time(without)[0].max() == over_time(here)[0].max() < over_time(kept)[0].max()
    traces = Traces(config, kernels=True).of(
        Layout(1, 1, 1, 1, "torch", 0, "none", 0, 2, 4, 1, "linear", "none", "none")
    )
    assert any("window_attention" in name for s in traces for name, _ in s.operators)


@pytest.mark.parametrize("name", ["canvas_upernet", "canvas_mask_rcnn"])
def test_images_of_any_size_are_refused(name):
    config = load_config(name)
    with pytest.raises(ValueError, match=f"task.name={config.task.name}: the planner counts networks of images of"):
        trace_exactly(config, Degrees(1, 1, 1), 2)


def test_weights_that_are_cast_in_every_forward_live_until_backward():
    """As bf16 beside gathered weights: a plan of ZeRO-3 once took the trace of a layout that keeps copies."""
    config = load_config("digits_swin_moe", ["engine.precision=bf16"])
    traces = Traces(config)
    layouts = [Layout(2, 1, 1, 2, "torch", zero, "none", 0, 4, 1, 1, "linear", "none", "none") for zero in (0, 3)]
    kept, cast = (float(over_time(traces.of(layout))[0].max()) for layout in layouts)
    copied = 2 * sum(p.numel for p in build_workload(config).parameters if p.copied)
    assert copied > 5e5 and cast - kept == pytest.approx(copied, rel=0.1)
