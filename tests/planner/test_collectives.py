"""What the planner counts of collectives, beside those that a real step of two ranks starts."""

from collections import Counter
from itertools import chain

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from swin_moe.config.io import load_config
from swin_moe.parallel.apply import BUCKET_BYTES
from swin_moe.parallel.groups import build_groups
from swin_moe.planner.calibrate.networks import NETWORKS, SmallStep
from swin_moe.planner.collectives import _buckets, collectives_of, exchanges, small_collectives_of
from swin_moe.planner.layouts import layout_in
from swin_moe.planner.workload import build_workload
from swin_moe.run.session import layout_of
from tests.ranks import run_ranks

CALLS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
}
LAYOUTS = {
    "experts over all ranks": "",
    "recomputed": "parallel.recompute=block",
    "2 micro-batches": "data.micro_batch=1",
    "experts on every rank": "parallel.expert=1",
    "padded experts, capacity by need": "model.moe.backend=padded",
    "ZeRO-1": "parallel.zero=1",
    "ZeRO-2": "parallel.zero=2",
    "ZeRO-2, 2 micro-batches": "parallel.zero=2 data.micro_batch=1",
    "ZeRO-3": "parallel.zero=3",
    "ZeRO-3, 2 micro-batches": "parallel.zero=3 data.micro_batch=1",
    "ZeRO-3, recomputed": "parallel.zero=3 parallel.recompute=block",
}


def _counted(folder):
    """Returns layout -> (calls of a step by kind, as the planner says, as they were)."""
    found = {}
    for name, text in LAYOUTS.items():
        words = f"model.moe.blocks=[] {NETWORKS[6]} data.global_batch=4 {text} run.output={folder}"
        config = load_config("digits_swin_moe", words.split())
        step = SmallStep(config, torch.device("cpu"), build_groups(*layout_of(config), torch.device("cpu")))
        step.micro_steps()
        step.update()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step.micro_steps()
            step.update()
        layout, workload = layout_in(config, 2), build_workload(config)
        said: Counter[str] = Counter()
        for c in chain(collectives_of(config, workload, layout), small_collectives_of(config, workload, layout)):
            said[c.kind] += c.calls
        found[name] = +said, Counter(CALLS[e.name] for e in seen.events() if e.name in CALLS)
    return found


@pytest.mark.mpi
def test_a_step_starts_as_many_collectives_as_the_planner_counts(tmp_path):
    for name, (said, seen) in run_ranks(_counted, 2, tmp_path, tmp_path, timeout=600)[0].items():
        assert said == seen, name


def test_nothing_is_sent_by_one_rank():
    config = load_config("digits_swin_moe")
    layout, workload = layout_in(config, 1), build_workload(config)
    sent = [*collectives_of(config, workload, layout), *small_collectives_of(config, workload, layout)]
    assert not sent and exchanges(workload, layout) == 0


def test_buckets_are_those_of_the_reduction():
    assert [_buckets(sizes) for sizes in ([], [1], [BUCKET_BYTES, 1], [BUCKET_BYTES // 2] * 5)] == [0, 1, 2, 3]
