"""The preflight's arithmetic: who tries whom, cost models, what is far behind the others. Nothing is started."""

import random
import time
from itertools import combinations

import pytest

from launcher.preflight.collectives import combine
from launcher.preflight.fit import Fit, behind, fit, slow_links
from launcher.preflight.schedule import regroup, round_robin, rounds

SIZES = (1, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 23)


@pytest.mark.parametrize("latency, bandwidth", [(2e-5, 5e9), (1e-3, 1e8), (0.02, 1e6), (5e-6, 2e11)])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_fit_finds_the_terms_it_was_made_of(latency, bandwidth, noise):
    draw = random.Random(f"{latency} {noise}")
    true = Fit(latency, bandwidth, 4, 0.0)
    points = [(size, true.seconds(size) * draw.uniform(1 - noise, 1 + noise)) for size in SIZES * 8]
    found = fit(points, 4)
    assert found.latency_s == pytest.approx(latency, rel=0.01 + noise)
    assert found.bytes_per_s == pytest.approx(bandwidth, rel=0.01 + 2 * noise)
    assert found.error == pytest.approx(noise / 3**0.5, abs=0.2 * noise + 1e-9)  # of a uniform distribution
    assert found.ranks == 4


def test_a_fit_is_the_best_of_many():
    """Against a search: no pair of terms nearby has a smaller sum of squared relative errors."""
    draw = random.Random(3)
    points = [(size, (1e-4 + size / 1e9) * draw.uniform(0.7, 1.4)) for size in SIZES * 3]
    found = fit(points, 2)

    def loss(latency, bandwidth):
        return sum(((latency + size / bandwidth) / seconds - 1) ** 2 for size, seconds in points)

    best = loss(found.latency_s, found.bytes_per_s)
    assert best == pytest.approx(len(points) * found.error**2)
    for a in (0.9, 0.99, 1.01, 1.1):
        for b in (0.9, 0.99, 1.01, 1.1):
            assert loss(found.latency_s * a, found.bytes_per_s * b) > best


@pytest.mark.parametrize(
    "points, latency, bandwidth",
    [
        ([(1, 1e-3), (1 << 20, 1e-3)], 1e-3, (1 << 20) / 1e-3),  # not longer with more bytes
        ([(1000, 5e-4), (1_000_000, 1.0)], 0.0, 5e12 / 3e6),  # the best latency would be negative
        ([(4096, 1e-3)], 1e-3, 4096e3),  # one size
    ],
)
def test_no_term_is_negative(points, latency, bandwidth):
    found = fit(points, 2)
    assert found.latency_s == pytest.approx(latency) and found.bytes_per_s == pytest.approx(bandwidth, rel=1e-3)


def test_what_is_far_behind_the_median_is_out_of_line():
    assert behind({"a": 10.0, "b": 11.0, "c": 3.0}, 3) == {"c": 0.3}
    assert behind({"a": 10.0, "b": 11.0, "c": 4.0}, 3) == {}
    assert behind({"a": 10.0, "b": 1.0}, 3) == {}  # it cannot be told which


def test_one_slow_end_does_not_make_the_others_slow():
    ends, links = slow_links({("a", "b"): 100, ("a", "c"): 5, ("b", "c"): 6}, end_factor=3, link_factor=4)
    assert ends == {"c": 0.06} and links == {}


def test_one_slow_link_makes_no_end_slow():
    speeds = {pair: 100.0 for pair in combinations("abcd", 2)} | {("b", "d"): 10.0}
    assert slow_links(speeds, end_factor=3, link_factor=4) == ({}, {("b", "d"): 0.1})
    assert slow_links(speeds | {("b", "d"): 30.0}, end_factor=3, link_factor=4) == ({}, {})


@pytest.mark.parametrize("players", range(1, 12))
def test_everyone_meets_everyone_once_and_nobody_twice_in_a_round(players):
    made = rounds([f"h{n}" for n in range(players)], most_ranks=64, most_rounds=256)
    assert len(made) <= players
    assert sorted(pair for pairs in made for pair in pairs) == list(combinations(range(players), 2))
    for pairs in made:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(set(ranks)) == len(ranks)


def test_beyond_a_size_hosts_meet_instead_of_ranks():
    hosts = [rank // 4 for rank in range(28)]
    made = rounds(hosts, most_ranks=16, most_rounds=64)
    pairs = [pair for one in made for pair in one]
    met = {tuple(sorted((hosts[a], hosts[b]))) for a, b in pairs}
    assert met == {*combinations(range(7), 2), *((host, host) for host in range(7))}
    assert {rank for pair in pairs for rank in pair} == set(range(28))  # and no rank is left out
    assert {(rank, rank + 1) for rank in range(27) if rank % 4 < 3} <= {*pairs}  # neighbours on a host
    assert all(len({rank for pair in one for rank in pair}) == 2 * len(one) for one in made)


def test_ten_thousand_ranks_try_a_bounded_number_of_others_soon():
    hosts = [rank // 8 for rank in range(10_240)]
    began = time.process_time()
    made = rounds(hosts, most_ranks=64, most_rounds=256)
    assert time.process_time() - began < 5.0  # 0.2 s on a quiet core
    assert len(made) == 258
    probes = [0] * 10_240
    for pairs in made:
        for pair in pairs:
            for rank in pair:
                probes[rank] += 1
    assert max(probes) <= 64


def test_the_rounds_of_one_player_more_are_the_circle_s():
    assert round_robin(4, 0) == [(0, 3), (1, 2)] and round_robin(3, 0) == [(1, 2)]


def test_pairs_are_regrouped_without_a_rank_twice_in_a_round():
    assert regroup([(0, 1), (0, 2), (2, 3), (1, 3)]) == [[(0, 1), (2, 3)], [(0, 2), (1, 3)]]


def test_a_collective_takes_as_long_as_its_last_rank():
    assert combine([[1.0, 5.0, 1.0], [2.0, 1.0, 4.0]]) == 4.0  # of 2, 5, 4
