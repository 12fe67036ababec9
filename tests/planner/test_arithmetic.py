"""Arithmetic laid over segments is the network's own count, whatever wraps it and however few blocks are traced."""

from dataclasses import replace

import pytest

from swin_moe.config.io import load_config
from swin_moe.planner.arithmetic import macs_of_segments
from swin_moe.planner.hardware import load_hardware
from swin_moe.planner.layouts import layout_in
from swin_moe.planner.plan import Traces
from swin_moe.planner.simulation.program import stretches
from swin_moe.planner.step_time import predict_time
from swin_moe.planner.workload import build_workload, moments_of, rows_share, weight_dtype

IMAGES = 2
BATCH = [f"data.global_batch={IMAGES}", "model.moe.capacity_scope=rank"]


def traced(name, *options):
    """Returns (config, workload, layout, segments) of a config on one rank."""
    config = load_config(name, [*BATCH, *options])
    layout = layout_in(config, 1)
    return config, build_workload(config), layout, Traces(config).of(layout)


def sums(name, *options):
    """Returns (forward, backward) multiply-accumulates of an image, laid over segments, and the network's count."""
    config, work, layout, segments = traced(name, *options)
    macs = macs_of_segments(config, work, layout, segments)
    both = [sum(m for m, s in zip(macs, segments) if s.backward == backward) / IMAGES for backward in (False, True)]
    return *both, work


@pytest.mark.parametrize(
    "name",
    [
        "digits_dense",
        "digits_swin_moe",
        "digits_simmim",
        "swin_tiny_patch4_window7_224",
        "swin_mlp_tiny_c6_patch4_window8_256",
        # As the others in all that is counted; 8 s for its 42 blocks.
        pytest.param("swinv2_giant_3b_patch4_window12_192_simmim", marks=pytest.mark.full),
    ],
)
def test_all_of_the_networks_arithmetic_is_laid_over_segments(name):
    forward, backward, work = sums(name, "parallel.recompute=none")
    assert forward == pytest.approx(work.active_flops, rel=1e-12)
    assert backward == pytest.approx(2 * work.active_flops, rel=1e-12)
    _, again, _ = sums(name, "parallel.recompute=block")
    blocks = sum(macs for module, macs in work.macs if "blocks" in module)
    assert again == pytest.approx(2 * work.active_flops + blocks, rel=1e-12)


def test_several_passes_of_a_network_are_its_work_in_all():
    forward, backward, work = sums("digits_moby")
    assert forward + backward == pytest.approx(3 * work.active_flops, rel=5e-3)  # two views share one head's backward


def test_merging_is_where_it_is_computed():
    config, work, layout, segments = traced("digits_dense")
    merging = dict(work.macs)["layers.0.downsample"] * IMAGES
    macs = {(s.name, s.backward): m for s, m in zip(segments, macs_of_segments(config, work, layout, segments))}
    assert macs["layers.0.blocks.1+", False] == merging and macs["layers.1.blocks.0-", True] == 2 * merging


def test_no_step_is_faster_than_the_machines_peak():
    machine = load_hardware("a100_80")
    for name in ("digits_simmim", "swin_tiny_patch4_window7_224", "digits_moby"):
        config, work, layout, segments = traced(name, "engine.precision=bf16")
        seconds = predict_time(config, machine, work, layout, segments).seconds
        assert 6 * work.active_flops * IMAGES / seconds < machine.flops["bf16"]


@pytest.mark.parametrize(
    "options, share",
    [
        ([], 1.0),
        (["model.moe.capacity_factor=0.5"], 0.5),  # what finds no slot is neither sent nor computed
        (["model.moe.capacity_factor=-0.5"], 0.5),
        (["model.moe.capacity_factor=1.25"], 1.0),
        (["model.moe.backend=padded", "model.moe.capacity_factor=1.25"], 1.25),
        (["model.moe.backend=padded", "model.moe.capacity_factor=0.5"], 0.5),  # slots are as many as the capacity
        (["model.moe.backend=padded", "model.moe.capacity_factor=0"], 1.0),
        (["model.moe.blocks=[]", "model.moe.backend=padded", "model.moe.capacity_factor=2"], 1.0),
    ],
)
def test_rows_are_what_slots_there_are(options, share):
    config = load_config("digits_swin_moe", ["model.moe.capacity_factor=0", *options])
    assert rows_share(config.model.moe) == share
    work = build_workload(config)
    dense = load_config("digits_swin_moe", ["model.moe.blocks=[]"])
    experts = sum(2 * layer.tokens * layer.dim * layer.hidden for layer in work.moe)
    forward, _, _ = sums("digits_swin_moe", "model.moe.capacity_factor=0", *options)
    assert forward == pytest.approx(build_workload(dense).active_flops + (share - 1) * experts, rel=1e-9)


def test_padded_rows_are_those_that_a_real_dispatcher_makes():
    import torch

    from swin_moe.moe.dispatch import padded_rows
    from swin_moe.moe.routing import route

    for factor in (0.5, 1.25):
        moe = load_config(
            "digits_swin_moe", ["model.moe.backend=padded", f"model.moe.capacity_factor={factor}"]
        ).model.moe
        tokens, experts = 64, moe.num_experts
        capacity = int(factor * tokens / experts)
        routing = route(torch.randn(tokens, experts), top_k=1, capacity=capacity)
        assert padded_rows(routing) * experts == rows_share(moe) * tokens


def test_state_by_precision_and_optimizer():
    config = load_config("digits_dense")
    sizes = {
        p: weight_dtype(replace(config, engine=replace(config.engine, precision=p))).itemsize
        for p in ("fp32", "bf16", "fp16", "fp64")
    }
    assert sizes == {"fp32": 4, "bf16": 4, "fp16": 4, "fp64": 8}
    optim = config.optim
    assert moments_of(optim) == 2 and moments_of(replace(optim, name="sgd")) == 1
    assert moments_of(replace(optim, name="sgd", momentum=0.0)) == 0


def test_the_simulator_knows_the_blocks_of_a_wrapped_network():
    config, work, layout, segments = traced("digits_simmim")
    machine = load_hardware("a100_80")
    found, _ = stretches(config, machine, work, layout, segments)
    blocks = {f"layers.{stage}.blocks.{b}" for stage, depth in enumerate(config.model.depths) for b in range(depth)}
    assert blocks <= {part.name for part in found}
    time = predict_time(config, machine, work, layout, segments)
    assert sum(part.seconds for part in found) == pytest.approx(time.forward + time.backward)
