"""Word of ranks that comes over TCP, and who may say something; lost hosts are in test_namespaces.py."""

import json
import socket

import pytest

from launcher.failure import line, reports
from launcher.failure.reports import Failure
from launcher.failure.switchboard import Switchboard
from tests.launcher.failure.test_faults import wait_for

TOKEN = "a" * 32


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Yields a launcher's end; this process is a rank without the launcher's folder."""
    board = Switchboard(tmp_path, TOKEN, "127.0.0.1")
    monkeypatch.setenv(line.WHERE, board.where)
    monkeypatch.setenv(line.TOKEN, TOKEN)
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.delenv(reports.REPORTS, raising=False)
    monkeypatch.setattr(line, "_unreachable", [])
    yield board
    if not board._closing:
        board.close()


def test_word_of_a_rank_comes_into_the_folder(board, tmp_path):
    reports.enter("meeting")
    failure = Failure("3", 1, "Traceback\n" + "x" * 50_000 + "\nKeyError: 1", "step 7", "n3", 9)
    reports.fail(failure)
    reports.fail(Failure("4", 2))
    state = reports.states(tmp_path)[3]
    assert (state.rank, state.phase) == (3, "meeting")
    assert reports.first_failure(tmp_path) == failure


def test_a_clock_that_differs_does_not_count(board, tmp_path):
    assert line.say("state", {"rank": 1, "host": "n1", "pid": 2, "phase": "starting", "since": 5.0})
    assert reports.states(tmp_path)[1].since > 1e9


@pytest.mark.parametrize(
    "message",
    [
        b"GET / HTTP/1.0\n",
        json.dumps({"token": "b" * 32, "kind": "failure", "data": {"rank": "1", "code": 1}}).encode() + b"\n",
        json.dumps({"token": TOKEN, "kind": "failure", "data": {"name": "../x"}}).encode() + b"\n",
        json.dumps({"token": TOKEN, "kind": "state", "data": {"rank": "../x"}}).encode() + b"\n",
        json.dumps([1]).encode() + b"\n",
        b"x" * (1 << 21),
    ],
)
def test_strangers_are_not_listened_to(message, board, tmp_path):
    address, port = board.where.split()
    with socket.create_connection((address, int(port)), timeout=20) as connection:
        try:
            connection.sendall(message)
            assert connection.recv(1) == b""
        except ConnectionError:  # it hung up on what was still coming
            pass
    assert not list(tmp_path.iterdir()) and board.look() is None
    reports.enter("running")  # and others still are
    assert list(reports.states(tmp_path)) == [3]


def test_a_guard_that_ends_before_any_word_casts_doubt(board, tmp_path):
    held = line.hold({"rank": "3", "host": "n3", "pid": 1}, 30)
    reports.enter("running")
    assert line.is_held(held) and not board.silent
    held.close()
    wait_for(lambda: board.silent, "notice of the end")
    assert board.look() is None  # the host may be well


def test_a_guard_that_ends_after_a_failure_casts_none(board, tmp_path):
    held = line.hold({"rank": "3", "host": "n3", "pid": 1}, 30)
    reports.fail(Failure("2", 1))
    held.close()
    reports.enter("running")  # comes after
    wait_for(lambda: len(board._selector.get_map()) == 1, "the end of all lines")
    assert not board.silent


def test_a_guard_knows_that_its_launcher_is_gone(board):
    held = line.hold({"rank": "3", "host": "n3", "pid": 1}, 30)
    reports.enter("running")
    assert line.is_held(held)
    board.close()
    wait_for(lambda: not line.is_held(held), "the end of the line")
    held.close()


def test_a_launcher_that_is_not_there_is_asked_once(tmp_path, monkeypatch):
    gone = Switchboard(tmp_path, TOKEN, "127.0.0.1")
    gone.close()
    monkeypatch.setenv(line.WHERE, gone.where)
    monkeypatch.setattr(line, "_unreachable", [])
    assert not line.say("state", {}) and line._unreachable
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("tried again"))
    assert not line.say("state", {}) and line.hold({}, 30) is None


def test_without_a_line_nothing_is_said(monkeypatch):
    monkeypatch.setenv(line.WHERE, "")
    assert not line.say("state", {}) and not line._unreachable
