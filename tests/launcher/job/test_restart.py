"""When a job is started again, with what, and that it goes on where it was."""

import os
import threading

import pytest

from launcher import restart
from launcher.__main__ import main
from launcher.failure import kinds, line
from launcher.failure.reports import Failure
from launcher.hosts.hostfile import Host
from launcher.job import reachable
from launcher.job.options import check, lost_seconds, parser
from launcher.job.prepare import prepare
from launcher.restart import Lost, Policy, choose_ranks, step_of
from launcher.supervise import Outcome
from tests.launcher.failure.test_faults import MPIS, assert_nothing_left, start

PATIENCE = 120.0  # seconds


def failed(step, code=1, rank="1"):
    return Outcome(code, rank, failure=Failure(rank, code, note=f"forward of step {step}"))


def test_the_step_is_the_program_s_progress_or_the_rank_s_note():
    assert step_of(failed(12)) == 12
    assert step_of(Outcome(1, step=3, failure=Failure("1", 1, note="backward of step 4"))) == 3
    assert step_of(Outcome(137)) is None and step_of(Outcome(1, failure=Failure("1", 1, note="start-up"))) is None


def test_restarts_are_counted_and_come_later_each_time():
    policy = Policy(restarts=2, backoff=5)
    assert policy.after(failed(3)) == (5, "failure 1 at step 3, of 2 that may be survived")
    assert policy.after(failed(9)) == (10, "failure 2 at step 9, of 2 that may be survived")
    assert policy.after(failed(20)) == (None, "failed 3 times; not started again (--restarts 2)")
    assert policy.starts == 2


def test_the_same_step_twice_is_no_accident():
    policy = Policy(restarts=5, backoff=0)
    assert policy.after(failed(3))[0] == 0
    assert policy.after(failed(3)) == (None, "failed twice at step 3; not started again")
    unknown = Policy(restarts=5, backoff=0)
    assert [unknown.after(Outcome(137))[0] for _ in range(6)] == [0] * 5 + [None]


def test_preemptions_count_apart():
    policy = Policy(restarts=1, backoff=0)
    for step in range(10, 20):
        assert policy.after(failed(step, kinds.PREEMPTED, "")) == (0, "preempted")
    assert policy.after(failed(20))[0] == 0  # still the first failure
    standing = Policy(restarts=1, backoff=0)
    said = [standing.after(failed(3, kinds.PREEMPTED, "")) for _ in range(4)]
    assert [pause for pause, _ in said] == [0, 0, 0, None] and "preempted 4 times in a row" in said[-1][1]


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(0),
        Outcome(kinds.CONFIGURATION),
        Outcome(kinds.INTERRUPTED),
        Outcome(kinds.NOT_STOPPED),
        Outcome(kinds.PREEMPTED, asked_to_stop=True),
        Outcome(137, asked_to_stop=True),
    ],
)
def test_what_ended_as_it_should_is_not_started_again(outcome):
    assert Policy(restarts=3, backoff=0).after(outcome) == (None, "")


def test_without_restarts_nothing_is_started_again():
    assert Policy(restarts=0, backoff=0).after(failed(1)) == (None, "")
    assert Policy(restarts=0, backoff=0).after(failed(1, kinds.PREEMPTED)) == (None, "")


@pytest.mark.parametrize(
    "ranks, room, allowed, least, chosen",
    [
        (32, 31, [32, 24, 16], None, 24),
        (32, 32, [32, 24, 16], None, 32),
        (32, None, None, None, 32),
        (4, 3, None, 2, 3),
        (8, 23, None, None, 8),
        (32, 20, [64, 32, 16], None, 16),
    ],
)
def test_ranks_of_the_next_start(ranks, room, allowed, least, chosen):
    assert choose_ranks(ranks, room, allowed, least) == chosen


@pytest.mark.parametrize(
    "ranks, room, allowed, least", [(4, 3, None, None), (32, 15, [32, 16], None), (4, 1, None, 2), (32, 24, [24], 25)]
)
def test_too_few_ranks_remain(ranks, room, allowed, least):
    with pytest.raises(ValueError, match=f"what remains takes {room} ranks"):
        choose_ranks(ranks, room, allowed, least)


def job_on(hosts, *options, tmp_path):
    (tmp_path / "hosts").write_text(hosts)
    own = parser().parse_args(["--hostfile", str(tmp_path / "hosts"), *options])
    own.dry_run = True
    return prepare(own, ["-m", "tests.launcher.programs"]), own


def test_a_lost_host_is_left_out_and_its_ranks_go_where_there_is_room(tmp_path):
    job, own = job_on("a:2\nb:2\nc:2\n", "-n", "4", tmp_path=tmp_path)
    again = restart._again(job, own, Lost(hosts=("b",)), 4, 1)
    assert again.plan.hosts == (Host("a", 2), Host("c", 2))
    assert again.additions["LAUNCHER_RESTART"] == "1"
    with pytest.raises(ValueError, match="what remains takes 2 ranks, the job needs 4 ranks"):
        restart._again(job, own, Lost(hosts=("b", "c")), 4, 2)
    with pytest.raises(ValueError, match="leaves no host"):
        restart._again(job, own, Lost(hosts=("a", "b", "c")), 4, 2)


def test_the_slot_of_a_rank_that_was_killed_is_not_used_where_fewer_will_do(tmp_path):
    job, own = job_on("a:16\nb:16\n", "--restarts", "2", "--allowed-ranks", "32,24,16", tmp_path=tmp_path)
    lost = Lost().more(job, Outcome(137, "17"))
    assert lost.slots == ("b",) and set(lost.hosts) <= {"a", "b"}
    again = restart._again(job, own, Lost(slots=lost.slots), 32, 1)
    assert again.plan.hosts == (Host("a", 16), Host("b", 8))
    twice = restart._again(again, own, Lost(slots=("b",) * 9), 32, 2)  # 23 remain
    assert twice.plan.hosts == (Host("a", 16),)
    assert Lost().more(job, Outcome(1, "17")).slots == ()  # an exception costs no slot


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--restarts", "-1"], "--restarts must be at least 0, got -1"),
        (["--stall", "0"], "--stall must be more than 0"),
        (["--stall", "nan"], "--stall must be more than 0"),
        (["--grace", "-5"], "--grace must be at least 0, got -5"),
        (["--backoff", "nan", "--restarts", "1"], "--backoff must be at least 0, got nan"),
        (["--allowed-ranks", "32,x"], "--allowed-ranks takes numbers such as 32,24,16, got '32,x'"),
        (["--allowed-ranks", "32,0", "--restarts", "1"], "--allowed-ranks takes numbers such as 32,24,16, got '32,0'"),
        (["--lost", "0"], "--lost must be more than 0 and at most 86400 seconds, got 0"),
        (["--lost", "inf"], "--lost must be more than 0 and at most 86400 seconds, got inf"),
        (["--backoff", "5"], "--backoff is for a job that is started again; it needs --restarts"),
        (["--min-ranks", "2"], "--min-ranks is for a job that is started again; it needs --restarts"),
        (["--allowed-ranks", "4,2"], "--allowed-ranks is for a job that is started again; it needs --restarts"),
        (
            ["--restarts", "1", "--allowed-ranks", "16,8", "--min-ranks", "17"],
            "--min-ranks 17 is more than any of --allowed-ranks 16,8",
        ),
    ],
)
def test_options_that_cannot_be(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(parser().parse_args(words))


@pytest.mark.parametrize(
    "words, seconds",
    [([], 120), (["--stall", "9"], 9), (["--stall", "9000"], 120), (["--lost", "900"], 900), (["--lost", "30"], 30)],
)
def test_a_host_counts_as_lost_after_seconds_that_can_be_chosen(words, seconds):
    """And every rank, on other hosts too, goes by the same."""
    options = parser().parse_args(words)
    check(options)
    assert lost_seconds(options) == seconds
    told = dict(pair.split("=", 1) for pair in restart.own_variables(options))
    assert float(told[line.SECONDS]) == seconds


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["-n", "3", "--restarts", "1", "--allowed-ranks", "4,2"], "a job of 3 ranks is none of --allowed-ranks 4,2"),
        (["-n", "3", "--restarts", "1", "--min-ranks", "4"], "--min-ranks 4 is more than the job's 3"),
        (["-n", "3", "--exclude", "n01"], "--exclude needs hosts to leave some out of"),
        (["--log-dir", "/dev/null/logs"], "--log-dir '/dev/null/logs' cannot be made: Not a directory"),
        (["--restarts", "1", "--backoff", "-1"], "--backoff must be at least 0, got -1"),
    ],
)
def test_one_sentence_before_anything_starts(words, sentence, capsys):
    assert main([*words, "--", "-m", "json.tool"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"launcher: {sentence}") and message.count("\n") == 1


def test_a_dry_run_makes_no_folder(tmp_path, capsys):
    assert main(["-n", "2", "--dry-run", "--log-dir", str(tmp_path / "logs"), "--", "-m", "json.tool"]) == 0
    assert not list(tmp_path.iterdir())


def test_jobs_that_begin_at_one_time_share_no_folder(tmp_path):
    """As those of a scheduler's array do, with one --log-dir; they kept each other's files, or removed them."""
    options, found = parser().parse_args(["--log-dir", str(tmp_path / "logs")]), []
    (tmp_path / "logs" / "start-4").mkdir(parents=True)
    together = threading.Barrier(8)

    def begin():
        together.wait()
        found.append(restart.log_folder(options))

    for _ in range(20):
        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(int(folder.name[6:]) for folder in found) == list(range(5, 165))
    assert all(folder.is_dir() for folder in found)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, capsys):
    """Root may write everywhere but where a file system is read-only, which the system's answer stands for here."""
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    assert main(["--log-dir", str(tmp_path), "--", "-m", "json.tool"]) == 2
    said = capsys.readouterr().err
    assert said == f"launcher: --log-dir '{tmp_path}' cannot be written to; name a folder of your own\n"


@pytest.mark.mpi
@pytest.mark.parametrize("mpi", MPIS)
def test_a_job_goes_on_with_fewer_ranks_after_one_was_killed(mpi, tmp_path):
    options = ("--restarts", "1", "--backoff", "0.1", "--allowed-ranks", "4,2", *mpi)
    process = start("train", tmp_path, *options, world=4)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    assert (tmp_path / "log").read_text().split() == [f"0/4/{step}" for step in range(5)] + [
        f"1/2/{step}" for step in range(5, 10)
    ]
    assert "failure 1 at step 4, of 1 that may be survived; starting again in 0.1 s with 2 ranks" in output
    assert_nothing_left(tmp_path)


@pytest.mark.mpi
def test_a_failure_at_the_same_step_ends_the_job(tmp_path):
    process = start("fail_at_step_3", tmp_path, "--restarts", "5", "--backoff", "0.1")
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 1, output
    assert output.splitlines()[-1] == "launcher: failed twice at step 3; not started again"
    assert sorted(path.name for path in tmp_path.glob("started-1-*")) == ["started-1-0", "started-1-1"]


@pytest.mark.mpi
def test_a_preempted_program_is_started_again_until_it_is_done(tmp_path):
    process = start("leave_with_75_twice", tmp_path, "--restarts", "1", "--backoff", "0.1")
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    assert output.count("launcher: preempted; starting again") == 2


TORN = """[proxy:0@n3] [mpiexec@n1] ui_cmd_cb (pmiserv_pmci.c:51): Launch proxy failed.
HYDU_sock_connect (sock.c:140): unable to connect from "n3" to "n1" (Network is unreachable)
[mpiexec@n1] main (mpiexec.c:270): process manager error waiting for completion
"""


@pytest.mark.parametrize(
    "output, why",
    [
        (TORN, 'HYDU_sock_connect (sock.c:140): unable to connect from "n3" to "n1" (Network is unreachable)'),
        ("\nssh: no route\nORTE was unable to start\n", "ssh: no route"),
        ("[mpiexec@n1] main: it failed\n", "[mpiexec@n1] main: it failed"),
        (" \n", ""),
    ],
)
def test_the_line_with_the_cause_is_shown(output, why):
    assert reachable.cause(output) == why
