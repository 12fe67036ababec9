"""What the launcher sees of ranks that are gone, and the memory that tells it and the reaper."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launcher.failure import kinds, line, lookout, orphans, reports
from launcher.failure.lookout import Lookout
from launcher.failure.page import Page
from launcher.failure.reports import Failure
from launcher.supervise import Outcome, _explain
from tests.launcher.failure.test_faults import wait_for


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Returns an empty folder of reports, of this process as rank 2."""
    monkeypatch.setenv(reports.REPORTS, str(tmp_path))
    monkeypatch.setenv("PMI_RANK", "2")
    return tmp_path


def test_a_page_tells_across_a_fork():
    page = Page()
    assert page.noted == (0.0, "") and page.left == [] and page.was_cut_off and not page.ends
    if os.fork() == 0:
        page.note("forward of step 3")
        page.note("a shorter one")
        page.leave(["b_1", "a_0"])
        page.end()
        page.note("x" * 5000)  # what is noted says nothing of the end, and stays within its room
        os._exit(0)
    os.wait()
    assert page.noted[1] == "x" * 1024 and abs(page.noted[0] - time.time()) < 60
    assert page.left == ["a_0", "b_1"] and page.ends and not page.was_cut_off
    page.judge()
    assert not page.was_cut_off and not page.ends
    page.leave(f"{number:0200d}" for number in range(1000))
    assert 10 < len(page.left) < 20 and all(len(name) == 200 for name in page.left)


@pytest.mark.parametrize("fault, seconds", [("failed", lookout._FAILED_SECONDS), ("lost", lookout._LOST_SECONDS)])
def test_a_job_with_a_rank_that_is_gone_ends_soon(fault, seconds, place, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lookout.time, "monotonic", lambda: now[0])
    look = Lookout(place, 4, 600.0).look
    assert look() is None
    if fault == "failed":
        reports.fail(Failure("", 75))  # all alike: they leave together
        now[0] += 50
        assert look() is None and reports.ends(place) == (0, 0)
        reports.fail(Failure("1", 3, "exited with code 3"))
    else:
        reports.lose("1")
    now[0] += 0.5
    assert look() is None and not reports.is_over()
    now[0] += seconds - 0.1
    assert look() is None
    now[0] += 0.2 + lookout.LOOK_SECONDS
    verdict = look()
    assert verdict is not None and verdict.code == kinds.HOST and reports.is_over()


def test_many_ranks_are_looked_at_less_often(place, monkeypatch):
    now, looks = [100.0], []
    monkeypatch.setattr(lookout.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lookout.reports, "ends", lambda place: looks.append(now[0]) or (0, 0))
    look = Lookout(place, 8000, 600.0).look
    for _ in range(40):
        look()
        now[0] += 0.25
    assert len(looks) == 5


def test_words_are_counted_by_rank_and_replaced_by_time(place):
    reports.fail(Failure("1", 70, "was stopped"), 7)
    reports.fail(Failure("1", 70, "was stopped; rank 1 is at x.py:3"), 7)
    reports.fail(Failure("0", 1, "connection closed"))
    reports.lose("0")
    assert reports.ends(place) == (2, 1)
    first = reports.first_failure(place)
    assert first is not None and first.words.endswith("x.py:3")
    reports.hold(["a", "b"])
    assert reports.held_here(place) == ["a", "b"]
    (place / "shared-3.json").write_text('{"host": "elsewhere", "names": ["c"]}')
    (place / "shared-4.json").write_text("{")
    assert reports.held_here(place) == ["a", "b"]


@pytest.mark.parametrize(
    "outcome, failure, lost, code",
    [
        (Outcome(9, asked_to_stop=True, request=15), None, True, 143),  # hydra's own kill of a rank that is gone
        (Outcome(138, asked_to_stop=True, request=1), None, True, 129),
        (Outcome(75, asked_to_stop=True, request=15), None, False, 75),
        (Outcome(9, asked_to_stop=True, request=15), Failure("1", 71), True, 71),
        (Outcome(9), None, True, kinds.HOST),
    ],
)
def test_the_code_of_a_request_that_nobody_heeds(outcome, failure, lost, code):
    ended = _explain(outcome, failure, False, False, lost)
    assert ended.code == code
    if code == 143:
        assert ended.describe() == "launcher: SIGTERM (exit code 143): asked to save, the program ended without"


@pytest.mark.parametrize("how, keep", [("killed", False), ("killed", True), ("done", False)])
def test_what_a_killed_launcher_leaves_is_cleaned_up(how, keep, tmp_path, monkeypatch):
    token, place = os.urandom(8).hex(), tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv(reports.REPORTS, str(place))
    job = subprocess.Popen(["sleep", "600"], env={line.TOKEN: token}, start_new_session=True)
    mine = Path(f"/dev/shm/test_lookout_{token}")
    mine.touch()
    reports.hold([mine.name])
    launcher = os.fork()
    if launcher == 0:
        with orphans.cleaned_up(token, place, remove=[] if keep else [place]):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    try:
        os.waitpid(launcher, 0)
        if how == "done":
            time.sleep(0.5)
            assert job.poll() is None and mine.exists() and place.exists()
        else:
            assert job.wait(20) < 0
            wait_for(lambda: not mine.exists() and place.exists() == keep, "cleaning up")
    finally:
        mine.unlink(missing_ok=True)
        job.kill()
        job.wait()
