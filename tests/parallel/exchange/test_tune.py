"""Choosing the exchange by measurement: candidates and the choice; on ranks: tune_cases.py."""

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe.dispatch import make_order
from swin_moe.parallel.exchange.tune import candidates, choose, even_routing, tune
from swin_moe.parallel.groups import Degrees, Groups
from tests.parallel.exchange.tune_cases import run_world
from tests.ranks import TWO_AND_FOUR, run_ranks


def names(payload, hosts, dtype):
    groups = Groups(len(hosts), 0, Degrees(len(hosts), 1, 1), hosts=hosts)
    return [str(c) for c in candidates(MoEConfig(payload=payload), groups, dtype)]


def test_candidates_by_hand():
    plain = [f"linear, payload none, overlap {n}" for n in (1, 2, 4)]
    assert names("none", (0, 0), torch.float32) == plain
    two_levels = names("none", (0, 0, 1), torch.float32)
    assert two_levels == [*plain, *(name.replace("linear", "hierarchical") for name in plain)]
    assert names("bf16", (0, 0), torch.float32)[3:] == [name.replace("none", "bf16") for name in plain]
    assert names("bf16", (0, 0), torch.bfloat16) == plain  # rounds nothing that is not rounded already
    assert {name.split(", ")[1] for name in names("fp8", (0, 0), torch.bfloat16)} == {"payload none", "payload fp8"}
    assert len(names("fp8", (0, 0, 1), torch.float32)) == 3 * 2 * 3


def test_the_simplest_within_the_margin_is_chosen():
    assert choose([1.02, 1.0, 1.5]) == 0
    assert choose([1.04, 1.0, 1.0]) == 1
    assert choose([2.0]) == 0


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 4, 2), (7, 4, 2), (16, 8, 1), (5, 8, 3)])
def test_an_even_routing_keeps_every_pair_once(tokens, experts, top_k):
    routing = even_routing(tokens, experts, top_k=top_k, device=torch.device("cpu"))
    assert int(routing.kept.sum()) == tokens * top_k and int(routing.kept.max() - routing.kept.min()) <= 1
    order = make_order(routing, tokens * top_k)
    assert sorted(order.pair.tolist()) == list(range(tokens * top_k))


def test_nothing_is_tuned_where_rows_do_not_travel():
    tune([(None, 4)], Groups(2, 0, Degrees(1, 1, 2)), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.mpi
@pytest.mark.parametrize("world", TWO_AND_FOUR)
def test_ranks_choose_alike_and_a_second_start_measures_nothing(tmp_path, world):
    results = run_ranks(run_world, world, tmp_path, str(tmp_path / "cache"))
    assert all(result == results[0] for result in results)
    first, second, third, *exact = results[0]
    assert first == second and third  # the third start found a broken file
    transports = ("linear", "hierarchical") if world == 4 else ("linear", "linear")
    wanted = [f"{t}, payload none, overlap {n}" for n in (1, 2, 4) for t in transports]
    # Where there is no hierarchy no candidate has that name: all are equally fast, and the first is chosen.
    if world == 2:
        wanted[1::2] = ["linear, payload none, overlap 1"] * 3
    assert exact == wanted
