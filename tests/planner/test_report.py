"""Costs of a schedule, the interval of uneven routing, and the picture of a plan."""

from dataclasses import replace

import numpy as np
import pytest

from swin_moe.config.io import apply_overrides, load_config
from swin_moe.planner.hardware import load_hardware
from swin_moe.planner.layouts import layout_in
from swin_moe.planner.memory import Memory
from swin_moe.planner.plan import Planned
from swin_moe.planner.report.costs import checkpoint_bytes, describe_costs, images_of, predict_costs
from swin_moe.planner.report.plot import _COLOURS, draw_plans
from swin_moe.planner.report.skew import default_skew, fullest_rank, recorded_skew, step_interval
from swin_moe.planner.step_time import StepTime
from swin_moe.planner.workload import build_workload

DIGITS = load_config("digits_swin_moe", ["data.global_batch=64"])
WORK = build_workload(DIGITS)


def planned(config=DIGITS, ranks=2, seconds=1.0, exchange=0.25, rate=64.0, **memory):
    """Returns a planned layout of made-up figures."""
    layout = layout_in(config, ranks)
    parts = {name: memory.get(name, 1e6) for name in Memory.__dataclass_fields__}
    time = StepTime(0.0, seconds - exchange, exchange, 0.0, 0.0, 0.0, {"compute": 1.0})
    return Planned(layout, Memory(**parts), time, rate, 0.5)


def test_costs_are_steps_times_seconds():
    config = apply_overrides(
        DIGITS, ["optim.epochs=10", "data.name=synthetic", "data.synthetic_samples=1000", "data.drop_last=true"]
    )
    machine = replace(load_hardware("h100"), watts=500.0, price_per_hour=3.0, ranks_per_node=2)
    costs = predict_costs(config, machine, WORK, planned(seconds=2.0), 0)
    assert (costs.images_per_epoch, costs.steps) == (1000, 150)  # 15 whole batches of 64
    hours = 150 * 2 / 3600
    assert costs.days == pytest.approx(hours / 24) and costs.energy_kwh == pytest.approx(hours)  # 2 ranks of 500 W
    assert costs.price_dollars == pytest.approx(2 * 3 * hours)
    assert costs.save_seconds == pytest.approx(costs.checkpoint_bytes / machine.disk_bytes_per_second)
    assert costs.reshard_seconds == pytest.approx(2 * costs.save_seconds)
    two_nodes = predict_costs(config, replace(machine, ranks_per_node=1), WORK, planned(), 640)
    assert two_nodes.steps == 100 and two_nodes.save_seconds == pytest.approx(costs.save_seconds / 2)
    assert "10 epochs of 1,000 images, 150 steps: 5.0 minutes" in describe_costs(costs)[0]


def test_images_are_those_of_the_data_set_or_unknown():
    assert images_of(DIGITS) == 1437
    assert images_of(load_config("swinv2_giant_3b_patch4_window12_192_22k")) == 14_197_122
    folder = apply_overrides(DIGITS, ["data.name=folder", "data.path=/nowhere", "model.num_classes=7"])
    assert images_of(folder) is None
    assert images_of(apply_overrides(DIGITS, ["data.name=canvases", "data.dense.canvases=77"])) == 77
    coco = apply_overrides(DIGITS, ["data.name=coco", "data.path=/nowhere"])
    assert images_of(coco) is None
    assert images_of(apply_overrides(coco, ["model.num_classes=80"])) == 117_266
    costs = predict_costs(folder, load_hardware("cpu"), WORK, planned(), 0)
    assert costs.days is None and costs.price_dollars is None and "--images N" in describe_costs(costs)[0]


@pytest.mark.parametrize(
    "options, copies",
    [
        (["optim.name=adamw"], 3),
        (["optim.name=sgd"], 2),
        (["optim.name=sgd", "optim.momentum=0"], 1),
        (["optim.name=adamw", "optim.ema=0.9"], 4),
    ],
)
def test_a_checkpoint_holds_weights_moments_and_averages(options, copies):
    config = apply_overrides(DIGITS, options)
    work = build_workload(config)
    frozen = work.numel() - work.numel(trained=True)
    expected = 4 * (copies * work.numel() - frozen * (copies - 1 - (config.optim.ema > 0)))
    assert checkpoint_bytes(config, work) == expected


def test_the_fullest_rank_is_found_by_going_through_all():
    loads = np.random.default_rng(1).random((20, 8)) + 0.1
    loads /= loads.mean(1, keepdims=True)
    for ranks in (1, 2, 4, 8):
        each = 8 // ranks
        slow = [max(sum(row[r * each : (r + 1) * each]) / each for r in range(ranks)) for row in loads]
        assert fullest_rank(loads, ranks) == pytest.approx(np.maximum(slow, 1.0))


def test_the_interval_grows_with_the_fullest_rank_only_where_rows_are_uneven():
    machine, work = load_hardware("cpu"), WORK
    spread = apply_overrides(DIGITS, ["parallel.expert=2", "model.moe.capacity_factor=0"])
    even = recorded_skew([[5] * 8], 8, "even")
    half = recorded_skew([[3, 3, 3, 3, 1, 1, 1, 1]], 8, "uneven")  # the first of 2 ranks has 1.5 times an even load
    one = planned(spread)
    assert step_interval(spread, machine, work, one, even) == pytest.approx((1.0, 1.0))
    low, high = step_interval(spread, machine, work, one, half)
    assert low == high and high == pytest.approx(1 + 0.5 * (0.25 + (high - 1) / 0.5 - 0.25)) and high > 1.125
    local = planned(apply_overrides(DIGITS, ["parallel.expert=1"]))
    assert step_interval(spread, machine, work, local, half) == (1.0, 1.0)  # every rank computes its own rows
    padded = apply_overrides(spread, ["model.moe.backend=padded", "model.moe.capacity_factor=1.25"])
    assert step_interval(padded, machine, work, one, half) == (1.0, 1.0)
    capped = apply_overrides(spread, ["model.moe.capacity_factor=1.25"])
    assert step_interval(capped, machine, work, one, half)[1] == pytest.approx(1 + 0.25 / 0.5 * (high - 1))
    low, high = step_interval(spread, machine, work, one, default_skew(8))
    assert 1.0 <= low < high


def test_loads_of_another_number_of_experts_are_drawn_from():
    skew = recorded_skew([[1, 2, 3, 6]], 16, "RUN")
    assert skew.loads.shape == (1, 16) and skew.loads.mean() == pytest.approx(1.0)
    assert "drawn for 16 experts instead of 4" in skew.source
    with pytest.raises(ValueError, match="run 'RUN' recorded no loads of experts"):
        recorded_skew([], 8, "RUN")


def test_the_picture_shows_every_class_in_proportion_and_the_limit():
    memory = {"parameters": 4e9, "gradients": 2e9, "optimizer": 8e9, "averages": 0.0, "activations": 6e9}
    memory |= {"gathered": 0.0, "workspace": 0.0}
    plans = {1: planned(ranks=1, rate=10.0, **memory), 2: planned(rate=15.0, **memory)}
    image = np.asarray(draw_plans(plans, "title", 30e9))
    assert image.shape[1] == 1200
    bars = image[585:940, 200:1170]  # of the lower panel, without its legend
    counts = {name: int((bars == colour).all(-1).sum()) for name, colour in _COLOURS.items()}
    assert counts["averages"] == counts["gathered"] == counts["workspace"] == 0
    for name in ("parameters", "gradients", "optimizer"):
        assert counts[name] / counts["activations"] == pytest.approx(memory[name] / memory["activations"], rel=0.08)
    assert len(set(_COLOURS.values())) == len(_COLOURS) == len(Memory.__dataclass_fields__)
    far = np.asarray(draw_plans(plans, "title", 900e9))  # a device with far more memory has no line
    dashes = [int((p[585:940, 95:1165] == (30, 30, 30)).all(-1).sum(1).max()) for p in (image, far)]
    assert dashes[0] > 2 * dashes[1], dashes
