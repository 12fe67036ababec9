"""The simulator of large worlds against a list of all messages, and against what must hold."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from swin_moe.config.io import load_config
from swin_moe.planner.hardware import load_hardware
from swin_moe.planner.layouts import Layout
from swin_moe.planner.simulation import program as fast
from swin_moe.planner.simulation.events import run_tasks, share
from swin_moe.planner.simulation.loads import draw_shares, shares_of_run
from swin_moe.planner.simulation.network import KINDS, Network, all_to_all, back, rings
from swin_moe.planner.simulation.program import Program, Stretch, rows_by_rank
from swin_moe.planner.workload import build_workload
from tests.planner import message_simulation as slow

A100 = load_hardware("a100_80")
SMALL = replace(A100, ranks_per_node=4, nics_per_node=2, nodes_per_leaf=2, oversubscription=3.0)


@pytest.fixture(scope="module")
def config():
    return load_config("digits_swin_moe", ["model.moe.num_experts=16", "model.moe.capacity_factor=0"])


@pytest.fixture(scope="module")
def workload(config):
    return build_workload(config)


def layout(ranks, expert, **options):
    chosen = {
        "expert_shard": 1,
        "engine": "torch",
        "zero": 0,
        "recompute": "none",
        "attention_chunk": 0,
        "micro_batch": 8,
        "accumulation": 1,
        "overlap": 1,
        "transport": "linear",
        "payload": "none",
        "offload": "none",
    } | options
    return Layout(ranks, expert, expert_data=ranks // expert // chosen["expert_shard"], **chosen)


def parts(workload, seconds=1e-4):
    """Returns segments of made-up times: what they are is not the simulator's business."""
    blocks = [f"layers.{stage}.blocks.{b}" for stage, depth in enumerate((2, 4)) for b in range(depth)]
    assert {layer.name for layer in workload.moe} <= set(blocks)
    forward = [Stretch(name, False, seconds * (i + 1)) for i, name in enumerate(blocks)]
    return [Stretch("", False, seconds), *forward, *(Stretch(s.name, True, 2 * s.seconds) for s in forward[::-1])]


LAYOUTS = {
    "one node": (SMALL, layout(4, 4)),
    "nodes": (SMALL, layout(16, 8)),
    "leaves, overlap": (SMALL, layout(32, 16, overlap=2)),
    "hierarchical": (SMALL, layout(32, 16, transport="hierarchical")),
    "shards, recomputed": (SMALL, layout(32, 4, expert_shard=2, recompute="block")),
    "replicas in a node": (SMALL, layout(16, 2, accumulation=2)),
    "sharded parameters": (SMALL, layout(16, 4, zero=3)),
    "one NIC a rank": (A100, layout(32, 16, zero=1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_is_that_of_all_messages(name, config, workload, monkeypatch):
    hardware, chosen = LAYOUTS[name]
    shares = draw_shares(len(workload.moe), 16, spread=0.7, seed=3)
    built = Program(config, hardware, workload, chosen, shares)
    tasks = built.build(parts(workload), 1e-4)
    timeline = run_tasks(tasks, built.network.rates)
    for function in ("all_to_all", "back", "rings"):
        monkeypatch.setattr(fast, function, getattr(slow, function))
    listed = Program(config, hardware, workload, chosen, shares).build(parts(workload), 1e-4)
    # How many hops a ring waits for is arithmetic of its own (test_rings_wait_for_their_hops).
    listed = [
        replace(other, transfer=replace(other.transfer, latency=task.transfer.latency)) if task.transfer else other
        for task, other in zip(tasks, listed, strict=True)
    ]
    seconds, spans, carried, highest = slow.run(built.network, listed)
    assert timeline.seconds == pytest.approx(seconds, rel=1e-9)
    np.testing.assert_allclose([(s.start, s.end) for s in timeline.spans], spans, rtol=1e-9, atol=1e-15)
    for kind, found in zip(KINDS, timeline.carried):
        expected = [carried.get((kind, i), 0.0) for i in range(len(found))]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-6, err_msg=kind)
    assert 0 < highest <= 1 + 1e-9


def test_bytes_out_are_bytes_in_and_no_link_is_over_its_rate(config, workload):
    built = Program(
        config, SMALL, workload, layout(64, 16, overlap=4), draw_shares(len(workload.moe), 16, spread=1.0, seed=0)
    )
    tasks = built.build(parts(workload, 1e-6), 1e-6)
    timeline, rates = run_tasks(tasks, built.network.rates), built.network.rates
    for out, into in ((0, 1), (2, 3), (4, 5)):
        assert timeline.carried[out].sum() == pytest.approx(timeline.carried[into].sum(), rel=1e-9)
    sent = sum(task.transfer.sent for task in tasks if task.transfer)
    assert timeline.carried[0].sum() + timeline.carried[2].sum() == pytest.approx(sent, rel=1e-9)
    together = 0
    for interval in timeline.intervals:
        together += len(interval.speeds) > 1
        for kind, rate in enumerate(rates):
            load = sum(
                speed * tasks[i].transfer.loads[kind] / tasks[i].transfer.alone(rates)
                for i, speed in interval.speeds.items()
            )
            assert np.max(load, initial=0.0) <= rate * (1 + 1e-9)
    assert together > 2


def test_one_node_is_the_closed_form():
    network, sent = Network(A100, 8), np.full(8, 1e6)
    (there,) = all_to_all(network, "rows", sent, transport="linear")
    rate = A100.inside.bytes_per_second * A100.link_share
    assert there.alone(network.rates) == pytest.approx(7e6 / rate) and there.latency == A100.inside.latency
    reduced = rings(network, "gradients", "all_reduce", 8e6, ranks=8, stride=1)
    assert reduced.alone(network.rates) == pytest.approx(2 * 8e6 * 7 / 8 / rate)
    assert reduced.latency == pytest.approx(3 * A100.inside.latency)


def test_rings_wait_for_their_hops():
    network = Network(A100, 64)
    over_nodes = rings(network, "", "all_reduce", 1e6, ranks=64, stride=1)
    assert over_nodes.latency == pytest.approx(3 * A100.inside.latency + 3 * A100.between.latency)
    replicas = rings(network, "", "all_gather", 1e6, ranks=4, stride=16)
    assert replicas.latency == pytest.approx(2 * A100.between.latency)


@pytest.mark.parametrize("figure", ["inside", "between", "oversubscription"])
def test_a_faster_link_makes_no_step_slower(figure, config, workload):
    shares, seconds = draw_shares(len(workload.moe), 16, spread=0.5, seed=1), []
    for factor in (1.0, 2.0, 8.0):
        changed = SMALL.oversubscription / factor
        if figure != "oversubscription":
            link = getattr(SMALL, figure)
            changed = replace(link, bytes_per_second=link.bytes_per_second * factor)
        built = Program(config, replace(SMALL, **{figure: changed}), workload, layout(32, 16), shares)
        seconds.append(run_tasks(built.build(parts(workload, 1e-6), 1e-6), built.network.rates).seconds)
    assert seconds[0] > seconds[1] > seconds[2] * (1 - 1e-12) or figure == "inside"
    assert seconds == sorted(seconds, reverse=True)


def test_what_shares_a_link_gets_half_of_it():
    network = Network(A100, 16)
    (rows,) = all_to_all(network, "rows", np.full(16, 1e6), transport="linear")
    assert share([rows, back(rows, "back")], network.rates) == pytest.approx([0.5, 0.5])
    inside = rings(network, "", "all_reduce", 1e6, ranks=8, stride=1)
    # Rows wait for the network and hardly use the ports, so that both run at nearly their own speed.
    assert min(share([rows, inside], network.rates)) > 0.8


def test_rows_are_dropped_or_padded_as_the_config_says(config):
    skewed = np.array([0.5, 0.25, 0.125, 0.125])
    whole = rows_by_rank(config, layout(4, 4), skewed)
    np.testing.assert_allclose(whole, skewed)
    moe = replace(config.model.moe, capacity_factor=1.25)
    capped = replace(config, model=replace(config.model, moe=moe))
    np.testing.assert_allclose(rows_by_rank(capped, layout(4, 4), skewed), [0.3125, 0.25, 0.125, 0.125])
    padded = replace(config, model=replace(config.model, moe=replace(moe, backend="padded")))
    np.testing.assert_allclose(rows_by_rank(padded, layout(4, 4), skewed), [0.3125] * 4)
    np.testing.assert_allclose(rows_by_rank(config, layout(8, 2, expert_shard=2), skewed), [0.375, 0.375, 0.125, 0.125])


def test_loads_have_the_stated_spread_and_those_of_a_run_its_own(tmp_path):
    drawn = draw_shares(3, 4096, spread=0.5, seed=0)
    np.testing.assert_allclose(drawn.sum(1), 1.0)
    np.testing.assert_allclose(drawn.std(1) / drawn.mean(1), 0.5, rtol=0.05)
    assert (draw_shares(2, 8, spread=0.0, seed=0) == 1 / 8).all()
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "moe/a/load": [3, 1], "moe/b/load": [2, 2]}, {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    np.testing.assert_allclose(shares_of_run(tmp_path, 3, 2, seed=0), [[0.75, 0.25], [0.5, 0.5], [0.75, 0.25]])
    many = shares_of_run(tmp_path, 1, 1000, seed=0)[0]
    assert set(np.round(many / many.min(), 6)) == {1.0, 3.0}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="no record has the load of experts"):
        shares_of_run(tmp_path, 1, 2, seed=0)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"moe/0/load": ["x", 1]}', r"line 1: moe/0/load must be a list of numbers >= 0, got \['x', 1\]"),
        (b'{"moe/0/load": 3}', "line 1: moe/0/load must be a list of numbers"),
        (b'{"moe/0/load": [-1, 3]}', "line 1: moe/0/load must be a list of numbers"),
        (b"[1]", "no record has the load of experts"),
        (b"\xff\x98", "line 1 is no record of a run"),
    ],
)
def test_loads_that_are_none_are_refused(line, sentence, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/metrics.jsonl: {sentence}"):
        shares_of_run(tmp_path, 1, 2, seed=0)


@pytest.mark.parametrize(
    "chosen, sentence", [(layout(12, 4), "fill nodes of 8"), (layout(96, 4, expert_shard=3), "not even over a node")]
)
def test_uneven_groups_are_refused(config, workload, chosen, sentence):
    with pytest.raises(ValueError, match=sentence):
        Program(config, A100, workload, chosen, draw_shares(len(workload.moe), 16, spread=0, seed=0))


def test_parameters_of_a_block_are_gathered_beside_the_block_before(config, workload):
    shares = draw_shares(len(workload.moe), 16, spread=0, seed=0)
    built = Program(config, A100, workload, layout(16, 4, zero=3), shares)
    tasks = built.build(parts(workload, 1.0), 1.0)
    spans, ahead = run_tasks(tasks, built.network.rates).spans, 0
    for i, task in enumerate(tasks):
        before = [spans[j].end for j in range(i) if tasks[j].stream == "compute"]
        ahead += task.stream == "reduction" and bool(before) and spans[i].end < before[-1]
    assert ahead >= 5


def test_weights_that_are_sent_one_by_one_are_all_sent(config, workload):
    shares = draw_shares(len(workload.moe), 16, spread=0, seed=0)
    sent = []
    for engine in ("torch", "fairscale"):
        built = Program(config, A100, workload, layout(16, 4, zero=1, engine=engine), shares)
        tasks = built.build(parts(workload), 1.0)
        sent.append(sum(t.transfer.sent for t in tasks if t.stream == "reduction" and t.transfer is not None))
    assert sent[0] == pytest.approx(sent[1]) and sent[0] > 0
