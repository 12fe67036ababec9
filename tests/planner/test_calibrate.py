"""`swin-moe calibrate` on a few small figures, its links, and what it refuses before it measures."""

import json
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from swin_moe.ops import row_products
from swin_moe.ops.mixed import norm as mixed
from swin_moe.ops.moe import moe_layer
from swin_moe.planner.calibrate import command, kernels, libraries, links, machine, networks
from swin_moe.planner.calibrate.libraries import Handled, fit_handling, measure_handling, seconds_of_recomputing
from swin_moe.planner.calibrate.links import Timed, fit_link, fit_links, measure_collectives, read_preflight
from swin_moe.planner.calibrate.networks import Seen, SmallStep
from swin_moe.planner.collectives import Collective
from swin_moe.planner.hardware import KINDS, Link, load_hardware, read_hardware
from swin_moe.planner.operators import MACS, PRODUCTS
from swin_moe.planner.rates import HOST, OTHER, UPDATE
from swin_moe.planner.step_time import seconds_of_collective
from tests.ranks import run_ranks


@pytest.fixture
def quick(monkeypatch):
    """Few figures: one network and small products."""
    monkeypatch.setattr(machine, "SHAPES", ((64, 32, 32), (64, 128, 32), (512, 32, 128)))
    few = networks.NETWORKS[6].replace("img_size=96", "img_size=48").replace("window_size=6", "window_size=3")
    monkeypatch.setattr(networks, "NETWORKS", (few,))
    monkeypatch.setattr(command, "NETWORKS", (few,))
    monkeypatch.setattr(libraries, "RECOMPUTED", (few,))
    monkeypatch.setattr(libraries, "_ROUNDS", 1)
    monkeypatch.setattr(networks, "_ROUNDS", 1)
    monkeypatch.setattr(command, "TURNS", 1)
    monkeypatch.setattr(kernels, "LINEAR", ((64, 32, 32),))
    monkeypatch.setattr(kernels, "LAYERS", ((8, 48),))


def test_it_writes_a_machine_that_plans_take(quick, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    command.main(["--out", str(path)])
    shown = capsys.readouterr()
    assert "step of network 1 of 1 in bf16" in shown.err and "GFLOP/s at most: fp32" in shown.out
    found = read_hardware(path)
    assert found.name == "mine" and found.device == "cpu" and found.matrix_share == 1.0
    assert [len(found.products[name]) for name in ("fp32", "bf16")] == [3, 3]
    for name in ("fp32", "bf16"):
        rates = found.rates[name].operators
        ours = name == "bf16" and mixed.compiled()
        assert {OTHER, UPDATE, HOST, "window_attention"} <= set(rates)
        assert ({"mixed_norm", "mixed_gelu"} if ours else {"native_layer_norm", "gelu"}) <= set(rates)
    assert 1e-7 < found.launch_seconds < 1e-2
    assert found.watts == load_hardware("cpu").watts  # not measured
    text = path.read_text()
    assert text.startswith("# Written by swin-moe calibrate") and "Not measured, from cpu.yaml" in text
    with pytest.raises(ValueError, match="exists; give another name, or --overwrite"):
        command.main(["--out", str(path)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", [0, 1, 7], ids=["swin", "swinv2", "experts, 2 micro-batches"])
def test_a_timed_step_has_the_operators_of_the_traced_one(tmp_path, network, precision):
    """Whatever kernels this processor chooses by sizes, tensors without memory choose them, too."""
    from swin_moe.config.io import load_config
    from swin_moe.planner.layouts import layout_in
    from swin_moe.planner.micro_step import micro_step_here

    words = f"model.moe.blocks=[] {networks.NETWORKS[network]} engine.precision={precision} run.output={tmp_path}"
    config = load_config("digits_swin_moe", words.split())
    step, now = SmallStep(config, torch.device("cpu")), machine.clock(torch.device("cpu"))
    networks.operators_of(step, now)
    operators, work = networks.operators_of(step, now)
    layout, segments = layout_in(config, 1), micro_step_here(config, layout_in(config, 1))
    said = [operator for segment in segments for operator in segment.operators] * layout.accumulation
    adding = [name for name, _ in operators if name in ("add_", "_foreach_add_")]  # is counted beside the micro-step
    products = [[o for o in listed if o[0] in PRODUCTS] for listed in (operators, said)]
    assert products[0] == products[1]
    # The engine scales the loss, beside the micro-step too. A first micro-step also makes what later ones find made.
    beside = Counter({o: 10**6 for o in operators if o[0] in adding}) + Counter(
        {("mul", "fp32"): 2 * layout.accumulation}
    )
    assert not Counter(operators) - Counter(said) - beside
    assert len(said) <= 1.12 * (len(operators) - len(adding))
    macs = layout.accumulation * sum(segment.work[:, MACS].sum() for segment in segments)
    assert macs == pytest.approx(work[:, MACS].sum(), rel=1e-6)


def test_kernels_of_this_processor_are_measured_by_shape(monkeypatch):
    monkeypatch.setattr(kernels, "LINEAR", ((8, 48, 96), (512, 192, 768)))
    monkeypatch.setattr(kernels, "LAYERS", ((4, 48),))
    for dtype in (torch.float32, torch.bfloat16):
        found = kernels.measure_kernels(dtype)
        assert set(found) <= kernels.MEASURED
        if row_products.takes(torch.zeros(1), torch.zeros(1), dtype) and "cpu" in moe_layer.COMPILED:
            assert [p[:3] for p in found["moe_layer"]] == [p[:3] for p in found["moe_layer_backward"]] == [(4, 48, 192)]
        for points in found.values():
            assert all(1e5 < rate < 1e14 for *_, rate in points)


def test_what_a_checkpoint_takes_of_the_host_is_that_of_the_operators_computed_again():
    assert seconds_of_recomputing(2e-5, 5 * 5e-5, 5) == pytest.approx(7e-5)
    assert seconds_of_recomputing(2e-5, -1.0, 5) == 2e-5  # disturbed: as others


def test_the_host_takes_longer_where_operators_move_more_and_a_disturbed_step_says_nothing():
    def seen(moved, host):
        work = np.zeros((len(moved), 5))
        work[:, 0] = moved
        seconds = np.full(len(moved), 1e-3)
        return Seen([("add", "fp32")] * len(moved), work, seconds, seconds.sum() + host, 0.0, np.ones(1))

    sizes = (np.full(100, 1e3), np.full(100, 1e6), np.full(300, 5e5))
    steps = [seen(moved, (2e-5 + 1e-11 * moved).sum()) for moved in sizes] + [seen(np.full(100, 1e7), -1e-2)]
    rate = networks._host_rates(steps)[HOST]
    assert (rate.call, rate.byte) == pytest.approx((2e-5, 1e-11), rel=1e-6)
    assert networks._host_rates(steps[-1:]) == {}


def test_what_libraries_take_of_the_host_is_by_weights_and_by_bytes():
    whole = [Handled(2e-3, 100), Handled(1e-3, 100), Handled(-1e-3, 50)]
    cut = [Handled(300 * 2e-5 + size / 4e9, 300, size) for size in (1e6, 4e7, 9e7)]
    assert fit_handling(whole, cut) == pytest.approx((2e-3 / 250, 2e-5, 4e9))
    assert fit_handling(whole, [Handled(-1.0, 300, 1e6)]) == (pytest.approx(8e-6), 0.0, 0.0)


def test_a_link_is_found_from_what_the_planner_says_of_it():
    truth = Link(2e-5, 3e9)
    hardware = replace(load_hardware("cpu"), inside=truth, ranks_per_node=4, link_share=1.0)
    timed = []
    for kind in ("all_to_all", "all_reduce"):
        for size in (1e3, 1e5, 1e7):
            seconds, _ = seconds_of_collective(Collective(kind, "exchange", 4, 1, size, 1), hardware)
            timed.append(Timed(kind, 4, size, seconds))
    found = fit_link(timed)
    assert (found.latency, found.bytes_per_second) == pytest.approx((2e-5, 3e9))


def test_a_kind_of_collective_has_its_own_link():
    slow = Link(1e-3, 1e9)
    hardware = replace(load_hardware("cpu"), inside=Link(2e-5, 3e9), link_share=1.0, collectives={"broadcast": slow})
    seconds = [
        seconds_of_collective(Collective(kind, "reduction", 2, 1, 8e3, 10), hardware)[0]
        for kind in ("all_gather", "broadcast")
    ]
    assert seconds == pytest.approx([10 * (2e-5 + 4e3 / 3e9), 10 * (1e-3 + 4e3 / 1e9)])


def _collectives():
    device = torch.device("cpu")
    now, share = machine.clock_of_ranks(device)
    assert 0 < share < 1.01 and now is (time.perf_counter if share > 0.95 else time.process_time)
    links._REPEATS["cpu"] = 5  # in this process alone, that of a rank
    libraries._ROUNDS, libraries.STAGES = 2, ("fairscale-1",)
    timed = list(measure_collectives(device, now))
    assert {row.kind for row in timed} == set(KINDS) and all(row.seconds > 0 for row in timed)
    link, kinds = fit_links(timed)
    assert set(kinds) == set(KINDS) and all(found.bytes_per_second > 1e6 for found in (link, *kinds.values()))
    # What is done around weights and rows is found beside operators and messages: without them it would hold these too.
    hardware = replace(load_hardware("cpu"), ranks_per_node=2, link_share=1.0, inside=link, collectives=kinds)
    hardware = replace(hardware, exchanging_seconds=1.0)  # of an older file
    found = measure_handling(device, hardware, now)
    each = found.handling_seconds, found.replicating_seconds, found.exchanging_seconds
    assert all(0 <= rate.call < 0.1 for rate in found.libraries.values())
    assert all(0 <= seconds < 0.1 for seconds in each) and max(found.handling_seconds, found.handling_bytes_per_second)


def test_ranks_time_their_collectives(tmp_path):
    run_ranks(_collectives, 2, tmp_path)


def preflight(tmp_path, **changes):
    tree = {
        "hosts": [{"name": "a"}],
        "collectives": [
            {"kind": "all_to_all", "backend": "gloo", "world": 2, "bytes": 1024, "seconds": 1e-3},
            {"kind": "all_to_all", "backend": "gloo", "world": 2, "bytes": 2**23, "seconds": 1e-2},
        ],
        "fit": {"send": {"latency_s": 1e-4, "bytes_per_s": 1e9, "ranks": 2, "error": 0.1}},
    }
    path = tmp_path / "preflight.json"
    path.write_text(json.dumps({**tree, **changes}))
    return path


def test_links_of_a_preflight_file(tmp_path):
    one = read_preflight(preflight(tmp_path))
    assert list(one) == ["inside"] and one["inside"].latency == pytest.approx(1e-3, rel=1e-2)
    two = read_preflight(preflight(tmp_path, hosts=[{"name": "a"}, {"name": "b"}]))
    assert two == {"between": Link(1e-4, 1e9)}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--out", "mine.txt"], "--out must be a YAML file, got 'mine.txt'"),
        (["--out", "nowhere/mine.yaml"], "there is no folder nowhere"),
        (["--like", "h10"], "did you mean h100?"),
        (["--otu", "mine.yaml"], "did you mean --out?"),
        (["--preflight", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_measured(monkeypatch, tmp_path, words, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "measure_rank", lambda *_, **__: pytest.fail("it measured"))
    with pytest.raises((ValueError, OSError)) as error:
        command.main(words)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_ranks_of_several_hosts_are_sent_to_the_preflight(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="ranks of one host.*--preflight"):
        command.main(["--out", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "two")
    with pytest.raises(ValueError, match=f"environment variable {name} must be a whole number"):
        command.main(["--out", str(tmp_path / "mine.yaml")])


def test_a_file_of_another_kind_is_no_preflight(tmp_path):
    for changes in ({"hosts": None}, {"collectives": [{}]}, {"collectives": []}):
        with pytest.raises(ValueError, match="preflight.json: "):
            read_preflight(preflight(tmp_path, **changes))
