"""Who is found to be behind, from what the ranks said last; jobs that really hang: tests/training/test_faults.py."""

import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from swin_moe.parallel.exchange.transport import AllToAll, ExchangePlan, PendingRows
from swin_moe.parallel.heartbeat import _LEFT, LONG_SECONDS, Beat, Heartbeat, _in_collective


def judge(own, *others, rank=0, ages=None, answered=0.0):
    """Returns what rank `rank` finds, having said `own`, with the other ranks' beats; beats are (order, collective).

    ages, answered: Seconds since a rank's last beat was new, and since the store answered.
    """
    heart = Heartbeat(rank, len(others) + 1, timeout=10)
    now = time.monotonic()
    heart._answered = now - answered
    everyone = [*others[:rank], own, *others[rank:]]
    for number, beat in enumerate(everyone):
        heart._seen[number] = beat, now - (ages or {}).get(number, 0)
    return heart._culprit(own)


def beat(order, *, collective=True, seconds=11.0, long=False, phase="forward"):
    return Beat(1, 12, order, phase, seconds, long, collective)


def test_the_rank_that_began_fewer_phases_is_behind():
    rank, sentence = judge(beat(8, phase="backward"), beat(7), beat(5), beat(6))
    assert rank == 2
    assert sentence == (
        "rank 2 keeps the others waiting in backward of step 12 (engine.timeout=10 s); "
        "it was last seen 0 s ago in forward of step 12, 11 s after it began it"
    )


def test_among_equals_the_one_outside_a_collective_is_behind():
    assert judge(beat(7), beat(7), beat(7, collective=False))[0] == 2
    assert judge(beat(7, collective=False), beat(7))[0] == 0  # this rank itself: it says nothing about itself


def test_nobody_is_behind_who_is_as_far_as_the_others():
    assert judge(beat(7), beat(7), beat(7)) is None


def test_a_rank_that_just_began_something_is_given_its_time():
    assert judge(beat(7), beat(6, seconds=3.0)) is None


def test_a_long_phase_is_waited_for():
    assert judge(beat(7), beat(6, long=True)) is None
    assert judge(beat(7), beat(6, long=True, seconds=LONG_SECONDS + 1))[0] == 1


def test_a_rank_whose_beats_stopped_does_not_answer():
    rank, sentence = judge(beat(7), beat(7), beat(9), ages={2: 9.0})
    assert rank == 2 and "rank 2 does not answer any more" in sentence and "last seen 9 s ago" in sentence
    assert judge(beat(7), beat(7), beat(7), ages={2: 7.0}) is None


def test_from_a_long_phase_beats_are_missed_for_twice_as_long():
    saving = beat(7, long=True)
    rank, sentence = judge(saving, saving, saving, ages={2: 21.0})
    assert rank == 2 and "rank 2 does not answer any more" in sentence
    assert judge(saving, saving, saving, ages={2: 19.0}) is None


@pytest.mark.parametrize("long", [True, False])
def test_who_was_done_is_missed_only_where_ranks_wait_for_each_other(long):
    gone = replace(beat(7), number=_LEFT)
    own = beat(7, long=long)
    assert (judge(own, gone, ages={1: 25.0}) is None) == long
    assert (judge(own, gone, rank=1, ages={0: 25.0}, answered=25.0) is None) == long
    assert judge(own, beat(7), rank=1, answered=25.0)[0] == 0


def test_a_hang_is_judged_from_a_long_phase_too():
    """Rank 1 hangs before a save in which the others wait."""
    assert judge(beat(8, long=True), beat(7, collective=False))[0] == 1
    assert judge(beat(8, long=True), beat(7, collective=False, seconds=3.0)) is None


def test_a_store_that_does_not_answer_is_rank_0():
    heart = Heartbeat(1, 2, timeout=10)
    heart._answered = time.monotonic() - 9
    assert heart._culprit(beat(7))[0] == 0


def test_nothing_is_said_before_all_ranks_are_known():
    heart = Heartbeat(0, 3, timeout=10)
    heart._seen[1] = beat(3), time.monotonic()
    assert heart._culprit(beat(7)) is None


@pytest.mark.parametrize("training", [True, False])
def test_phases_follow_the_model_and_are_noted(training):
    notes = []
    heart = Heartbeat(note=notes.append)
    net = nn.Module()
    net.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    net.train(training)
    heart.follow(net)
    heart.enter("forward", step=4)
    for block in net.blocks:
        block(torch.zeros(1, 2))
    heart.enter("backward")
    net.blocks[0](torch.zeros(1, 2))
    heart.enter("saving a checkpoint", long=True)
    expected = ["forward", "forward of blocks.0", "forward of blocks.1", "backward", "backward, recomputing blocks.0"]
    expected = [phase for phase in [*expected, "saving a checkpoint"] if training or "blocks" not in phase]
    assert notes == ["start-up", *(f"{phase} of step 4" for phase in expected)]


def test_a_loop_begins_a_phase_per_item():
    notes = []
    heart = Heartbeat(note=notes.append)
    assert list(heart.over("ab", "evaluation batch")) == ["a", "b"]
    assert notes[1:] == ["evaluation batch 0", "evaluation batch 1"]


def test_a_rank_that_waits_for_rows_under_way_is_in_a_collective():
    pending = PendingRows(torch.zeros(1, 1), ExchangePlan((AllToAll(None, [1], [1], (False,), 0),), (None, None)))
    arrived, waiting = threading.Event(), threading.Event()
    pending._work = SimpleNamespace(wait=lambda: waiting.set() or arrived.wait(10))
    thread = threading.Thread(target=pending.wait)
    thread.start()
    assert waiting.wait(10) and not _in_collective(threading.get_ident())
    try:
        deadline = time.monotonic() + 5
        while not _in_collective(thread.ident) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _in_collective(thread.ident)
    finally:
        arrived.set()
        thread.join()


def test_no_thread_is_left_when_the_heartbeat_stops(monkeypatch):
    inside = threading.Event()

    class Slow:
        def set_timeout(self, timeout):
            self.timeout = timeout

        def set(self, key, value):
            inside.set()
            time.sleep(0.5)

        def check(self, keys):
            return False

    monkeypatch.setattr("swin_moe.parallel.heartbeat.dist.PrefixStore", lambda prefix, store: Slow())
    heart = Heartbeat(0, 2, timeout=1)
    heart.start(SimpleNamespace(clone=lambda: None), lambda sentence: None)
    assert inside.wait(5)
    heart.stop()  # in the middle of a call
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


class Written(dict):
    """A store that keeps what it is told."""

    def set_timeout(self, timeout):
        pass

    def set(self, key, value):
        self[key] = json.loads(value)

    def check(self, keys):
        return False


def follow(monkeypatch, *, long):
    """Returns (what the heartbeat of one rank of two wrote, having come to its end; what it said of the other)."""
    store, said, over = Written(), [], threading.Event()
    monkeypatch.setattr("swin_moe.parallel.heartbeat.dist.PrefixStore", lambda prefix, clone: store)
    heart = Heartbeat(0, 2, timeout=0.2)
    heart._seen[1] = beat(7), time.monotonic()
    heart.enter("saving", long=long)
    heart.start(SimpleNamespace(clone=lambda: None), lambda sentence: (said.append(sentence), over.set()))
    assert over.wait(5)
    heart.stop()
    return store, said


@pytest.mark.parametrize("long", [False, True])
def test_a_rank_that_is_stopped_is_found_from_every_phase(long, monkeypatch):
    store, said = follow(monkeypatch, long=long)
    assert len(said) == 1 and "rank 1 does not answer any more" in said[0]
    assert store["0"]["number"] == _LEFT and store["0"]["phase"] == "saving"
